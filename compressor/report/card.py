"""A model card: what a network is, what it costs and how it was made, in Markdown as the Hugging Face hub shows it.

Its numbers are those of the manifest. It is meant to be published: folders of this machine are left out of every text,
and so are addresses of devices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath

from compressor.core.manifest import Manifest
from compressor.core.metrics import PYTHON
from compressor.report.comparison import comparison
from compressor.report.formats import percentile_name, size
from compressor.report.judgement import budget_lines, time_ratio, verdict
from export.text import plain

PIPELINES = {
    "classification": "image-classification",
    "segmentation": "image-segmentation",
    "detection": "object-detection",
}
"""The hub's names of the tasks."""

_NAME = r"[^\s/:;,'\"()]+"
_PATH = re.compile(rf"(?<![\w./])(?:~|\.\.?)?/(?=[^\s/])(?:{_NAME}/)*({_NAME})/?")
_ADDRESS = re.compile(r"ssh:[^\s,;]+")


def model_card(manifest: Manifest, files: Mapping[str, int]) -> str:
    """Return the card of a finished run.

    Args:
        manifest: Its manifest.
        files: Bytes of the files beside the card, by name.
    """
    hidden = without_folders(manifest)
    parts = (_heading(manifest), _results(manifest), _origin(manifest), _use(manifest, files), _notes(manifest))
    head, *rest = ("\n".join(hidden(line) for line in part) for part in parts)
    return "\n\n".join([head, *(part for part in rest if part)]) + "\n"


def without_folders(manifest: Manifest) -> Callable[[str], str]:
    """Return what a text of a run becomes before it is published; see `public`."""
    given = (manifest.data.partition(":")[2], manifest.weights, manifest.model.removeprefix(f"{PYTHON}:"))
    paths = sorted((path for path in given if "/" in path), key=len, reverse=True)

    def hidden(text: str) -> str:
        for path in paths:  # they may hold blanks
            text = text.replace(path, PurePath(path).name)
        return public(text)

    return hidden


def public(text: str) -> str:
    """Return a text without the folders of this machine, of which the last name stays, and without addresses.

    >>> public("folder:/home/me/data/birds on ssh://me@10.0.0.7, see https://pytorch.org/docs")
    'folder:birds on a device over ssh, see https://pytorch.org/docs'
    """
    return _PATH.sub(r"\1", _ADDRESS.sub("a device over ssh", text))


def _heading(manifest: Manifest) -> Iterator[str]:
    task = _task(manifest)
    yield "---"
    yield "library_name: onnx"
    if task in PIPELINES:
        yield f"pipeline_tag: {PIPELINES[task]}"
    yield "tags: [compression, pruning, onnx]"
    yield "---"
    yield ""
    yield f"# {_text(manifest.model)}, compressed"
    yield ""
    yield _text(verdict(manifest))


def _results(manifest: Manifest) -> Iterator[str]:
    yield "## Results"
    yield ""
    yield from _table(
        ("", "dense", "this network", "of dense"),
        ((row.label, row.dense, row.slim, row.change) for row in comparison(manifest)),
    )
    if lines := budget_lines(manifest):
        yield ""
        rows = ((line.name, line.target, line.measured, line.verdict) for line in lines)
        yield from _table(("budget", "target", "measured", "verdict"), rows)
    accuracy, latency = manifest.accuracy, manifest.latency
    yield ""
    if accuracy.images is not None:
        yield f"Scores are of the {accuracy.split} split of {_text(manifest.data)}, {accuracy.images:,} inputs."
    if (found := time_ratio(manifest)) is not None:
        where = [latency.device, str(manifest.machine.get("cpu", "")) if latency.device == "local" else ""]
        facts = [*where, latency.runtime or "", latency.precision, percentile_name(latency.percentile)]
        yield f"The latency is {found[1]}: {_text(', '.join(fact for fact in facts if fact))}."
    yield "A multiply-add (MAC) counts as one."


def _origin(manifest: Manifest) -> Iterator[str]:
    yield "## How it was made"
    yield ""
    facts = {
        "network": manifest.model,
        "weights before": manifest.weights,
        "data": manifest.data,
        "agent of the search": manifest.agent,
        "epochs, search and fine-tuning": manifest.epochs,
        "seed": manifest.seed,
        **{f"version of {name}": version for name, version in manifest.versions.items()},
    }
    yield from _table(("", ""), ((name, str(value)) for name, value in facts.items() if value not in (None, "")))
    kept = [group for group in manifest.groups if group.width and group.kept is not None]
    if kept:
        share = sum(group.kept or 0 for group in kept) / sum(group.width or 0 for group in kept)
        yield ""
        yield f"Channels were removed structurally: {share:.0%} of those in {len(kept)} groups are left."


def _use(manifest: Manifest, files: Mapping[str, int]) -> Iterator[str]:
    yield "## Use"
    yield ""
    if "infer.py" in files:
        yield "`python infer.py PHOTO...` classifies pictures with numpy, Pillow and ONNX Runtime."
    if manifest.deployed is None:
        yield "`model.onnx` holds the network, `preprocess.json` how a picture becomes its input."
    else:
        which = "as it is delivered" if manifest.latency.measured_ms is None else "that was timed"
        yield f"`{manifest.deployed.file}` holds the network {which}, `model.onnx` the same one in FP32."
        yield "`preprocess.json` has how a picture becomes an input."
    yield "With the toolkit, `compressor.load(FOLDER)` returns it as a torch module."
    yield ""
    yield from _table(("file", "size"), ((f"`{name}`", size(count)) for name, count in sorted(files.items())))


def _notes(manifest: Manifest) -> Iterator[str]:
    if manifest.notes:
        yield "## Notes"
        yield ""
        yield from (f"- {_text(note)}" for note in manifest.notes)


def _task(manifest: Manifest) -> str:
    """Return the task; that of a Python program's own network is not known."""
    task = manifest.recipe.get("task")
    return "" if manifest.data == PYTHON or not isinstance(task, str) else task


def _table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(_text(cell) for cell in row)} |"


def _text(text: str) -> str:
    """Return a text on one line that neither ends a cell of a table nor holds HTML."""
    return plain(text).replace("|", "\\|").replace("<", "&lt;")
