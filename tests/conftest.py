"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from compressor.core import progress
from tests.archives import SAFELY

# Several files are tested side by side, and on tiny networks a second thread of torch costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data and checkpoints beside the project; tests that need it skip where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("COMPRESSOR_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip("the folder with real data is not beside the project")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep measured tables of the tests out of the user's cache."""
    os.environ["COMPRESSOR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _short_bursts() -> Iterator[None]:
    """Time two networks for a moment: what the tests assert of real times holds after the fewest pairs of bursts."""
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("SHORTEST_S", "LONGEST_S"):
            patch.setattr(f"compressor.latency.paired.{limit}", 0.1)
        patch.setattr("compressor.latency.backends.cpu.WARM_UP_S", 0.05)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_repeated_work() -> Iterator[None]:
    """Parse the embedded digits once, and leave it to the system when files reach the disk: no test ends a machine."""
    from sklearn import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_digits", cache(datasets.load_digits))
        patch.setattr(os, "fsync", lambda _: None)
        yield


STARTED = ("test_cpu.py", "test_workers.py")
"""Files whose child processes are started as users' are: those about such processes."""


@pytest.fixture(scope="session")
def _child_processes() -> tuple[Any, Any]:
    """What starts a child process, and what forks one."""
    import subprocess
    from types import SimpleNamespace

    from tests.forked import ForkedChild

    needed = {name: getattr(subprocess, name) for name in ("PIPE", "TimeoutExpired")}
    return subprocess, SimpleNamespace(Popen=ForkedChild, **needed)


@pytest.fixture(scope="module", autouse=True)
def _forked_children(request: pytest.FixtureRequest, _child_processes: tuple[Any, Any]) -> Iterator[None]:
    """Fork the children of a run from a process that has imported torch, which takes most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.core.processes.subprocess", _child_processes[request.path.name not in STARTED])
        yield


@pytest.fixture
def started_children(_child_processes: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start child processes as users' are."""
    monkeypatch.setattr("compressor.core.processes.subprocess", _child_processes[0])


@pytest.fixture
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a busy machine measure its tables all the same."""
    monkeypatch.setattr("compressor.latency.sampling.MAX_SPREAD", 5.0)


FIGURES = ("page.tradeoff", "plots.layer_bars", "plots.reward_curve", "plots.candidate_scatter", "plots.training_curve")

MEASURED = "compressor.latency.local.measured"
"""What times two networks on this machine's CPU; `tests/run` makes up the times."""


@pytest.fixture(scope="session", autouse=True)
def _originals() -> dict[str, Any]:
    """What tests replace in most modules, before any of them does."""
    return {name: resolve_name(name) for name in (MEASURED, *(f"compressor.report.{each}" for each in FIGURES))}


DRAWN = ("test_pipeline.py",)
"""Files beside the report's own whose runs draw the figures of their reports."""


@pytest.fixture(scope="module", autouse=True)
def _no_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Write reports without figures, which take a fifth of a small run's time."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "report" and request.path.name not in DRAWN:
            for name in FIGURES:
                patch.setattr(f"compressor.report.{name}", lambda *_: None)
        yield


NOISE_GUARDED = ("test_sampling.py", "test_contract.py")
"""Files whose tests keep the noise guard: those of the guard, and of the main path on made-up devices, whose times
do not depend on the load of this machine."""


@pytest.fixture(autouse=True)
def _noise_guard(request: pytest.FixtureRequest) -> None:
    if request.path.name not in NOISE_GUARDED:
        request.getfixturevalue("busy_machine")


@pytest.fixture(scope="session")
def cifar_jpegs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of CIFAR-10 as JPEG files: of each class 40 images in train/ and 200 in test/."""
    import tarfile

    folder = tmp_path_factory.mktemp("cifar10-jpeg")
    with tarfile.open(shared_data / "cifar10-jpeg.tar.xz") as archive:
        for member in archive:
            split, *rest = member.name.split("/")
            if len(rest) == 2 and int(rest[1].partition(".")[0]) < {"train": 40, "test": 200}[split]:
                archive.extract(member, folder, **SAFELY)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, _originals: dict[str, Any]) -> Path:
    """A finished run within two counted budgets, with an engine where one can be built; its times are real."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    from compressor import run_recipe
    from tests.runs import recipe

    with pytest.MonkeyPatch.context() as patch:
        for name, original in _originals.items():
            patch.setattr(name, original)
        result = run_recipe(recipe(budgets={"flops": "60%", "params": "70%"}, export={}), out=folder)
    assert result.exit_code == 0
    return folder


class _Silent:
    def advance(self, steps: int = 1, note: str = "") -> None:
        """Bars are not recorded."""


class _Listener:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def stage(self, text: str) -> None:
        """Stages are not recorded."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[_Silent]:
        yield _Silent()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that the user would have seen."""
    listener = _Listener()
    with progress.shown_on(listener):
        yield listener.lines
