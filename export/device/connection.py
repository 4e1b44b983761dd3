"""Commands and file transfers over ssh, with retries when the connection drops.

This machine needs only `ssh`, the other one a shell and coreutils. All steps can be repeated: an interrupted copy
resumes at the byte where it stopped.

The other machine is not trusted. Two marks delimit the output of a command, so that text from the shell's start-up
files is ignored; bytes and time are limited while the output is read, and it is shown without control characters.
"""

from __future__ import annotations

import os
import re
import secrets
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

from export.errors import ExportError
from export.files import sha256_bytes
from export.text import plain, short

_URL = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z_][A-Za-z0-9._-]*)@)?"
    r"(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?/?"
)
HOME = ".cache/compressor-bundles"
"""Folder of the bundles on the other machine, relative to the user's home."""

CHUNK = 1 << 20
"""Bytes that one command copies at most."""

LARGEST_FILE = 1 << 30
"""Maximum bytes of a fetched file; results of a device usually take tens of megabytes."""

ANSWER_BYTES = 1 << 16
"""Default limit on the output of a command in bytes."""

GREETING_BYTES = 1 << 16
"""Maximum bytes that a shell's start-up files may print before and after the output of a command."""

ANSWER_S = 60.0
"""Default limit on the duration of a command in seconds."""

WORK_S = 900.0
"""Limit on the duration of a command that copies, unpacks or reads whole files, in seconds."""

_DROPPED = 255
_PIECE = 1 << 16
_LAST_WORDS = 1 << 14
_LINGER_S = 1.0
_HINT = "Try: ssh {0} true   It must work without a prompt; configure keys and host names in ~/.ssh/config."
_STRANGER = (
    "Its host key is unknown or has changed. Make sure that it is your device; if it was reinstalled, run "
    "ssh-keygen -R {1}, and connect once by hand: ssh {0} true"
)
_SILENT = "The machine may be overloaded. Check it with: ssh {0} uptime"
_STRANGE = (
    "The login shell must run commands of sh and print nothing else. Test it with: ssh {0} 'echo one; echo two'"
)
_FINAL = ("Host key verification failed", "Permission denied", "Could not resolve hostname")
"""Errors that a retry cannot fix."""


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: Its exit code, negative for a signal; None if `run_bounded` stopped it.
        output: Its standard output, at most `most_bytes`.
        errors: The last 16 KiB of its standard error.
        why: "", or the limit that stopped it: "time" or "size".
    """

    code: int | None
    output: bytes
    errors: bytes
    why: str


def run_bounded(command: Sequence[str], given: bytes, *, most_bytes: int, limit_s: float) -> Ended:
    """Run a command in its own process group, which is killed when it writes too much or takes too long.

    Args:
        command: The program and its arguments; no shell.
        given: Its standard input.
        most_bytes: Limit on its standard output. Only the end of standard error is kept.
        limit_s: Limit on its duration in seconds.

    Raises:
        OSError: the program cannot be started.
    """
    deadline = time.monotonic() + limit_s
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    try:
        return _exchange(process, given, most_bytes, deadline)
    finally:
        # also after Ctrl-C, which does not reach a group in its own session
        _kill(process)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _exchange(process: subprocess.Popen[bytes], given: bytes, most_bytes: int, deadline: float) -> Ended:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors, left, reading = bytearray(), bytearray(), memoryview(given), 2
    with selectors.DefaultSelector() as selector:
        for pipe, events in (
            (process.stdin, selectors.EVENT_WRITE),
            (process.stdout, selectors.EVENT_READ),
            (process.stderr, selectors.EVENT_READ),
        ):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, events)
        while reading:
            if process.poll() is not None:
                # its output is in the pipes; a child process that it left may keep them open
                deadline = min(deadline, time.monotonic() + _LINGER_S)
            wait = deadline - time.monotonic()
            if wait <= 0:
                break
            for key, _ in selector.select(min(wait, 0.1)):
                if key.fileobj is process.stdin:
                    try:
                        left = left[os.write(key.fd, left[:_PIECE]) :] if left else left
                    except BrokenPipeError:
                        left = left[:0]
                    if not left:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                piece = os.read(key.fd, _PIECE)
                if not piece:
                    selector.unregister(key.fileobj)
                    reading -= 1
                elif key.fileobj is process.stdout:
                    output += piece
                    if len(output) > most_bytes:
                        return Ended(None, bytes(output[:most_bytes]), bytes(errors), "size")
                else:
                    errors += piece
                    del errors[:-_LAST_WORDS]
    try:
        code = process.wait(max(deadline - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        return Ended(None, bytes(output), bytes(errors), "time")
    return Ended(code, bytes(output), bytes(errors), "")


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True)
class Destination:
    """The address of a machine for ssh."""

    host: str
    user: str = ""
    port: int = 0

    @property
    def address(self) -> str:
        """The address in ssh's format."""
        return f"{self.user}@{self.host}" if self.user else self.host


