"""The files with which a run's network is used elsewhere: the names of its classes, how a picture becomes an input, and
a program in two files that needs neither torch nor this package."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.files import read_json, replacing, write_atomic
from compressor.core.metrics import PYTHON
from compressor.run.folder import RunFolder
from compressor.run.onnx_files import MODEL
from export.convert.ort import open_session, run_session
from export.device.bundle import PROGRAM

if TYPE_CHECKING:
    from pathlib import Path

    from compressor.recipe import Recipe
    from compressor.training.task import Task

LABELS = "labels.txt"
PREPROCESS = "preprocess.json"
DEPLOYED = (LABELS, PREPROCESS, *(path.name for path in PROGRAM))
"""The files, by name. A network of a Python program has the second one only, and `PROGRAM` is for classifiers."""

_ANSWERS = {
    "classification": "a score for each line of labels.txt; the highest one is the answer",
    "segmentation": "a score for each line of labels.txt at every pixel; the highest one is the answer",
    "detection": "raw outputs; compress export RUN --format boxes writes a file that gives boxes, whose label 1 is the "
    "first line of labels.txt",
    PYTHON: "what the network of the Python program gives",
}


def write_deployable(run: RunFolder, recipe: Recipe, task: Task) -> None:
    """Write the files that say how the delivered network is used, as far as the run knows it.

    Args:
        run: Run that has exported its network.
        recipe, task: Resolved recipe of the run and its task.
    """
    kind = PYTHON if recipe.from_python else recipe.task or "classification"
    facts, network = task.facts(), open_session(run.file(MODEL))
    own = run.manifest.deployed_by_onnxruntime
    how = {
        "file": MODEL if own is None else own.file,
        "answer": _ANSWERS[kind],
        "task": kind,
        "inputs": [_tensor(each) for each in network.get_inputs()],
        "outputs": [_tensor(each) for each in network.get_outputs()],
        **({"scores": _scores(network)} if kind == "classification" else {}),
        **_of_a_picture(run),
        "scored": _scored(run, recipe),
    }
    _write(run, how)
    names = facts.get("classes")
    if kind == "classification" and not names:  # pictures without labels: classes are known by number
        names = [str(number) for number in range(how["outputs"][0]["shape"][-1])]
    if names:
        write_atomic(run.file(LABELS), "".join(f"{_one_line(name)}\n" for name in names))
    if kind == "classification":
        for source in PROGRAM:
            with replacing(run.file(source.name)) as temporary:
                shutil.copyfile(source, temporary)


def gives_probabilities(folder: Path) -> bool:
    """Return whether a run's classifier ends in a softmax, as far as its `preprocess.json` says so."""
    path = folder / PREPROCESS
    return path.is_file() and read_json(path).get("scores") == "probabilities"


def _scores(network: Any) -> str:
    """Return what the scores of classes are: "probabilities" of a network that ends in a softmax, else "logits"."""
    import torch

    from compressor.training.losses import are_probabilities

    (given,) = network.get_inputs()
    shape = [size if isinstance(size, int) else 1 for size in given.shape]
    inputs = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    scores = torch.from_numpy(run_session(network, {given.name: inputs})[0])
    return "probabilities" if are_probabilities(scores) else "logits"


def write_score(run: RunFolder, recipe: Recipe) -> None:
    """Write the score of the file to use again, after that file was; a run without `preprocess.json` gets none."""
    path = run.file(PREPROCESS)
    if path.is_file():
        _write(run, {**read_json(path), "scored": _scored(run, recipe)})


def _write(run: RunFolder, how: dict[str, Any]) -> None:
    write_atomic(run.file(PREPROCESS), json.dumps(how, indent=2, allow_nan=False) + "\n")


def _tensor(described: Any) -> dict[str, Any]:
    """Return what a file says about one of its inputs or outputs."""
    kind = described.type.removeprefix("tensor(").removesuffix(")")
    return {"name": described.name, "shape": described.shape, "type": "float32" if kind == "float" else kind}


def _of_a_picture(run: RunFolder) -> dict[str, Any]:
    """Return the steps from a picture to an input; nothing for inputs that are no pictures."""
    from compressor.data import Preprocessing

    if not (known := run.manifest.preprocessing):
        return {}
    preprocessing, origin = Preprocessing.from_record(known)
    kept = ("interpolation", "resize", "channel_order", "range", "mean", "std")
    return {
        "in_words": preprocessing.describe(),
        "origin": origin,
        "resize_to": list(preprocessing.covered),
        "crop": list(preprocessing.sides),
        **{name: known[name] for name in kept},
        "layout": "NCHW",
    }


def _scored(run: RunFolder, recipe: Recipe) -> dict[str, Any] | None:
    """Return the score of the file to use and what it is a score of; None if it has none."""
    accuracy, own = run.manifest.accuracy, run.manifest.deployed_by_onnxruntime
    value, inputs = (accuracy.exported, accuracy.exported_images) if own is None else (own.accuracy, own.images)
    if value is None:
        return None
    return {
        "file": MODEL if own is None else own.file,
        "metric": accuracy.metric,
        "value": value,
        "data": recipe.data.source,
        "split": accuracy.split,
        "inputs": inputs,
    }


def _one_line(name: str) -> str:
    """Return a name without line breaks: a file has a line for each."""
    return " ".join(str(name).split("\n")).replace("\r", " ")

