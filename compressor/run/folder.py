"""A run's folder: its recipe, its manifest and the lock of the process that works on it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from compressor.core.errors import CompressorError
from compressor.core.files import disk_error, now, read_json, write_atomic
from compressor.core.manifest import MANIFEST
from compressor.core.records import RECIPE, Checkpoint, EpisodeLog
from export.files import is_temporary_of, remove_temporaries

LOCK = ".lock"


class RunDir:
    """One run's folder: its recipe, its manifest, and the lock of the process that works on it.

    `manifest` is a dict that `save` writes as a whole; stages record there when they started and finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = {}
        self._lock: Any = None

    @classmethod
    def create(cls, path: Path, recipe_yaml: str) -> RunDir:
        """Create a new folder with its recipe, and lock it.

        Raises:
            CompressorError: The folder exists and is not empty; its content is not changed.
        """
        cls.refuse_taken(path)
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
    def refuse_taken(path: Path) -> None:
        """Raise an error if a path exists and is not an empty folder, before anything is computed for it."""
        if not path.exists() or (path.is_dir() and all(_before_the_recipe(each) for each in path.iterdir())):
            return
        if (path / RECIPE).exists():
            raise CompressorError(
                f"{path} is the folder of an earlier run.",
                f"Continue it: compress --resume {path}; or choose another --out DIR.",
            )
        raise CompressorError(f"{path} exists and is not an empty folder.", "Choose another --out DIR.")

    @classmethod
    def open(cls, path: Path) -> RunDir:
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
        remove_temporaries(path)
        run.read()
        return run

    @staticmethod
    def tidy(path: Path) -> None:
        """Remove the temporary files of killed processes from a run's folder, unless a process works on it now."""
        if (path / RECIPE).is_file():
            with suppress(CompressorError), closing(RunDir(path)) as run:
                run.lock()
                remove_temporaries(path)

    def read(self) -> None:
        """Read the manifest from the folder; a run that was killed before its first write has none."""
        manifest = self.path / MANIFEST
        self.manifest = read_json(manifest) if manifest.exists() else {}
        if not isinstance(self.manifest, dict):
            raise CompressorError(f"{manifest} holds {type(self.manifest).__name__}, expected an object.")

    def lock(self) -> None:
        """Lock the folder until `close`; the system releases the lock when the process dies."""
        try:
            # O_NONBLOCK: opening a FIFO in its place would block otherwise
            flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            self._lock = os.fdopen(os.open(self.path / LOCK, flags, 0o644), "r+b", buffering=0)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CompressorError(
                f"Another process is working on {self.path}.",
                "Wait for it to end, or stop it, then try again.",
            ) from None
        except OSError as error:
            raise disk_error(self.path, error) from error

    def close(self) -> None:
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
        return EpisodeLog(self.path / "search" / "episodes.jsonl")

    def save(self, **fields: Any) -> None:
        """Set `fields` of the manifest and write it."""
        self.manifest.update(fields)
        write_atomic(self.path / MANIFEST, json.dumps(self.manifest, indent=2, allow_nan=False) + "\n")

    def finished(self, stage: str) -> bool:
        return bool(self.manifest.get("stages", {}).get(stage, {}).get("finished"))

    def reopen(self, *stages: str, **fields: Any) -> None:
        """Mark these stages as unfinished and set `fields`, in one write: the stages will run again."""
        for stage in stages:
            if stage in self.manifest.get("stages", {}):
                self.manifest["stages"][stage]["finished"] = None
        self.save(**fields)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record in the manifest when a stage starts and finishes, and its seconds over all attempts."""
        stages = self.manifest.setdefault("stages", {})
        spent = stages.get(name, {}).get("seconds", 0.0)
        begun = time.monotonic()
        stages[name] = {
            "started": stages.get(name, {}).get("started") or now(),
            "finished": None,
            "seconds": spent,
        }
        self.save()
        yield
        stages[name] |= {"finished": now(), "seconds": round(spent + time.monotonic() - begun, 3)}
        self.save()


def _before_the_recipe(path: Path) -> bool:
    """Return whether a file may be all that is left of a run killed before it had a recipe."""
    return path.name == LOCK or is_temporary_of(path, RECIPE)


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
