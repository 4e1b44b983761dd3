"""Processes that are forked from one that has imported what a run needs: that would take most of their time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

IMPORTED = (
    "accelerate", "fvcore.nn", "jinja2", "matplotlib.figure", "onnx", "onnxruntime", "sklearn.datasets", "tensorboard",
    "timm", "torch._meta_registrations", "torch.nn.parallel", "torch.onnx", "torch_pruning", "torchvision",
)  # fmt: skip
"""What a run imports as it goes, besides this project."""


def forked(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that calls a function, not yet started."""
    context = multiprocessing.get_context("forkserver")
    own = [name for name in sys.modules if name.partition(".")[0] in ("compressor", "export")]
    context.set_forkserver_preload([*own, "compressor.cli.app", *IMPORTED])
    return context.Process(target=function, args=arguments)


def command(arguments: list[str], said: Path, variables: Mapping[str, str]) -> None:
    """`compress ARGUMENTS`, with all that it says in a file and these variables in its environment."""
    os.environ.update(variables)
    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from compressor.cli.app import main

    sys.argv = ["compress", *arguments]
    main()


def launch_variables(processes: int) -> list[dict[str, str]]:
    """What a launcher such as `torchrun` tells each of the processes that it starts on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**common, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


class ForkedChild:
    """Takes the place of `subprocess.Popen` for `python -m MODULE`, whose `main` a forked process calls.

    A process that has to have another number of threads is started, as those are set before torch is imported.
    """

    def __new__(cls, arguments: list[str], *, env: dict[str, str], **how: Any) -> Any:
        if env["OMP_NUM_THREADS"] != "1":
            return subprocess.Popen(arguments, env=env, **how)
        return super().__new__(cls)

    def __init__(
        self, arguments: list[str], *, env: dict[str, str], stderr: IO[bytes], stdin: int, stdout: int,
        start_new_session: bool,
    ) -> None:  # fmt: skip
        assert (stdin, stdout, start_new_session) == (subprocess.PIPE, subprocess.PIPE, True)
        (asked, ask), (answers, answer), (ready, begun) = (os.pipe() for _ in range(3))
        theirs = [Connection(each, writable=False) for each in (asked, answer, os.dup(stderr.fileno()), begun)]
        self._process = forked(serving, arguments[-1], env, os.getcwd(), *theirs)
        self._process.start()
        for each in theirs:
            each.close()
        os.read(ready, 1)  # it leads its own group now, or is gone
        os.close(ready)
        self.stdin, self.stdout = os.fdopen(ask, "wb"), os.fdopen(answers, "rb", buffering=0)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired([], timeout or 0.0)
        return self.returncode


def serving(module: str, variables: Mapping[str, str], folder: str, *streams: Connection) -> None:
    """`python -m MODULE` in this process, with these streams, in a session of its own."""
    *standard, begun = streams
    for place, stream in enumerate(standard):
        os.dup2(stream.fileno(), place)
        stream.close()
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (multiprocessing gives it nothing to read)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:] = variables["PYTHONPATH"].split(os.pathsep)
    os.write(begun.fileno(), b".")
    begun.close()
    import_module(module).main()
