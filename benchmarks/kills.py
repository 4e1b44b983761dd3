"""Runs that are stopped at many instants and resumed: do they end as one that was left alone?

    python -m benchmarks.kills                     # 100 instants with SIGKILL, then 12 with SIGINT and SIGTERM

One run is recorded: every file that it writes, replaces or removes in its folder and every process that it starts is
an instant, and so is the middle of every longer pause between two of them. Instants of all stages are drawn evenly,
most of them in export, measure and report, and in `compress export`, `measure` and `report` afterwards. At each, the
process is stopped in a copy of the run, the command is given again (a run with --resume), and what then lies in the
folder is compared with the run that was left alone: file by file, and the manifest field by field.

What is not compared, as it differs between any two runs: times of day and durations, TensorBoard's curves, and the
contents (not the presence) of report.html and of checkpoints/*.pt, which hold such times. Networks are really timed, in
their own processes; the numbers are then replaced by the sizes of the files, as noise would decide otherwise, and the
table that was measured at the start is not checked again later.

Stopped instants are saved as they come; a second call goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

SHARES = {
    "prepare": 4, "begin": 6, "search": 14, "probe": 10, "finetune": 10, "export": 18, "measure": 12, "report": 10,
    "compress export": 8, "compress measure": 4, "compress report": 4,
}  # fmt: skip
"""Instants of each stage, of 100."""

PAUSE_S = 0.25
"""Between two events that are further apart there is one more instant."""

VARYING = {"started", "finished", "seconds", "timing", "report.html"}
"""Fields of the manifest that differ between any two runs."""

MARK = "COMPRESSOR_KILLS_CASE"
"""Environment variable by which the processes of a case are found."""

LIMIT_S = 600.0


@dataclass(frozen=True)
class Instant:
    """When a command is stopped: so long after the event of this number in a visit of a stage."""

    command: str
    stage: str
    visit: int
    number: int
    delay_s: float
    what: str

    @property
    def group(self) -> str:
        return self.stage if self.command == "run" else self.command


def network(num_classes: int = 10) -> Any:
    """A few convolutions with a residual addition."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(16, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)
            self.conv2, self.bn2 = nn.Conv2d(32, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)

        def forward(self, x: Any) -> Any:
            inner = self.bn1(self.conv1(x)).relu()
            return (x + self.bn2(self.conv2(inner))).relu()

    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))
    return nn.Sequential(stem, Block(), head)


def arguments_of(command: str, run: Path, again: bool = False) -> list[str]:
    """What is given to `compress`, the first time or again."""
    if command != "run":
        extra = ["--precision", "int8", "--max-drop", "99"] if command == "compress export" else []
        return [command.removeprefix("compress "), str(run), *extra]
    if again and (run / "recipe.yaml").exists():
        return ["--resume", str(run)]
    return [
        "--model", "benchmarks.kills:network", "--epochs", "2", "--latency", "70%", "--flops", "80%",
        "--out", str(run), "--set", "search.max_evaluations=6", "--set", "search.batch_norm_batches=1",
        "--set", "contract.repeats=1", "--set", "contract.max_rounds=3", "--set", "export.engine=false",
    ]  # fmt: skip


