"""A machine that ssh reaches: commands there, and files there and back, over a line that may drop.

Only `ssh` is needed here, and a shell with coreutils there. Each step can be repeated: a connection that drops in the
middle of a copy goes on at the byte where it broke.

What the other machine says is not trusted: an answer stands between two marks, so that a greeting of its shell's
start-up files does no harm; it is bounded in bytes and in time while it is read, and is shown without control
characters.
"""

from __future__ import annotations

import re
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from export.device.bounded import run_bounded
from export.errors import ExportError
from export.files import sha256_bytes
from export.text import plain, short

_URL = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z_][A-Za-z0-9._-]*)@)?"
    r"(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?/?"
)
HOME = ".cache/compressor-bundles"
"""Where bundles lie there, below the user's home."""

CHUNK = 1 << 20
"""Bytes that one command copies."""

LARGEST_FILE = 1 << 30
"""Bytes of a file that is fetched; what a device measured takes some tens of megabytes."""

ANSWER_BYTES = 1 << 16
"""Bytes of the answer to a question; a file's piece may be as long as it was asked for."""

GREETING_BYTES = 1 << 16
"""Bytes that a shell's start-up files may print around an answer."""

ANSWER_S = 60.0
"""Seconds that the answer to a question may take."""

WORK_S = 900.0
"""Seconds that a command may take which copies, unpacks or reads whole files."""

_DROPPED = 255
_HINT = "Try: ssh {0} true   It must work without a question; keys and names go into ~/.ssh/config."
_STRANGER = (
    "Its key is not known here, or is another than before. Make sure that it is your device; then, if it was set up "
    "anew, ssh-keygen -R {1}, and connect once by hand: ssh {0} true"
)
_SILENT = "It is reached, but does nothing. See what it does with: ssh {0} uptime"
_STRANGE = (
    "A command for sh must answer there, and nothing else in its place: try ssh {0} 'echo one; echo two'"
)
_FINAL = ("Host key verification failed", "Permission denied", "Could not resolve hostname")
"""What will not change by trying again."""


@dataclass(frozen=True)
class Destination:
    """A machine that is reached by ssh."""

    host: str
    user: str = ""
    port: int = 0

    @property
    def address(self) -> str:
        """As ssh takes it."""
        return f"{self.user}@{self.host}" if self.user else self.host


def parse_destination(url: str) -> Destination:
    """`ssh://user@host:22` -> its parts.

    Raises:
        ExportError: it is no such address; options and paths in disguise are refused.
    """
    found = _URL.fullmatch(url)
    if found is None or int(found["port"] or 22) not in range(1, 65536):
        raise ExportError(f"{url!r} is no address: expected ssh://user@host or ssh://user@host:port.")
    return Destination(host=found["host"].strip("[]"), user=found["user"] or "", port=int(found["port"] or 0))


