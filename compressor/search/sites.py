"""Where candidates are scored, from `--workers`: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import logging
import os
import re
import socket
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from compressor.core.errors import CompressorError
from compressor.search.scorer import Scorer
from compressor.search.workers import LOCAL_CLUSTER, Site, ThisMachine, Worker, WorkerLost
from export.convert.ort import available_cores

if TYPE_CHECKING:
    from torch import Tensor


REACH_SECONDS = 10.0
"""Seconds that a cluster may take to accept a connection."""

MOST_PER_CORE, FEW = 4, 16
"""Workers that each core of this machine may have, and how many are accepted in any case: a GPU may serve several."""

WORTH_S = 10.0
"""Seconds of scoring in this process after which other processes score by default: what starting them takes."""

MEMORY_SHARE = 0.8
"""Share of the free memory that processes by default may take."""

CONNECT_SECONDS = 30
"""Seconds that Ray may take to connect once its port is open."""


def check_workers(workers: int | str | None, brief_steps: int = 0) -> None:
    """Raise an error for unavailable workers before anything slow starts.

    Args:
        workers: Number of processes, or `ray://host:port`; None for the default.
        brief_steps: Number of training steps of each candidate before it is scored.

    Raises:
        CompressorError: The text is neither a number nor an address, there are far more workers than cores, Ray is not
            installed, nothing answers there, or several workers would have to train.
    """
    if workers is None:
        return
    workers = _number(workers)
    if brief_steps and workers != 1:
        raise CompressorError(
            f"--workers {workers}: workers only score, and cannot train candidates for {brief_steps} steps first.",
            "Use --workers 1, or --set search.brief_iterations=0.",
        )
    if isinstance(workers, int):
        if workers < 1:
            raise CompressorError(f"--workers {workers}: expected 1 or more.")
        cores = available_cores()
        if workers > (most := max(FEW, MOST_PER_CORE * cores)):
            raise CompressorError(
                f"--workers {workers}: this machine has {cores} cores, and each worker is a process with its own copy "
                f"of the network; at most {most} are started.",
                f"Use --workers {cores}, or ray://host:10001 for a cluster.",
            )
        return
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise CompressorError(
            f"--workers {workers} needs Ray, which is not installed.",
            "Install it: pip install 'compressor[ray]'",
        )
    if workers == LOCAL_CLUSTER:
        return
    host, port = _address(workers)
    try:
        socket.create_connection((host, port), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise CompressorError(
            f"--workers {workers}: no Ray cluster answers at {host}:{port} "
            f"({error.strerror or error}; waited at most {REACH_SECONDS:g} s).",
            "Start its head with: ray start --head --ray-client-server-port=10001 (the port to give here), "
            "or use --workers NUMBER for processes of this machine.",
        ) from None


def _number(workers: int | str) -> int | str:
    """Convert a number that is text, as in a recipe."""
    return int(workers) if isinstance(workers, str) and re.fullmatch(r"[0-9]+", workers) else workers


def _address(workers: str) -> tuple[str, int]:
    try:
        parts = urlsplit(workers)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.scheme != "ray":
        raise CompressorError(
            f"--workers {workers} is not an address of a Ray cluster.", "Write a number, or ray://host:10001."
        )
    return host, port


def open_site(
    workers: int | str | None, threads: int | None, seconds: float, device: str = "cpu"
) -> Site | None:
    """Return where candidates are scored; None for this process.

    Args:
        workers: Number of processes here, or `ray://host:port`; None for the cores of a machine without a GPU.
        threads: Threads of each worker; None divides those of this process, and gives one to each on Ray and by
            default.
        seconds: Time limit for a candidate.
        device: "cpu" or "cuda".
    """
    if workers is None:
        most = most_by_default(threads, device)
        return None if most < 2 else IdleCores(most, threads or 1, seconds)
    workers = _number(workers)
    check_workers(workers)
    if workers == 1:
        return None
    if isinstance(workers, str):
        return RayCluster(workers, threads or 1, seconds, gpu=device != "cpu")
    import torch

    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device == "cuda" else [device]
    return ThisMachine(workers, threads or max(1, torch.get_num_threads() // workers), seconds, devices)


def most_by_default(threads: int | None, device: str) -> int:
    """Return the number of processes that score by default, at most; arguments as for `open_site`."""
    return available_cores() // (threads or 1) if device == "cpu" else 1


class IdleCores(ThisMachine):
    """The cores of this machine that one candidate with few threads leaves idle, as far as the memory allows it.

    Processes are started once scoring has taken a while in this process.

    Args:
        most: Number of processes, at most.
        threads: Threads of each process, and of this one while it scores.
        seconds: Time limit for a candidate.
    """

    after_s = WORTH_S

    def __init__(self, most: int, threads: int, seconds: float) -> None:
        super().__init__(most, threads, seconds)
        self._most = most

    def settle(self) -> int:
        """Take as many processes as fit into the free memory if each needs what this process has needed at most."""
        import resource

        import psutil

        largest_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux the unit is KiB
        room = int(MEMORY_SHARE * psutil.virtual_memory().available / largest_bytes)
        self.number = max(1, min(self._most, room))
        return self.number


class RayCluster(Site):
    """As many actors as fit on the cluster's machines; tensors are in its object store.

    The toolkit and the network's own module must be installed on the cluster's machines, in the same versions for
    bit-identical results. Tensors are sent as safetensors, plans as JSON.

    Args:
        address: `ray://host:port`, or `ray://local`.
        threads: CPUs of each actor.
        seconds: Time limit for a candidate.
        gpu: Whether each actor has a GPU of its own.
    """

    def __init__(self, address: str, threads: int, seconds: float, gpu: bool = False) -> None:
        ray: Any = import_module("ray")
        self._ray, self._seconds, self.threads, self._gpu = ray, seconds, threads, gpu
        self._actors: list[_Actor] = []
        self._stopped = False
        self._owns = not ray.is_initialized()
        if self._owns:
            _connect(ray, address)
        self.number = _room(ray, {"CPU": float(threads), **({"GPU": 1.0} if gpu else {})})
        if self.number < 1:
            what = f"{threads} CPUs and a GPU, as this one has," if gpu else f"{threads} CPUs"
            self.close()
            raise CompressorError(
                f"No machine of the Ray cluster {address} has {what} for a worker.",
                f"Start nodes with more{' GPUs or' if gpu else ''} CPUs, or give workers fewer threads: "
                "--set search.threads=1",
            )

    def publish(self, name: str, tensors: Mapping[str, Tensor]) -> Any:
        from safetensors.torch import save

        return self._ray.put(save(dict(tensors)))

    def start(self, index: int, plain: Mapping[str, Any], weights: Any, images: Any) -> Worker:
        if self._stopped:
            raise WorkerLost("not started: the search was stopped")
        options: dict[str, Any] = {"num_cpus": self.threads, "num_gpus": 1 if self._gpu else 0}
        actor = (
            self._ray.remote(Scorer).options(**options).remote(dict(plain), weights, images, self.threads)
        )
        self._actors.append(_Actor(self._ray, actor, self._seconds))
        return self._actors[-1]

    def stop(self) -> None:
        self._stopped = True
        for actor in self._actors:
            actor.close()

    def close(self) -> None:
        if self._owns:
            self._ray.shutdown()


class _Actor(Worker):
    def __init__(self, ray: Any, actor: Any, seconds: float) -> None:
        self._ray, self._actor, self._seconds = ray, actor, seconds
        self.version = 0

    def reweigh(self, weights: Any, channels_last: bool) -> None:
        self._answer(self._actor.reweigh.remote(weights, channels_last))

    def score(self, plan: str, floor: float | None) -> float:
        return float(self._answer(self._actor.score.remote(plan, floor)))

    def close(self) -> None:
        self._ray.kill(self._actor)

    def _answer(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference, timeout=self._seconds)
        except errors.GetTimeoutError:
            raise WorkerLost(f"stopped, as it had not answered within {self._seconds:g} s") from None
        except errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, CompressorError):
                raise cause from None
            raise _failed(f"{type(cause).__name__}: {cause}") from None
        except errors.RayError as error:
            if getattr(error, "actor_init_failed", False):  # the last line has the exception
                raise _failed(str(error).strip().splitlines()[-1]) from None
            raise WorkerLost(f"lost by Ray: {str(error).splitlines()[0]}") from None


def _failed(how: str) -> CompressorError:
    return CompressorError(
        f"A worker on the Ray cluster failed: {how}.",
        "The cluster's machines need the same versions of the toolkit, of torch and of the network's module.",
    )


def _room(ray: Any, needed: Mapping[str, float]) -> int:
    """Return how many workers that need these resources fit on the cluster's machines, each on a single one.

    Resources in use by others are not subtracted: those of our own last workers may be about to be freed.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(have.get(name, 0) // much) for name, much in needed.items()) for have in machines)


def _connect(ray: Any, address: str) -> None:
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if address == LOCAL_CLUSTER:
                ray.init(include_dashboard=False, **options)
            else:
                os.environ.setdefault("RAY_CLIENT_RECONNECT_GRACE_PERIOD", str(CONNECT_SECONDS))
                ray.init(address, **options)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, ImportError) as error:
        raise CompressorError(
            f"The Ray cluster {address} cannot be joined: {str(error).splitlines()[0]}.",
            "It needs the same versions of Python and Ray as this machine.",
        ) from None
