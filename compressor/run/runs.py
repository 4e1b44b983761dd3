"""The runs in a folder: found, listed, compared and cleaned."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from compressor.core.errors import CompressorError
from compressor.core.front import FRONT, Front
from compressor.core.manifest import MANIFEST, Manifest
from compressor.core.records import RECIPE
from compressor.core.tables import Cell, Table
from compressor.recipe.validation import dotted
from compressor.report.comparison import comparison
from compressor.report.formats import ABSENT, duration, milliseconds, percent, score, score_change, size
from compressor.report.judgement import budget_lines, judge, time_ratio
from compressor.run.folder import RunFolder, runs_folder
from compressor.run.onnx_files import COMPARED, PROBE

_DEEPEST = 2
"""Levels of folders below the given one in which runs are found."""
_NOTHING = "nothing to remove"


def find_runs(places: Sequence[Path]) -> list[Path]:
    """Return the folders of runs: the given ones, and those below given folders; by default those below `runs/`.

    They are in the order of their names, those of several targets in the order of the targets.

    Raises:
        CompressorError: A folder does not exist, or there is no run.
    """
    for place in places:
        if not place.is_dir():
            raise CompressorError(f"{place} is not a folder.", "Give folders of runs, or a folder that holds some.")
    places = places or [runs_folder()]
    found = [run for place in places if place.is_dir() for run in _below(place, _DEEPEST)]
    if not found:
        raise CompressorError(
            f"There is no run in {', '.join(map(str, places))}.", "Give another folder: compress list DIR"
        )
    return list(dict.fromkeys(found))


def _below(place: Path, levels: int) -> Iterator[Path]:
    if (place / RECIPE).is_file() and not (place / FRONT).is_file():
        yield place
    elif levels or (place / FRONT).is_file():
        targets = _targets(place)
        for each in sorted(place.iterdir(), key=lambda each: (targets.get(each.name, len(targets)), each)):
            if each.is_dir() and not each.name.startswith("."):
                yield from _below(each, max(0, levels - 1))


def _targets(place: Path) -> dict[str, int]:
    """Return the place of each target's folder in the front of a folder; none without one, or if it is damaged."""
    with suppress(CompressorError):
        if (place / FRONT).is_file():
            return {each.folder: at for at, each in enumerate(Front.read_tolerant(place / FRONT).targets)}
    return {}


def listed(runs: Sequence[Path]) -> Table:
    """Return a row for each run, the latest last: how it ended, and its slim network beside the dense one."""
    columns = ("run", "model", "data", "state", "score", "change", "latency", "of dense", "size", "begun")
    table = Table(*columns, right=("score", "change", "latency", "of dense", "size"))
    rows = []
    for run in runs:
        manifest, state = _read(run)
        accuracy, time = manifest.accuracy, time_ratio(manifest)
        slim = manifest.deployed_score if manifest.deployed or accuracy.exported is None else accuracy.exported
        change = None if slim is None or accuracy.dense is None else slim - accuracy.dense
        begun = manifest.stages["begin"].started if "begin" in manifest.stages else None
        bytes_ = sum(path.stat().st_size for path in _files(run))
        rows.append(
            (
                begun or "",
                (
                    str(run),
                    manifest.model,
                    manifest.data.partition(":")[0],
                    state,
                    Cell(slim, score(slim, accuracy.by)),
                    Cell(change, score_change(change, accuracy.by)),
                    Cell(manifest.latency.measured_ms, milliseconds(manifest.latency.measured_ms)),
                    Cell(time[0] if time else None, f"{percent(time[0])} {time[1]}" if time else ABSENT),
                    Cell(bytes_, size(bytes_)),
                    Cell(begun, (begun or "").replace("T", " ")[:16]),
                ),
            )
        )
    for _, row in sorted(rows, key=lambda row: row[0]):
        table.add(*row)
    return table


def _read(run: Path) -> tuple[Manifest, str]:
    """Return a run's manifest and its state; that of a damaged one is empty, so that the others are listed."""
    try:
        manifest = _manifest(run)
    except CompressorError:
        return Manifest(), "damaged"
    return manifest, _state(manifest)


def _state(manifest: Manifest) -> str:
    """Return the verdict, or the stage that an unfinished run is in."""
    state = judge(manifest).state
    if state != "unfinished":
        return "no budget" if state == "none" else state
    begun = [name for name, stage in manifest.stages.items() if not stage.finished]
    return f"unfinished ({begun[-1]})" if begun else "unfinished"


