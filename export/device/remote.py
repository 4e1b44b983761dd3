"""Runs a bundle on a board over ssh: copies it, runs its script, and fetches the results.

    results = run_remote("ssh://me@orin.local", "slim.tar.gz", "results.tar.gz", say=print)

This machine needs only `ssh`, the board a shell, coreutils and tar. All steps can be repeated: an interrupted copy
resumes at the byte where it stopped, and the script keeps running on the board when the connection drops. Commands are
fixed strings; the values inserted into them are quoted and consist of safe characters.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Callable

from export.device.archive import CHECKSUMS, require_checksums, top_folder, unpack
from export.device.bundle import device_script
from export.device.connection import CHUNK, HOME, WORK_S, Connection, parse_destination
from export.errors import ExportError
from export.files import read_bytes, sha256_bytes, write_bytes
from export.text import plain, short

FACTS = ("tensorrt", "jetpack", "l4t", "model", "power_mode", "board")
"""Facts that `identify` returns."""

SILENT_S = 7200.0
"""Maximum seconds to wait for output of a running script; one engine takes minutes to build."""

LARGEST_LOG = 16 << 20
"""Maximum bytes of a script's log."""


def run_remote(
    url: str,
    bundle: str | Path,
    results: str | Path,
    *,
    duration_s: int = 15,
    warmup_s: int = 2,
    processes: int = 3,
    trtexec: str = "",
    say: Callable[[str], None] = lambda text: None,
    ssh_options: Sequence[str] = (),
    poll_s: float = 2.0,
    pause_s: float = 3.0,
    keep: bool = True,
) -> int:
    """Copy a bundle to a board, run it there, and fetch its results; a second call resumes an interrupted one.

    Args:
        url: `ssh://user@host` or `ssh://user@host:port`.
        bundle: The bundle.
        results: The file to write `results.tar.gz` to; read it with `export.device.results.read_results`.
        duration_s, warmup_s, processes: Seconds of measurement and warm-up, and the number of processes.
        trtexec: Path of trtexec on the board; "" searches the usual folders.
        say: Receives lines of progress and every line that the script prints.
        ssh_options: More options for ssh.
        poll_s: Seconds between two polls of the script.
        pause_s: Seconds before a dropped connection is retried.
        keep: Whether to keep the bundle and its engines on the board after success.

    Returns:
        The script's exit code: 0 for success, 1 if a network failed; the results say which and why.

    Raises:
        ExportError: the board cannot be reached or refuses a command, or the script cannot run.
    """
    source, goal = Path(bundle), Path(results)
    content = read_bytes(source, "bundle")
    files = unpack(source)
    require_checksums(files, source)
    folder = top_folder(source)
    measured = f"--duration {int(duration_s)} --warmup {int(warmup_s)} --processes {int(processes)}"
    place = place_of(files[CHECKSUMS])
    with Connection(parse_destination(url), options=ssh_options, pause_s=pause_s) as connection:
        connection.run(f"mkdir -p {place}")
        connection.put(content, f"{place}/bundle.tar.gz", say)
        top = shlex.quote(f"./{folder}")
        connection.run(
            f"cd {place} && {{ [ -f unpacked ] || {{ tar -xzf bundle.tar.gz && : >unpacked; }}; }}",
            limit_s=WORK_S,
        )
        script = f"sh {top}/run.sh {measured} >log 2>&1; echo $? >rc.part; mv rc.part rc"
        setting = f"TRTEXEC={shlex.quote(trtexec)}; export TRTEXEC; " if trtexec else ""
        # started only once; it keeps running when the connection drops
        connection.run(
            f"cd {place} && if [ ! -f rc ] && ! {_runs(place)}; then rm -f log; {setting}"
            f"nohup sh -c {shlex.quote(script)} {_mark(place)} >/dev/null 2>&1 </dev/null & echo $! >pid; fi"
        )
        code = _follow(connection, place, say, poll_s)
        if code not in (0, 1):
            # its process may still be ending: with a pid file, the next call would wait for it
            last = _words(connection.run(f"cd {place} && rm -f rc pid; tail -n 1 log | head -c 1000"))
            if code > 128:
                raise ExportError(
                    f"The script on {connection.destination.address} was killed.", "Run it again."
                )
            reason = last.strip().replace("error: ", "", 1).rstrip(".") or "no reason was given"
            raise ExportError(f"{connection.destination.address}: {reason}.")
        write_bytes(goal, connection.get(f"{place}/{folder}/results.tar.gz", say))
        done = f"cd {place} && rm -f rc pid" if keep or code else f"rm -rf {place}"
        connection.run(done)
        return code