class Watch:
    """Counts the events of a process by stages, writes them down, and stops the process at an instant.

    Args:
        root: The run's folder.
        log: Where events go, one JSON object a line.
        instant, number: When the process is stopped, and by which signal.
    """

    def __init__(self, root: Path, log: Path | None, instant: Instant | None, number: int) -> None:
        self._root, self._instant, self._signal = str(root), instant, number
        self._log = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND) if log is not None else None
        self._visits: Counter[str] = Counter(prepare=1)
        self._stage, self._number = "prepare", 0

    def install(self) -> None:
        from compressor.run.folder import RunFolder

        plain, watch = RunFolder.stage, self

        def stage(run: RunFolder, name: str, *rest: Any, again: bool = False, **options: Any) -> Any:
            if again or not run.finished(name):
                watch._visits[name] += 1
                watch._stage, watch._number = name, 0  # what comes after a stage counts as its own
            return plain(run, name, *rest, again=again, **options)

        RunFolder.stage = stage  # type: ignore[method-assign, assignment]
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        what = self._what(event, arguments)
        if what is None:
            return
        self._number += 1
        here = (self._stage, self._visits[self._stage], self._number)
        if self._log is not None:
            entry = dict(zip(("stage", "visit", "number"), here, strict=True), what=what, at=time.monotonic())
            os.write(self._log, json.dumps(entry).encode() + b"\n")
        aim = self._instant
        if aim is not None and (aim.stage, aim.visit, aim.number) == here:
            self._instant = None
            if aim.delay_s == 0:
                os.kill(os.getpid(), self._signal)
            else:
                threading.Thread(target=self._later, args=(aim.delay_s,), daemon=True).start()

    def _later(self, delay_s: float) -> None:
        time.sleep(delay_s)
        os.kill(os.getpid(), self._signal)

    def _what(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        """The event in words, where it changes the run's folder or starts a process."""
        if event == "subprocess.Popen":
            return "starts a process"
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return None
        word = {"open": "opens", "os.rename": "replaces", "os.mkdir": "makes", "os.remove": "removes"}.get(event)
        if word is None or not isinstance(arguments[0], (str, os.PathLike)):
            return None
        path = os.fspath(arguments[1] if event == "os.rename" else arguments[0])
        if not str(path).startswith(self._root):
            return None
        name = os.path.relpath(path, self._root)
        return f"{word} {name.split('.')[1] if os.path.basename(name).startswith('.') else name}"


def sizes_as_times() -> None:
    """Time networks as ever, then let the sizes of their files stand for the times, so that noise decides nothing."""
    from compressor.latency import local

    really = local.measured

    def measured(dense: Path, slim: Path, *rest: Any) -> Any:
        timed = really(dense, slim, *rest)
        sizes = [path.stat().st_size / 1e5 for path in (dense, slim)]
        whole, small = (
            replace(
                stats, runs=1, **{each.name: size for each in fields(stats) if each.name.endswith("_ms")}
            )
            for size, stats in zip(sizes, (timed.dense, timed.slim), strict=True)
        )
        share = sizes[1] / sizes[0]
        known = {"value": share, "low": share, "high": share, "dense_ms": sizes[0]}
        ratio = replace(timed.ratio, **known, bursts=2, sessions=1, undisturbed=1.0, seconds=0.0)
        return replace(timed, dense=whole, slim=small, ratio=ratio)

    local.measured = measured  # type: ignore[assignment]


def started(arguments: Sequence[str], folder: Path, case: str, watch: Watch | None) -> int:
    """Run `compress` in a fork of this process, which has everything imported; its process number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.environ[MARK] = case
    os.chdir(folder)
    said = os.open(folder / "said.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, goal in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(source, goal)
    from compressor.cli.app import main
    from compressor.latency import measured, sampling

    sampling.MAX_SPREAD = 5.0  # a busy machine will do: its times decide nothing here
    measured.still_valid = lambda *_: True  # type: ignore[assignment]
    sizes_as_times()
    if watch is not None:
        watch.install()
    sys.argv = ["compress", *arguments]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # libraries that were imported before the fork do not survive Python's own end


def ended(pid: int) -> int:
    """Wait for a process: its exit code, or a signal's number below zero."""
    ends = time.monotonic() + LIMIT_S
    while time.monotonic() < ends:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 124


def survivors(case: str, patience_s: float = 20.0) -> int:
    """Processes of a case that still run after a while."""
    ends, mark = time.monotonic() + patience_s, f"{MARK}={case}".encode()
    while True:
        left = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if _has(pid, mark)]
        if not left or time.monotonic() > ends:
            return len(left)
        time.sleep(0.1)


