"""A run's folder: its recipe, its manifest and the lock of the process that works on it."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from compressor.core.errors import CompressorError, Stopped
from compressor.core.files import disk_error, now, sha256_file, write_atomic
from compressor.core.front import FRONT, Front
from compressor.core.manifest import MANIFEST, Manifest, Stage
from compressor.core.processes import stopped
from compressor.core.progress import say, stage
from compressor.core.records import EPISODES, RECIPE, Checkpoint, EpisodeLog
from export.files import is_temporary_of, remove_temporaries

LOCK = ".lock"
_locks: weakref.WeakSet[RunFolder] = weakref.WeakSet()
"""Folders that this process has locked."""
Result = TypeVar("Result")

STAGES = {
    "begin": "Recording the dense network",
    "search": "Searching for the widths",
    "probe": "Measuring the plan",
    "finetune": "Building and training the slim network",
    "export": "Exporting the slim network",
    "measure": "Measuring the slim network",
    "report": "Writing the report",
}
"""Stage -> what it does, in the order of the main path; those of a search and its probe may come again."""


def refuse_changed(path: Path, manifest: Manifest) -> None:
    """Refuse a delivered file that is not the one that its run has written.

    Args:
        path: The file, in the run's folder.
        manifest: The run's manifest; without a checksum of the file nothing is refused.

    Raises:
        CompressorError: The checksums differ.
    """
    known = manifest.files.get(path.name)
    if known is not None and sha256_file(path) != known:
        again = f"run its recipe again: compress --recipe {path.parent / RECIPE}"
        if path.suffix == ".pt2" or path.name.count(".") > 1:  # model.int8.onnx, but not model.onnx
            again = "delete it and write it again: compress export RUN"
        raise CompressorError(
            f"{path} is not the file that the run has written: its checksum differs from that in {MANIFEST}.",
            f"Restore it, or {again}",
        )


def _require_writable(path: Path) -> None:
    whole = path.absolute()
    above = next(each for each in (whole, *whole.parents) if each.exists())
    if not above.is_dir():
        raise disk_error(path, NotADirectoryError(errno.ENOTDIR, f"{above} is a file"))
    if not os.access(above, os.W_OK | os.X_OK):
        raise disk_error(path, PermissionError(errno.EACCES, f"{above} is not writable"))


def refuse_front(path: Path) -> None:
    """Refuse a folder that holds the runs of several targets where one of them is needed.

    Raises:
        CompressorError: Names the folder of the first.
    """
    if (path / FRONT).is_file():
        names = [target.folder for target in Front.read_tolerant(path / FRONT).targets]
        hint = f"Give the folder of one: {path / names[0]}" if names else ""
        raise CompressorError(f"{path} holds the runs of several targets.", hint)


class RunFolder:
    """One run's folder: its recipe, its manifest, and the lock of the process that works on it.

    It is a context that ends with `close`. `save` writes the whole manifest; stages record there when they started and
    finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest()
        self.begun_before: frozenset[str] = frozenset()  # stages that an earlier process had begun
        self._lock: Any = None

    @classmethod
    def create(cls, path: Path, recipe_yaml: str) -> RunFolder:
        """Create a new folder with its recipe, and lock it.

        Raises:
            CompressorError: The folder exists and is not empty; its content is not changed.
        """
        cls.require_empty(path)
        run = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(path, error) from error
        run.lock()
        remove_temporaries(path)
        write_atomic(path / RECIPE, recipe_yaml)
        return run

    @staticmethod
    def require_empty(path: Path) -> None:
        """Raise an error if a path is not an empty folder, or none can be made there, before anything is computed."""
        if not path.exists() or (path.is_dir() and all(_before_the_recipe(each) for each in path.iterdir())):
            _require_writable(path)
            return
        if (path / RECIPE).exists():
            raise CompressorError(
                f"{path} is the folder of an earlier run.",
                f"Continue it: compress --resume {path}, or resume=True from Python; or choose another --out DIR.",
            )
        raise CompressorError(f"{path} exists and is not an empty folder.", "Choose another --out DIR.")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an earlier run's folder and lock it.

        Raises:
            CompressorError: The folder holds no run, another process works on it, or its manifest is damaged.
        """
        if not (path / RECIPE).is_file():
            raise CompressorError(
                f"{path} is not a run's folder: it has no {RECIPE}.", "Runs are under runs/ by default."
            )
        run = cls(path)
        run.lock()
        try:
            remove_temporaries(path)
            if (path / MANIFEST).exists():  # a run that was killed before its first write has none
                run.manifest = Manifest.read(path / MANIFEST)
                run.begun_before = frozenset(run.manifest.stages)
        except BaseException:
            run.close()
            raise
        return run

    @staticmethod
    def tidy(path: Path) -> None:
        """Remove the temporary files of killed processes from a run's folder, unless a process works on it now."""
        if (path / RECIPE).is_file():
            with suppress(CompressorError), RunFolder(path) as run:
                run.lock()
                remove_temporaries(path)

    def lock(self) -> None:
        """Lock the folder until `close`; the system releases the lock when the process dies."""
        try:
            # O_NONBLOCK: opening a FIFO in its place would block otherwise
            flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            self._lock = os.fdopen(os.open(self.path / LOCK, flags, 0o644), "r+b", buffering=0)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _locks.add(self)
        except BlockingIOError:
            raise CompressorError(
                f"Another process is working on {self.path}.",
                "Wait for it to end, or stop it, then try again.",
            ) from None
        except OSError as error:
            raise disk_error(self.path, error) from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def name(self) -> str:
        """Name of the run: that of its folder, however the path was given."""
        return self.path.resolve().name

    def file(self, name: str) -> Path:
        """Return a path inside the folder."""
        return self.path / name

    def checkpoint(self, name: str) -> Checkpoint:
        return Checkpoint(self.path / "checkpoints" / f"{name}.pt")

    def episodes(self) -> EpisodeLog:
        return EpisodeLog(self.path / EPISODES)

    def save(self) -> None:
        """Write the manifest."""
        self.manifest.write(self.path / MANIFEST)

    def note(self, text: str) -> None:
        """Print a sentence and add it to the run's notes, once."""
        if text not in self.manifest.notes:
            say(text)
            self.manifest.notes = [*self.manifest.notes, text]
            self.save()

    def warn(self, stage: str, text: str | None) -> None:
        """Print and record what went wrong in the training of a stage, in place of an earlier warning; None if nothing
        did."""
        known = self.manifest.warnings
        if text is not None:
            say(f"Warning: {text}")
            self.manifest.warnings = {**known, stage: text}
        elif stage in known:
            self.manifest.warnings = {name: found for name, found in known.items() if name != stage}

    def note_accuracy(self, **values: Any) -> None:
        """Set fields of the manifest's accuracy and write it."""
        self.manifest.accuracy = self.manifest.accuracy.model_copy(update=values)
        self.save()

    def finished(self, stage: str) -> bool:
        return self.manifest.finished(stage)

    def reopen(self, *stages: str) -> None:
        """Mark these stages as unfinished, and write the manifest with what else has changed: they will run again."""
        for name in stages:
            if name in self.manifest.stages:
                self._record(name, finished=None)
        self.save()

    def stage(
        self, name: str, work: Callable[[], Result], saved: Callable[[], Result] | None = None, *, again: bool = False
    ) -> Result:
        """Run a stage, or skip it if it has finished; the manifest records when it starts and finishes.

        Args:
            name: Name of the stage.
            work: The stage. What it changes in the manifest is written at its end, if it is not saved before.
            saved: Reads the result of the finished stage from the folder; None for a stage without a result.
            again: Whether to run a finished stage again.
        """
        if self.finished(name) and not again:
            return saved() if saved is not None else cast(Result, None)
        before = self.manifest.stages.get(name, Stage())
        spent, begun = before.seconds or 0.0, time.monotonic()
        self._record(name, started=before.started or now(), finished=None, seconds=spent)
        self.save()
        if name in STAGES:
            stage(f"{STAGES[name]} (stage {list(STAGES).index(name) + 1} of {len(STAGES)})")
        result = work()
        self._record(name, finished=now(), seconds=round(spent + time.monotonic() - begun, 3))
        self.save()
        return result

    def _record(self, name: str, **fields: Any) -> None:
        stage = self.manifest.stages.get(name, Stage()).model_copy(update=fields)
        self.manifest.stages = {**self.manifest.stages, name: stage}


