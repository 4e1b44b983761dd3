"""Processes that are forked from one that has imported what a run needs: that would take most of their time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

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
