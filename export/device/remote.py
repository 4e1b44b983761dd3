"""A bundle's way to a board and back over ssh, in one go: copied, run, and its results fetched.

    results = run_remote("ssh://me@orin.local", "slim.tar.gz", "results.tar.gz", say=print)

Only `ssh` is needed here, and a shell with coreutils and tar there. Each step can be repeated: a connection that
drops in the middle of a copy goes on at the byte where it broke, and the script goes on running on the board
meanwhile. Commands are fixed texts; the few things put into them are quoted and of plain letters to begin with.
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
"""What `identify` says of a machine."""

SILENT_S = 7200.0
"""Seconds without a line from a script that still runs until it is no longer waited for; one engine takes minutes."""

LARGEST_LOG = 16 << 20
"""Bytes that a script may say."""


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
    """Copy a bundle to a board, run it there, and fetch its results. Called again, it goes on where it was.

    Args:
        url: `ssh://user@host` or `ssh://user@host:port`.
        bundle: The bundle.
        results: Where `results.tar.gz` goes; read it with `export.device.bundle_results.read_results`.
        duration_s, warmup_s, processes: How it is measured there.
        trtexec: Where trtexec is, if not in one of the usual places.
        say: Takes a line of progress, and every line that the script prints.
        ssh_options: More options for ssh.
        poll_s: Seconds between two looks at the script.
        pause_s: Seconds before a dropped connection is tried again.
        keep: Whether the bundle and its engines stay on the board once all went well there.

    Returns:
        The script's exit code: 0 all went well, 1 a network failed there; its results say which and why.

    Raises:
        ExportError: the machine is not reached, refuses, or the script could not run at all.
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
        # started once; it outlives the connection that started it
        connection.run(
            f"cd {place} && if [ ! -f rc ] && ! {_runs(place)}; then rm -f log; {setting}"
            f"nohup sh -c {shlex.quote(script)} {_mark(place)} >/dev/null 2>&1 </dev/null & echo $! >pid; fi"
        )
        code = _follow(connection, place, say, poll_s)
        if code not in (0, 1):
            # its process may still be on its way out: with its number, the next call would wait for it
            last = _words(connection.run(f"cd {place} && rm -f rc pid; tail -n 1 log | head -c 1000"))
            if code > 128:
                raise ExportError(
                    f"The script on {connection.destination.address} was ended.", "Run it again."
                )
            reason = last.strip().replace("error: ", "", 1).rstrip(".") or "no reason was given"
            raise ExportError(f"{connection.destination.address}: {reason}.")
        write_bytes(goal, connection.get(f"{place}/{folder}/results.tar.gz", say))
        done = f"cd {place} && rm -f rc pid" if keep or code else f"rm -rf {place}"
        connection.run(done)
        return code


def place_of(checksums: bytes) -> str:
    """Where a bundle lies on the board, below its user's home, by its list of checksums."""
    return f"{HOME}/{sha256_bytes(checksums)[:16]}"


def identify(
    url: str, *, trtexec: str = "", ssh_options: Sequence[str] = (), pause_s: float = 3.0
) -> dict[str, str]:
    """What the machine is, by the script's own eyes: tensorrt, jetpack, l4t, model, power_mode and board.

    Args:
        url, trtexec, ssh_options, pause_s: As `run_remote`.

    Raises:
        ExportError: it is not reached, or has no trtexec, or one whose version is not known.
    """
    with Connection(parse_destination(url), options=ssh_options, pause_s=pause_s) as connection:
        setting = f"TRTEXEC={shlex.quote(trtexec)}; export TRTEXEC; " if trtexec else ""
        output = connection.run(f"{setting}sh -s", device_script("identify_on_device.sh"))
        lines = [line.partition("=") for line in output.decode("utf-8", errors="replace").splitlines()]
        facts = {name: short(plain(value).strip(), 120) for name, _, value in lines if name in FACTS}
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)+", facts.get("tensorrt", "")):
            raise ExportError(
                f"{connection.destination.address} did not say which TensorRT it has, but: {_words(output)!r}.",
                "Something there answers in place of its shell; see what comes with: "
                f"ssh {connection.destination.address} 'echo one; echo two'",
            )
    return {name: facts.get(name, "") for name in FACTS}


def _mark(place: str) -> str:
    """The last word of the script's process in the board's list of processes."""
    return f"compressor-{place.rpartition('/')[2]}"


def _runs(place: str) -> str:
    """A condition for the shell in a bundle's place on the board: whether its script runs.

    The number in `pid` may be another process's by now, so that the process is asked for its last word too; where there
    is no /proc, the number has to do.
    """
    last = """$(tr '\\000' '\\n' <"/proc/$p/cmdline" | tail -n 1)"""
    return (
        '{ p=$(cat pid) && kill -0 "$p" && '
        f'{{ [ ! -r /proc/self/cmdline ] || [ "{last}" = {_mark(place)} ]; }}; }} 2>/dev/null'
    )


def _follow(connection: Connection, place: str, say: Callable[[str], None], poll_s: float) -> int:
    """Say what the script says until it ends; its exit code."""
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
                    f"The script on {where} said more than {LARGEST_LOG >> 20} MB, and is not listened to any longer.",
                    f"See what it says in {place}/log there.",
                )
        if state.isdigit():
            return int(state)
        if time.monotonic() - heard > SILENT_S:
            raise ExportError(
                f"The script on {where} still runs, but has said nothing for {SILENT_S / 3600:.0f} hours.",
                f"See what it does there ({place}/log), and end it or let it run.",
            )
        gone = gone + 1 if state == "gone" else 0
        if gone > 1:  # the first time it may just have been between its end and its exit code
            connection.run(f"cd {place} && rm -f pid")
            raise ExportError(f"The script on {where} was ended.", "Run it again.")
        time.sleep(poll_s)


def _words(said: bytes) -> str:
    """A line of the machine's, fit to be shown."""
    return short(plain(said.decode("utf-8", errors="replace")).strip(), 300)