def compared(runs: Sequence[Path]) -> Table:
    """Return the runs side by side: a row for each number and for each field in which their recipes differ.

    Raises:
        CompressorError: There are fewer than two runs, or one has no manifest.
    """
    if len(runs) < 2:
        raise CompressorError("Two runs are needed to compare.", "Give the folders of both: compress compare RUN RUN")
    manifests = [_manifest(run) for run in runs]
    names = _short(runs)
    table = Table("", *names, right=names)
    rows: dict[str, list[str]] = {}
    for place, manifest in enumerate(manifests):
        for label, value in _numbers(manifest):
            rows.setdefault(label, [ABSENT] * len(runs))[place] = value
    for label, values in rows.items():
        table.add(label, *values)
    recipes = [dict(dotted(manifest.recipe)) for manifest in manifests]
    for field in dict.fromkeys(name for recipe in recipes for name in recipe):
        settings = [recipe.get(field) for recipe in recipes]
        if any(each != settings[0] for each in settings):
            table.add(field, *(Cell(each, ABSENT if each is None else str(each)) for each in settings))
    return table


def _numbers(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield what a run found, each with a label."""
    yield "State", _state(manifest)
    for line in budget_lines(manifest):
        yield f"Budget, {line.name}", f"{line.measured} of {line.target}: {line.verdict}"
    for row in comparison(manifest):
        if row.dense != ABSENT:
            yield f"{row.label}, dense", row.dense
        yield row.label, row.slim
    metric = manifest.accuracy.by
    for file in manifest.exports.values():  # another run may deliver a file that this one has beside its own
        if file.accuracy is not None:
            yield f"{metric.title}, of {file.file}", score(file.accuracy, metric)
    if (time := time_ratio(manifest)) is not None:
        yield f"Time of dense, {time[1]}", percent(time[0])
    seconds = [stage.seconds for stage in manifest.stages.values() if stage.seconds is not None]
    yield "Time of the run", duration(sum(seconds)) if seconds else ABSENT


def _short(runs: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of the folders, or the whole paths where two are alike."""
    names = [run.resolve().name for run in runs]
    return tuple(names if len(set(names)) == len(names) else map(str, runs))


@dataclass(frozen=True)
class Cleaned:
    """What was removed of a run's folder, or of another one, or would be.

    Attributes:
        run: The folder.
        reason: Why files were removed, or why none were.
        files: Their names; none if the folder stays as it is.
        freed_bytes: Their size.
    """

    run: Path
    reason: str
    files: tuple[str, ...] = ()
    freed_bytes: int = 0

    @property
    def decision(self) -> str:
        """Either "clean" or "keep"."""
        return "clean" if self.files else "keep"


def clean(runs: Sequence[Path], *, remove: bool = True) -> Iterator[Cleaned]:
    """Remove what finished runs needed to be resumed; nothing of their results, and nothing of other runs.

    A finished run can still be reported, measured and exported.

    Args:
        runs: Folders of runs.
        remove: Whether to remove the files, or only to say which.
    """
    for path in runs:
        try:
            run = RunFolder.open(path)
        except CompressorError as error:
            yield Cleaned(path, error.message)
            continue
        with closing(run):
            if run.manifest.status != "finished" or not run.finished("report"):
                yield Cleaned(path, f"not finished; continue with: compress --resume {path}")
                continue
            above = path.resolve().parent / FRONT
            try:
                needed = above.is_file() and Front.read_tolerant(above).status != "finished"
            except CompressorError as error:
                yield Cleaned(path, error.message)
                continue
            if needed:
                yield Cleaned(path, f"others continue its search; continue with: compress --resume {above.parent}")
                continue
            spare = [*sorted((path / "checkpoints").glob("*.pt")), run.file(PROBE), run.file(COMPARED)]
            files = [file for file in spare if file.is_file() and not file.is_symlink()]
            freed = sum(file.stat().st_size for file in files)
            for file in files if remove else ():
                file.unlink()
            reason = "finished; only a resume needs these files" if files else _NOTHING
            yield Cleaned(path, reason, tuple(str(file.relative_to(path)) for file in files), freed)


def clean_decoded(*, remove: bool = True) -> Cleaned:
    """Remove the decoded images that are kept between runs; the next run decodes its own again.

    Args:
        remove: Whether to remove the files, or only to say which.
    """
    from compressor.data.decoded import decoded_folder, kept

    files = kept()
    for file in files if remove else ():
        file.unlink(missing_ok=True)
    reason = "the next run decodes its images again" if files else _NOTHING
    return Cleaned(decoded_folder(), reason, tuple(file.name for file in files), sum(files.values()))


def _manifest(run: Path) -> Manifest:
    """Return a run's manifest for reading; one that was killed before its first write has an empty one."""
    return Manifest.read_tolerant(run / MANIFEST) if (run / MANIFEST).is_file() else Manifest()


def _files(run: Path) -> Iterator[Path]:
    for where, _, names in os.walk(run):
        yield from (path for name in names if (path := Path(where, name)).is_file() and not path.is_symlink())