class Connection:
    """Commands on the other machine, tried again when the line drops.

    Args:
        destination: Where.
        options: More options for ssh, such as ["-F", "config"].
        attempts: How often a command is tried while ssh itself fails.
        pause_s: Seconds before it is tried again.
    """

    def __init__(
        self,
        destination: Destination,
        *,
        options: Sequence[str] = (),
        attempts: int = 4,
        pause_s: float = 3.0,
    ) -> None:
        self.destination, self.attempts, self.pause_s = destination, attempts, pause_s
        self._command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]
        self._command += ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3", *options]
        # one connection carries all commands; a socket's path must be short
        self._sockets = tempfile.mkdtemp(prefix="ssh.")
        self._command += ["-o", "ControlMaster=auto", "-o", f"ControlPath={self._sockets}/s"]
        self._command += ["-o", "ControlPersist=60"]
        if destination.port:
            self._command += ["-p", str(destination.port)]
        self._command += ["--", destination.address]

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection that the commands shared."""
        if Path(self._sockets, "s").exists():
            # -O only talks to this machine's own process behind the socket
            command = [*self._command[:-2], "-O", "exit", *self._command[-2:]]
            with suppress(
                subprocess.TimeoutExpired
            ):  # it ends by itself when nothing has used it for a minute
                subprocess.run(command, capture_output=True, check=False, timeout=10)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def once(
        self, command: str, given: bytes = b"", *, most_bytes: int = ANSWER_BYTES, limit_s: float = ANSWER_S
    ) -> tuple[int, bytes, str]:
        """Run a command once: exit code, output, and the last line of its errors.

        Args:
            command: For the shell there.
            given: Its standard input.
            most_bytes: The longest output that is read.
            limit_s: How long it may take.

        Raises:
            ExportError: there is no ssh on this machine, or the other machine takes too long, says more than may be, or
                gives something else than an answer.
        """
        mark = secrets.token_hex(16)
        marked = f"printf '\\n%s<' {mark}; ({command}\n); c=$?; printf '>%s\\n' {mark}; exit $c"
        try:
            done = run_bounded(
                [*self._command, marked], given, most_bytes=most_bytes + GREETING_BYTES, limit_s=limit_s
            )
        except FileNotFoundError:
            raise ExportError("ssh is not installed.", "Install an ssh client (openssh-client).") from None
        except OSError as error:
            raise ExportError(f"ssh cannot be started: {error.strerror or error}.") from error
        address = self.destination.address
        if done.why == "time":
            raise ExportError(f"{address} gave no answer within {limit_s:g} s.", _SILENT.format(address))
        _, begun, rest = done.output.partition(f"{mark}<".encode())
        output, ended, _ = rest.rpartition(f">{mark}".encode())
        if done.why == "size" or len(output) > most_bytes:
            raise ExportError(
                f"{address} said more than {most_bytes >> 10} KB where a short answer was expected.",
                _STRANGE.format(address),
            )
        lines = [line for line in done.errors.decode("utf-8", errors="replace").splitlines() if line.strip()]
        last = short(plain(lines[-1]).strip(), 300) if lines else ""
        if done.code == 0 and not (begun and ended):
            said = short(plain(done.output.decode("utf-8", errors="replace")).strip(), 120)
            raise ExportError(
                f"{address} gave no answer that can be understood: {f'it said {said!r}' if said else 'it was empty'}.",
                _STRANGE.format(address),
            )
        return _DROPPED if done.code is None or done.code < 0 else done.code, output, last

    def run(
        self, command: str, given: bytes = b"", *, most_bytes: int = ANSWER_BYTES, limit_s: float = ANSWER_S
    ) -> bytes:
        """Run a command that may be repeated; its output.

        Args:
            command, given, most_bytes, limit_s: As `once`.

        Raises:
            ExportError: as `once`, the machine is not reached, or the command fails there.
        """
        for attempt in range(self.attempts):
            code, output, error = self.once(command, given, most_bytes=most_bytes, limit_s=limit_s)
            if code == 0:
                return output
            if code != _DROPPED:
                reason = error.replace("error: ", "", 1).rstrip(".") or f"a command ended with {code}"
                raise ExportError(f"{self.destination.address}: {reason}.")
            if any(text in error for text in _FINAL):
                break
            if attempt + 1 < self.attempts:
                time.sleep(self.pause_s)
        raise self.unreachable(error)

    def ask(self, command: str, expected: str, *, limit_s: float = ANSWER_S) -> re.Match[str]:
        """Run a command that may be repeated, and match its answer as a whole.

        Args:
            command, limit_s: As `once`.
            expected: A regular expression of ASCII.

        Raises:
            ExportError: as `run`, or the answer is another.
        """
        text = self.run(command, limit_s=limit_s).decode("utf-8", errors="replace").strip()
        found = re.fullmatch(expected, text, re.ASCII)
        if found is None:
            address = self.destination.address
            raise ExportError(
                f"{address} gave no answer that can be understood: it said {short(plain(text), 120)!r}.",
                _STRANGE.format(address),
            )
        return found

    def unreachable(self, error: str) -> ExportError:
        """The message for a machine that ssh does not reach."""
        address, host = self.destination.address, self.destination.host
        known = f"[{host}]:{self.destination.port}" if self.destination.port else host
        hint = _STRANGER if "Host key verification failed" in error else _HINT
        return ExportError(
            f"{address} is not reached: {(error or 'ssh gave no reason').rstrip('.')}.",
            hint.format(address, known),
        )

    def size(self, name: str) -> int:
        """Bytes of a file there; 0 where there is none."""
        quoted = shlex.quote(name)
        command = f"if [ -f {quoted} ]; then wc -c <{quoted}; else echo 0; fi"
        return int(self.ask(command, r"\d{1,15}")[0])

    def put(self, content: bytes, name: str, say: Callable[[str], None]) -> None:
        """Copy bytes to a file there, going on where an earlier copy broke.

        Raises:
            ExportError: the machine is not reached, its disk is full, or what arrived is not what was sent.
        """
        digest, quoted = sha256_bytes(content), shlex.quote(name)
        part = shlex.quote(f"{name}.{digest[:16]}.part")
        check = f'[ -f {quoted} ] && [ "$(sha256sum <{quoted} | cut -c 1-64)" = {digest} ] && echo same || echo other'
        if self.ask(check, "same|other", limit_s=WORK_S)[0] == "same":
            return
        sent = min(self.size(f"{name}.{digest[:16]}.part"), len(content))
        failures = 0
        while sent < len(content):
            say(f"copying {name}: {sent * 100 // len(content)} % of {len(content) / 1e6:.1f} MB")
            code, _, error = self.once(f"cat >>{part}", content[sent : sent + CHUNK], limit_s=WORK_S)
            if code not in (0, _DROPPED):
                raise ExportError(
                    f"{self.destination.address}: {name} cannot be written: {error}.",
                    f"Make room there; the folder ~/{HOME} is ours and may be deleted.",
                )
            before, sent = sent, self.size(f"{name}.{digest[:16]}.part")
            failures = failures + 1 if code or sent <= before else 0
            if failures >= self.attempts:
                raise self.unreachable(error or "what is copied there does not stay")
            if code:
                time.sleep(self.pause_s)
        if self.ask(f"sha256sum <{part} | cut -c 1-64", r"\w{64}", limit_s=WORK_S)[0] != digest:
            self.run(f"rm -f {part}")
            raise ExportError(f"{name} arrived damaged at {self.destination.address}.", "Try again.")
        self.run(f"mv {part} {quoted}")

    def get(self, name: str, say: Callable[[str], None]) -> bytes:
        """The bytes of a file there.

        Raises:
            ExportError: the machine is not reached, the file is larger than `LARGEST_FILE`, or what arrived is not what
                lies there.
        """
        quoted, content = shlex.quote(name), bytearray()
        wanted = self.size(name)
        if wanted > LARGEST_FILE:
            raise ExportError(
                f"{name} on {self.destination.address} has {wanted / 1e9:.1f} GB; more than "
                f"{LARGEST_FILE >> 20} MB is not fetched."
            )
        digest = self.ask(f"sha256sum <{quoted} | cut -c 1-64", r"\w{64}", limit_s=WORK_S)[0]
        while len(content) < wanted:
            say(f"fetching {name}: {len(content) * 100 // wanted} % of {wanted / 1e6:.1f} MB")
            piece = self.run(
                f"tail -c +{len(content) + 1} {quoted} | head -c {CHUNK}", most_bytes=CHUNK, limit_s=WORK_S
            )
            if not piece:  # it has become shorter meanwhile
                break
            content += piece
        if sha256_bytes(bytes(content)) != digest:
            raise ExportError(f"{name} arrived damaged from {self.destination.address}.", "Try again.")
        return bytes(content)