def parse_destination(url: str) -> Destination:
    """`ssh://user@host:22` -> its parts.

    Raises:
        ExportError: it is no such address; options and paths in disguise are refused.
    """
    found = _URL.fullmatch(url)
    if found is None or int(found["port"] or 22) not in range(1, 65536):
        raise ExportError(f"{url!r} is not an ssh address: expected ssh://user@host or ssh://user@host:port.")
    return Destination(host=found["host"].strip("[]"), user=found["user"] or "", port=int(found["port"] or 0))


class Connection:
    """Runs commands on the other machine; retries when the connection drops.

    Args:
        destination: The other machine.
        options: More options for ssh, such as ["-F", "config"].
        attempts: Maximum number of tries while ssh itself fails.
        pause_s: Seconds between tries.
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
        # all commands share one connection; the path of a socket must be short
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
            # -O talks only to the local process behind the socket
            command = [*self._command[:-2], "-O", "exit", *self._command[-2:]]
            with suppress(subprocess.TimeoutExpired):  # it ends by itself after a minute without use
                subprocess.run(command, capture_output=True, check=False, timeout=10)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def once(
        self, command: str, given: bytes = b"", *, most_bytes: int = ANSWER_BYTES, limit_s: float = ANSWER_S
    ) -> tuple[int, bytes, str]:
        """Run a command once; return its exit code, its output, and the last line of its errors.

        Args:
            command: For the shell of the other machine.
            given: Its standard input.
            most_bytes: Limit on its output.
            limit_s: Limit on its duration in seconds.

        Raises:
            ExportError: ssh is not installed, or the other machine exceeds a limit or sends output without the marks.
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
            raise ExportError(f"{address} did not answer within {limit_s:g} s.", _SILENT.format(address))
        _, begun, rest = done.output.partition(f"{mark}<".encode())
        output, ended, _ = rest.rpartition(f">{mark}".encode())
        if done.why == "size" or len(output) > most_bytes:
            raise ExportError(
                f"{address} sent more than {most_bytes >> 10} KB where a short answer was expected.",
                _STRANGE.format(address),
            )
        lines = [line for line in done.errors.decode("utf-8", errors="replace").splitlines() if line.strip()]
        last = short(plain(lines[-1]).strip(), 300) if lines else ""
        if done.code == 0 and not (begun and ended):
            said = short(plain(done.output.decode("utf-8", errors="replace")).strip(), 120)
            raise ExportError(
                f"{address} sent an unexpected answer: {repr(said) if said else 'it was empty'}.",
                _STRANGE.format(address),
            )
        return _DROPPED if done.code is None or done.code < 0 else done.code, output, last

    def run(
        self, command: str, given: bytes = b"", *, most_bytes: int = ANSWER_BYTES, limit_s: float = ANSWER_S
    ) -> bytes:
        """Run a command that may be repeated; return its output.

        Args:
            command, given, most_bytes, limit_s: As in `once`.

        Raises:
            ExportError: as `once`, or the machine cannot be reached, or the command fails.
        """
        for attempt in range(self.attempts):
            code, output, error = self.once(command, given, most_bytes=most_bytes, limit_s=limit_s)
            if code == 0:
                return output
            if code != _DROPPED:
                reason = error.replace("error: ", "", 1).rstrip(".") or f"a command failed with exit code {code}"
                raise ExportError(f"{self.destination.address}: {reason}.")
            if any(text in error for text in _FINAL):
                break
            if attempt + 1 < self.attempts:
                time.sleep(self.pause_s)
        raise self.unreachable(error)

    def ask(self, command: str, expected: str, *, limit_s: float = ANSWER_S) -> re.Match[str]:
        """Run a command that may be repeated, and match all of its output.

        Args:
            command, limit_s: As in `once`.
            expected: A regular expression, matched as ASCII.

        Raises:
            ExportError: as `run`, or the output does not match.
        """
        text = self.run(command, limit_s=limit_s).decode("utf-8", errors="replace").strip()
        found = re.fullmatch(expected, text, re.ASCII)
        if found is None:
            address = self.destination.address
            raise ExportError(
                f"{address} sent an unexpected answer: {short(plain(text), 120)!r}.",
                _STRANGE.format(address),
            )
        return found

    def unreachable(self, error: str) -> ExportError:
        """The error for a machine that ssh cannot reach."""
        address, host = self.destination.address, self.destination.host
        known = f"[{host}]:{self.destination.port}" if self.destination.port else host
        hint = _STRANGER if "Host key verification failed" in error else _HINT
        return ExportError(
            f"{address} cannot be reached: {(error or 'ssh gave no reason').rstrip('.')}.",
            hint.format(address, known),
        )

    def size(self, name: str) -> int:
        """Size of a file on the other machine in bytes; 0 if it does not exist."""
        quoted = shlex.quote(name)
        command = f"if [ -f {quoted} ]; then wc -c <{quoted}; else echo 0; fi"
        return int(self.ask(command, r"\d{1,15}")[0])

    def put(self, content: bytes, name: str, say: Callable[[str], None]) -> None:
        """Copy bytes to a file on the other machine; an interrupted copy is resumed.

        Raises:
            ExportError: the machine cannot be reached, its disk is full, or the checksum does not match.
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
                    f"Free some space there; the folder ~/{HOME} may be deleted.",
                )
            before, sent = sent, self.size(f"{name}.{digest[:16]}.part")
            failures = failures + 1 if code or sent <= before else 0
            if failures >= self.attempts:
                raise self.unreachable(error or "the copied bytes are lost")
            if code:
                time.sleep(self.pause_s)
        if self.ask(f"sha256sum <{part} | cut -c 1-64", r"\w{64}", limit_s=WORK_S)[0] != digest:
            self.run(f"rm -f {part}")
            raise ExportError(f"{name} arrived damaged at {self.destination.address}.", "Try again.")
        self.run(f"mv {part} {quoted}")

    def get(self, name: str, say: Callable[[str], None]) -> bytes:
        """Fetch the bytes of a file from the other machine.

        Raises:
            ExportError: the machine cannot be reached, the file is larger than `LARGEST_FILE`, or the checksum does not
                match.
        """
        quoted, content = shlex.quote(name), bytearray()
        wanted = self.size(name)
        if wanted > LARGEST_FILE:
            raise ExportError(
                f"{name} on {self.destination.address} has {wanted / 1e9:.1f} GB; at most "
                f"{LARGEST_FILE >> 20} MB are fetched."
            )
        digest = self.ask(f"sha256sum <{quoted} | cut -c 1-64", r"\w{64}", limit_s=WORK_S)[0]
        while len(content) < wanted:
            say(f"fetching {name}: {len(content) * 100 // wanted} % of {wanted / 1e6:.1f} MB")
            piece = self.run(
                f"tail -c +{len(content) + 1} {quoted} | head -c {CHUNK}", most_bytes=CHUNK, limit_s=WORK_S
            )
            if not piece:  # the file became shorter in the meantime
                break
            content += piece
        if sha256_bytes(bytes(content)) != digest:
            raise ExportError(f"{name} arrived damaged from {self.destination.address}.", "Try again.")
        return bytes(content)