def place_of(checksums: bytes) -> str:
    """The bundle's folder on the board, relative to the user's home, from its list of checksums."""
    return f"{HOME}/{sha256_bytes(checksums)[:16]}"


def identify(
    url: str, *, trtexec: str = "", ssh_options: Sequence[str] = (), pause_s: float = 3.0
) -> dict[str, str]:
    """Identify a board with the script of bundles: tensorrt, jetpack, l4t, model, power_mode and board.

    Args:
        url, trtexec, ssh_options, pause_s: As in `run_remote`.

    Raises:
        ExportError: the board cannot be reached, or trtexec is missing or has an unknown version.
    """
    with Connection(parse_destination(url), options=ssh_options, pause_s=pause_s) as connection:
        setting = f"TRTEXEC={shlex.quote(trtexec)}; export TRTEXEC; " if trtexec else ""
        output = connection.run(f"{setting}sh -s -- --identify", device_script())
        lines = [line.partition("=") for line in output.decode("utf-8", errors="replace").splitlines()]
        facts = {name: short(plain(value).strip(), 120) for name, _, value in lines if name in FACTS}
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)+", facts.get("tensorrt", "")):
            raise ExportError(
                f"{connection.destination.address} did not report its TensorRT version, but {_words(output)!r}.",
                "Another program may answer in place of the shell; test it with: "
                f"ssh {connection.destination.address} 'echo one; echo two'",
            )
    return {name: facts.get(name, "") for name in FACTS}


def _mark(place: str) -> str:
    """The last argument of the script's process, which identifies it on the board."""
    return f"compressor-{place.rpartition('/')[2]}"


def _runs(place: str) -> str:
    """A shell condition, for a bundle's folder on the board: whether its script runs.

    The process id in `pid` may have been reused, so the last argument of the process is compared as well. Without
    /proc, only the process id is checked.
    """
    last = """$(tr '\\000' '\\n' <"/proc/$p/cmdline" | tail -n 1)"""
    return (
        '{ p=$(cat pid) && kill -0 "$p" && '
        f'{{ [ ! -r /proc/self/cmdline ] || [ "{last}" = {_mark(place)} ]; }}; }} 2>/dev/null'
    )


def _follow(connection: Connection, place: str, say: Callable[[str], None], poll_s: float) -> int:
    """Forward the script's output until it ends; return its exit code."""
    seen, rest, gone, heard = 0, b"", 0, time.monotonic()
    where = connection.destination.address
    while True:
        state = connection.ask(
            f"cd {place} && if [ -f rc ]; then cat rc; elif {_runs(place)}; then echo running; else echo gone; fi",
            r"\d{1,3}|running|gone",
        )[0]
        while True:
            fresh = connection.run(
                f"cd {place} && if [ -f log ]; then tail -c +{seen + 1} log | head -c {CHUNK}; fi",
                most_bytes=CHUNK,
            )
            if not fresh:
                break
            seen, heard = seen + len(fresh), time.monotonic()
            *lines, rest = (rest + fresh).split(b"\n")
            for line in lines:
                say(_words(line))
            if seen > LARGEST_LOG:
                raise ExportError(
                    f"The script on {where} printed more than {LARGEST_LOG >> 20} MB; its output is no longer read.",
                    f"See {place}/log there.",
                )
        if state.isdigit():
            return int(state)
        if time.monotonic() - heard > SILENT_S:
            raise ExportError(
                f"The script on {where} still runs, but has printed nothing for {SILENT_S / 3600:.0f} hours.",
                f"See {place}/log there, and stop the script or let it run.",
            )
        gone = gone + 1 if state == "gone" else 0
        if gone > 1:  # once is normal: the process ends before its exit code is written
            connection.run(f"cd {place} && rm -f pid")
            raise ExportError(f"The script on {where} was killed.", "Run it again.")
        time.sleep(poll_s)


def _words(said: bytes) -> str:
    """A line of the board's output, sanitised for display."""
    return short(plain(said.decode("utf-8", errors="replace")).strip(), 300)