def _leave_to_the_parent() -> None:
    """Close the locks in a forked child, such as one that reads images: it may outlive a killed parent for seconds."""
    for run in list(_locks):
        run.close()


os.register_at_fork(after_in_child=_leave_to_the_parent)


def _before_the_recipe(path: Path) -> bool:
    """Return whether a file may be all that is left of a run killed before it had a recipe."""
    return path.name == LOCK or is_temporary_of(path, RECIPE)


def runs_folder() -> Path:
    """Return where new runs go: `runs/`, or in a run's own folder beside it, so that none lies within another."""
    here = Path.cwd()
    inside = (here / RECIPE).is_file() and ((here / MANIFEST).is_file() or (here / FRONT).is_file())
    return here.parent if inside else Path("runs")


def new_run_path(parent: Path, label: str) -> Path:
    """Return a folder under `parent` that does not exist yet, named after the time and `label`."""
    stem = (
        datetime.now().strftime("%Y%m%d-%H%M%S")
        + "-"
        + "".join(c if c.isalnum() or c in "_-" else "-" for c in label)
    )
    path, count = parent / stem, 1
    while path.exists():
        count += 1
        path = parent / f"{stem}-{count}"
    return path


@contextmanager
def stopped_in(folder: Path) -> Iterator[None]:
    """Add the run's folder to an interrupt, also to one that a library or a lost process turned into another error."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(folder) from stop
    except Exception as error:
        if stopped():
            raise Stopped(folder) from error
        raise
