"""Where tables of this machine are kept between runs, and who may measure."""

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
    """The file of a network's table; another processor, runtime version or thread count has another one."""
    key = "|".join([cpu_model(), runtime, version, str(threads), network])
    return folder / "latency" / f"{runtime}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"


def cached_table(path: Path, *, quiet: bool = False) -> LatencyTable | None:
    """The table in the cache; None where there is none or it is damaged, which is said unless `quiet`."""
    if not path.exists():
        return None
    try:
        return LatencyTable.read(path)
    except CompressorError as error:
        if not quiet:
            say(f"{error.message} It is measured anew.")
        return None


@contextmanager
def measuring_alone(folder: Path) -> Iterator[None]:
    """Hold the machine's measuring lock: two processes that measure at once would measure each other.

    One that is measuring already is waited for, however long it has been given; the lock goes with its process.

    Raises:
        CompressorError: the folder cannot be written.
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
    """The processor and its cores, such as `Intel(R) Xeon(R) Processor, 2 cores`."""
    return f"{cpu_name()}, {os.cpu_count()} cores"


def governor() -> str:
    """How the processor's clock is governed, such as `performance`; empty where the system does not say."""
    try:
        return (
            Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="ascii").strip()
        )
    except OSError:
        return ""


def clocks() -> str:
    """The range of the processor's clock, else its clock now; empty where the system does not say."""
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
