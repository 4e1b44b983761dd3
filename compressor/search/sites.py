"""Choose where candidates are scored, from `--workers`."""

from __future__ import annotations

import re
import socket
from urllib.parse import urlsplit

from compressor.core.errors import CompressorError
from compressor.search.workers import LOCAL_CLUSTER, Site

REACH_SECONDS = 10.0
"""Seconds that a cluster may take to accept a connection."""


def check_workers(workers: int | str, brief_steps: int = 0) -> None:
    """Raise an error for unavailable workers before anything slow starts.

    Args:
        workers: Number of processes, or `ray://host:port`.
        brief_steps: Number of training steps of each candidate before it is scored.

    Raises:
        CompressorError: The text is neither a number nor an address, Ray is not installed, nothing answers there, or
            several workers would have to train.
    """
    workers = _number(workers)
    if brief_steps and workers != 1:
        raise CompressorError(
            f"--workers {workers}: workers only score, and cannot train candidates for {brief_steps} steps first.",
            "Use --workers 1, or --set search.brief_iterations=0.",
        )
    if isinstance(workers, int):
        if workers < 1:
            raise CompressorError(f"--workers {workers}: expected 1 or more.")
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


def open_site(workers: int | str, threads: int | None, seconds: float, device: str = "cpu") -> Site | None:
    """Return where candidates are scored; None for this process.

    Args:
        workers: Number of processes here, or `ray://host:port`.
        threads: Threads of each worker; None divides those of this process, and gives one to each on Ray.
        seconds: Time limit for a candidate.
        device: "cpu" or "cuda".
    """
    workers = _number(workers)
    check_workers(workers)
    if workers == 1:
        return None
    if isinstance(workers, str):
        from compressor.search.ray_site import RayCluster

        return RayCluster(workers, threads or 1, seconds, gpu=device != "cpu")
    import torch

    from compressor.search.workers import ThisMachine

    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device == "cuda" else [device]
    return ThisMachine(workers, threads or max(1, torch.get_num_threads() // workers), seconds, devices)