def _has(pid: str, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") and int(pid) != os.getpid()
    except OSError:
        return False


def state(run: Path) -> dict[str, Any]:
    """What lies in a run's folder, in a form in which two runs can be compared."""
    found: dict[str, Any] = {}
    for path in sorted(each for each in run.rglob("*") if each.is_file()):
        name = str(path.relative_to(run))
        if name.startswith("search/curves") or name == ".lock":
            continue
        if name == "manifest.json":
            found.update(_flat(json.loads(path.read_text(encoding="utf-8")), "manifest"))
        elif name.endswith(".jsonl"):
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found.update(_flat(lines, name))
        elif name == "report.html" or name.endswith(".pt"):
            found[name] = "there"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in value:
            if key not in VARYING:
                yield from _flat(value[key], f"{name}.{key}")
        yield name, sorted(value)
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from _flat(each, f"{name}[{place}]")
        yield name, len(value)
    else:
        yield name, value


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of what is not the same."""
    return sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))


def recorded(command: str, base: Path | None, folder: Path) -> tuple[list[Instant], dict[str, Any], int]:
    """A command that is left alone: its instants, what it leaves, and its exit code."""
    done = folder / "recorded.json"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run = folder / "run"
        if base is not None:
            shutil.copytree(base, run)
        watch = Watch(run, folder / "events.jsonl", None, 0)
        code = ended(started(arguments_of(command, run), folder, f"{command}-alone", watch))
        if code not in (0, 3):
            raise SystemExit(f"The command ended with {code}: {(folder / 'said.txt').read_text()}")
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        found = []
        for event, later in itertools.zip_longest(events, events[1:]):
            fields_ = [event[name] for name in ("stage", "visit", "number")]
            found.append(Instant(command, *fields_, 0.0, f"before it {event['what']}"))
            gap = (later["at"] if later else event["at"]) - event["at"]
            if gap > PAUSE_S:
                found.append(Instant(command, *fields_, round(gap / 2, 3), f"while it works after it {event['what']}"))
        kept = {"instants": [asdict(each) for each in found], "state": state(run), "code": code}
        done.write_text(json.dumps(kept))
    kept = json.loads(done.read_text())
    return [Instant(**each) for each in kept["instants"]], kept["state"], kept["code"]


def drawn(instants: Sequence[Instant], total: int) -> list[Instant]:
    """Instants of all stages, evenly spread within each."""
    found: list[Instant] = []
    for group, share in SHARES.items():
        own = [each for each in instants if each.group == group]
        count = min(len(own), max(1, round(share * total / 100)))
        found += [own[int((place + 0.5) * len(own) / count)] for place in range(count)]
    return found


def one(
    instant: Instant, number: int, base: Path | None, alone: tuple[dict[str, Any], int], folder: Path
) -> dict[str, Any]:
    """Stop a command at an instant, give it again, and compare."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = folder / "run"
    if base is not None:
        shutil.copytree(base, run)
    begun = time.monotonic()
    watch = Watch(run, None, instant, number)
    code = ended(started(arguments_of(instant.command, run), folder, folder.name, watch))
    said = (folder / "said.txt").read_text(errors="replace")
    left = survivors(folder.name)
    wanted = -number if number == signal.SIGKILL else 128 + number
    met = code == wanted
    problems = [] if met or code == alone[1] else [f"ended with {code}, expected {wanted}"]
    if number != signal.SIGKILL and met:
        problems += ["traceback"] if "Traceback" in said else []
        problems += [] if "Stopped." in said else ["does not say that it was stopped"]
    problems += [f"{left} processes survived"] if left else []
    again = ended(started(arguments_of(instant.command, run, again=True), folder, f"{folder.name}-again", None))
    if again != alone[1]:
        last = (folder / "said.txt").read_text(errors="replace").strip().splitlines()[-2:]
        problems.append(f"given again it ended with {again}, expected {alone[1]}: {' '.join(last)}")
    found = differences(state(run), alone[0])
    row = {
        **asdict(instant), "signal": signal.Signals(number).name, "met": met, "differences": found,
        "problems": problems, "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip
    if not found and not problems:
        shutil.rmtree(folder)
    return row


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print what was found, stage by stage."""
    table = Table(title="Stopped and given again")
    for name in ("stage", "signal", "instants", "stopped there", "differences", "other problems", "s each"):
        table.add_column(name, justify="left" if name in ("stage", "signal") else "right")
    groups = {
        (row["stage"] if row["command"] == "run" else row["command"], row["signal"]): None for row in rows
    }
    for group, name in groups:
        own = [
            row for row in rows
            if (row["stage"] if row["command"] == "run" else row["command"], row["signal"]) == (group, name)
        ]  # fmt: skip
        table.add_row(
            group, name, str(len(own)), str(sum(row["met"] for row in own)),
            str(sum(bool(row["differences"]) for row in own)), str(sum(bool(row["problems"]) for row in own)),
            f"{sum(row['seconds'] for row in own) / len(own):.1f}",
        )  # fmt: skip
    console.print(table)
    for row in rows:
        if row["differences"] or row["problems"]:
            where = f"{row['command']}, {row['stage']} {row['visit']}, {row['what']}"
            console.print(f"{row['signal']} in {where}: {row['problems']} {row['differences'][:8]}", markup=False)
    console.print(
        f"{sum(row['met'] for row in rows)} of {len(rows)} were stopped at their instant; "
        f"{sum(bool(row['differences']) for row in rows)} differences, "
        f"{sum(bool(row['problems']) for row in rows)} other problems"
    )


def warm_up() -> None:
    """Import once, before any fork, what every run imports; no thread may start here, as a fork has none of them."""
    from importlib import import_module

    import torch

    for name in (
        "cli", "run.pipeline", "report.page", "training.loop", "core.agents"
    ):
        import_module(f"compressor.{name}")
    for name in ("onnxruntime", "sklearn.datasets", "torchvision", "export.convert.to_onnx", "export.convert.parity"):
        import_module(name)
    torch.set_num_threads(1)


def _work(
    places: range,
    cases: Sequence[tuple[Instant, int]],
    files: Sequence[Path],
    base: Path,
    alone: dict[str, tuple[dict[str, Any], int]],
    out: Path,
) -> NoReturn:
    """Run cases in a forked process, and end it without the handlers that wait for the parent's threads."""
    try:
        for place in places:
            if not files[place].exists():
                instant, number = cases[place]
                of = None if instant.command == "run" else base
                row = one(instant, number, of, alone[instant.command], out / f"case-{place:03d}")
                files[place].write_text(json.dumps(row))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instants", type=int, default=100, help="stopped with SIGKILL")
    parser.add_argument("--gently", type=int, default=12, help="stopped with SIGINT and SIGTERM in turns")
    parser.add_argument("--workers", type=int, default=2, help="cases side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    options = parser.parse_args()
    out: Path = options.out.resolve()
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    os.environ["COMPRESSOR_CACHE"] = str(out / "cache")
    out.mkdir(parents=True, exist_ok=True)
    warm_up()
    console = Console(width=130)
    instants: list[Instant] = []
    alone: dict[str, tuple[dict[str, Any], int]] = {}
    base = out / "alone-run" / "run"
    recorded("run", None, out / "first")  # fills the cache: the table of a machine is measured once
    for command in ("run", "compress export", "compress measure", "compress report"):
        place = out / f"alone-{command.replace('compress ', '')}"
        own, left, code = recorded(command, None if command == "run" else base, place)
        instants += own
        alone[command] = left, code
    kills = [(each, signal.SIGKILL) for each in drawn(instants, options.instants)]
    signals = itertools.cycle((signal.SIGINT, signal.SIGTERM))
    gentle = [(each, next(signals)) for each in drawn(instants, options.gently)] if options.gently else []
    (out / "rows").mkdir(exist_ok=True)
    cases = [*kills, *gentle]
    files = [out / "rows" / f"{place:03d}.json" for place in range(len(cases))]
    workers = []
    for worker in range(options.workers):
        pid = os.fork()
        if not pid:
            _work(range(worker, len(cases), options.workers), cases, files, base, alone, out)
        workers.append(pid)
    failed = [pid for pid in workers if os.waitpid(pid, 0)[1]]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(workers)} workers failed; the cases they finished are saved.")
    rows = [json.loads(file.read_text()) for file in files if file.exists()]
    path = out / "table.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows, console)
    console.print(f"Saved {path}")


if __name__ == "__main__":
    main()
