"""The cache of this machine's latency tables, and the lock that lets one process measure at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.core.errors import CompressorError
from compressor.core.progress import say
from compressor.core.versions import cpu_name
from compressor.latency.table import LatencyTable


def table_path(folder: Path, *, runtime: str, version: str, threads: int, network: str) -> Path:
    """Return the file of a network's table; it depends on processor, runtime version and thread count."""
    key = "|".join([cpu_model(), runtime, version, str(threads), network])
    return folder / "latency" / f"{runtime}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"


def cached_table(path: Path, *, quiet: bool = False) -> LatencyTable | None:
    """Read a table from the cache; None if there is none or it is damaged (with a message unless `quiet`)."""
    if not path.exists():
        return None
    try:
        return LatencyTable.read(path)
    except CompressorError as error:
        if not quiet:
            say(f"{error.message} It is measured again.")
        return None


@contextmanager
def measuring_alone(folder: Path) -> Iterator[None]:
    """Hold the machine's measurement lock: two processes that measure at the same time would disturb each other.

    Waits without limit for a process that is already measuring. The lock is released when its process ends.

    Raises:
        CompressorError: The folder cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        (folder / "latency").mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "latency" / "measuring.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("Another process is measuring on this machine; waiting for it to end.")
            lock.acquire()
    except OSError as error:
        raise CompressorError(
            f"The cache folder {folder} cannot be written: {error.strerror or error}.",
            "Name another one: export COMPRESSOR_CACHE=DIR",
        ) from error
    try:
        yield
    finally:
        lock.release()


def cpu_model() -> str:
    """Return the processor's name and core count, such as `Intel(R) Xeon(R) Processor, 2 cores`."""
    return f"{cpu_name()}, {os.cpu_count()} cores"


def governor() -> str:
    """Return the CPU frequency governor, such as `performance`; empty if the system does not report it."""
    try:
        return (
            Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="ascii").strip()
        )
    except OSError:
        return ""


def clocks() -> str:
    """Return the range of the processor's clock, or its present clock; empty if the system reports neither."""
    folder = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    try:
        low, high = (
            int((folder / f"cpuinfo_{end}_freq").read_text(encoding="ascii")) // 1000
            for end in ("min", "max")
        )
        return f"{low}-{high} MHz"
    except (OSError, ValueError):
        pass
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        return ""
    return f"{max(found):.0f} MHz" if found else ""
