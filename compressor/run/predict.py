"""What a finished run's network says about photographs: through torch, ONNX Runtime or TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.files import read_text
from compressor.core.manifest import MANIFEST, Manifest
from compressor.core.records import RECIPE
from compressor.models.names import allowed_factory
from compressor.recipe import load_recipe
from compressor.run.deployable import LABELS, gives_probabilities
from compressor.run.exports import PRECISIONS
from compressor.run.folder import refuse_front
from compressor.run.load import refuse_python
from compressor.run.onnx_files import MODEL, file_of

if TYPE_CHECKING:
    from torch import nn

    from compressor.data import Preprocessing
    from compressor.recipe import Recipe

RUNTIMES = ("onnx", "torch", "engine")
CERTAIN = 0.5
"""Lowest score of a box that is shown."""

Network = Callable[[Any], Sequence[Any]]
"""float32 (1, C, H, W) -> the network's outputs as arrays."""


@dataclass(frozen=True)
class Answer:
    """What a network says about a part of a photograph.

    Attributes:
        name: The class.
        share: Its probability, the share of the pixels that have it, or a box's score.
        box: Left, top, right and bottom edge in pixels of the photograph; None without boxes.
    """

    name: str
    share: float
    box: tuple[float, float, float, float] | None = None


def predict(
    folder: Path,
    photos: Sequence[Path],
    *,
    runtime: str = "onnx",
    precision: str | None = None,
    top: int = 3,
    factory: str | None = None,
) -> Iterator[tuple[Path, list[Answer]]]:
    """Yield what a run's slim network says about each photograph.

    Args:
        folder: Folder of a run that has exported its network.
        photos: Image files.
        runtime: One of `RUNTIMES`.
        precision: That of the ONNX file or engine, which the run must have; None is fp32, or the run's own if it
            delivers such a file for ONNX Runtime.
        top: Number of classes of each photograph.
        factory: Function that builds the network if it is the user's own code, for torch.

    Raises:
        CompressorError, ExportError: A file is missing, a photograph cannot be read, or the runtime is not here.
    """
    import torch

    from compressor.data.images import decode

    if runtime not in RUNTIMES:
        raise CompressorError(f"--runtime {runtime} is not known.", f"Choose {', '.join(RUNTIMES)}.")
    if precision is not None and precision not in PRECISIONS:
        raise CompressorError(f"--precision {precision} is not known.", f"Choose {', '.join(PRECISIONS)}.")
    if missing := next((photo for photo in photos if not photo.is_file()), None):
        raise CompressorError(f"There is no photograph {missing}.")
    recipe = _finished(folder)
    if precision is None:
        own = runtime == "onnx" and recipe.task != "detection" and Manifest.read(folder / MANIFEST)
        precision = recipe.precision if own and own.deployed_by_onnxruntime else "fp32"
    preprocessing, names = _preprocessing(folder), _names(folder)
    softmax = recipe.classifies and gives_probabilities(folder)
    read: Callable[[Sequence[Any], list[str], Path, Preprocessing], Iterator[Answer]]
    if recipe.task == "detection":
        read, network = _boxes_of, _detector(folder, recipe, runtime, precision, preprocessing, factory)
    else:
        read = _classes_of if recipe.classifies else _pixels_of
        network = _network(folder, recipe, runtime, precision, factory)
    for photo in photos:
        image = decode(str(photo), preprocessing)
        if image is None:
            raise CompressorError(f"{photo} cannot be read.", "It may be truncated, or no image.")
        with torch.no_grad():
            outputs = network(preprocessing.normalised(image[None]).numpy())
        if softmax:
            outputs = [np.log(np.maximum(outputs[0], np.finfo(np.float32).tiny))]
        yield photo, list(read(outputs, names, photo, preprocessing))[:top]


def _finished(folder: Path) -> Recipe:
    """Return the recipe of a run that has what a prediction needs."""
    if not (folder / RECIPE).is_file():
        raise CompressorError(
            f"{folder} is not a run's folder: it has no {RECIPE}.", "List the runs with: compress list"
        )
    refuse_front(folder)
    recipe = load_recipe(folder / RECIPE)
    refuse_python(recipe)
    for name in (MODEL, LABELS):
        if not (folder / name).is_file():
            raise CompressorError(f"The run in {folder} has no {name} yet.", f"Finish it: compress --resume {folder}")
    return recipe


def _preprocessing(folder: Path) -> Preprocessing:
    from compressor.data import Preprocessing

    try:
        return Preprocessing.from_record(Manifest.read(folder / MANIFEST).preprocessing)[0]
    except (TypeError, ValueError, KeyError) as error:
        raise CompressorError(f"'preprocessing' in {folder / MANIFEST} is damaged: {error}.") from error


def _names(folder: Path) -> list[str]:
    return read_text(folder / LABELS, "list of classes").split("\n")[:-1]


def _network(folder: Path, recipe: Recipe, runtime: str, precision: str, factory: str | None) -> Network:
    """Return the network of a classifier or a segmenter."""
    from compressor.models.first_run import class_maps

    if runtime == "torch":
        import torch

        model = _slim(folder, recipe, precision, factory)
        return lambda image: [class_maps(model(torch.from_numpy(image))).numpy()]
    if runtime == "engine":
        from export.engine.runner import EngineRunner

        path = folder / "engines" / (file_of(precision).removesuffix("onnx") + "engine")
        _require(path, f"compress export {folder} --format engine --precision {precision}")
        runner = EngineRunner(path)
        return lambda image: [runner.run_batches(image)]
    return _onnx(folder, file_of(precision), f"compress export {folder} --precision {precision}")


def _detector(
    folder: Path,
    recipe: Recipe,
    runtime: str,
    precision: str,
    preprocessing: Preprocessing,
    factory: str | None,
) -> Network:
    """Return a detector with its post-processing: boxes (n, 4) in pixels of the input, scores and labels (n,)."""
    if runtime == "engine":
        raise CompressorError(
            "An engine of a detector gives raw outputs, not boxes.",
            "Use --runtime torch, or onnx with the file that --format boxes writes.",
        )
    if runtime == "onnx":
        return _onnx(folder, "model.boxes.onnx", f"compress export {folder} --format boxes; or use --runtime torch")
    import torch

    from compressor.models.detectors import FOUND, WithBoxes

    model: Any = _slim(folder, recipe, precision, factory)
    whole = WithBoxes(model, torch.zeros(1, *preprocessing.input_shape))

    def found(image: Any) -> list[Any]:
        result = whole(torch.from_numpy(image))
        return [result[name].numpy() for name in FOUND]

    return found


def _slim(folder: Path, recipe: Recipe, precision: str, factory: str | None) -> nn.Module:
    from compressor.pruning.artefact import load

    if precision != "fp32":
        raise CompressorError(f"torch computes in fp32, and --precision is {precision}.", "Use --runtime onnx.")
    return load(folder, factory=allowed_factory(recipe.model, factory, folder))


def _onnx(folder: Path, name: str, write: str) -> Network:
    from export.convert.ort import open_session, run_session

    _require(folder / name, write)
    session = open_session(folder / name)
    given = session.get_inputs()[0]
    batch = given.shape[0] if isinstance(given.shape[0], int) else 1  # that of the run
    return lambda image: run_session(session, {given.name: np.repeat(image, batch, 0)})


def _require(path: Path, write: str) -> None:
    if not path.is_file():
        raise CompressorError(f"The run has no {path.name}.", f"Write it with: {write}")


def _classes_of(outputs: Sequence[Any], names: list[str], *_: Any) -> Iterator[Answer]:
    """Yield the classes of a photograph with their probabilities, the likeliest first."""
    scores = np.asarray(outputs[0])[0].reshape(-1).astype(np.float64)
    shares = np.exp(scores - scores.max())
    for place in np.argsort(-shares, kind="stable").tolist():
        yield Answer(_name(names, place), float(shares[place] / shares.sum()))


def _pixels_of(outputs: Sequence[Any], names: list[str], *_: Any) -> Iterator[Answer]:
    """Yield the classes of a photograph's pixels with their shares of it, the largest first."""
    places, counts = np.unique(np.asarray(outputs[0])[0].argmax(axis=0), return_counts=True)
    for index in np.argsort(-counts, kind="stable").tolist():
        yield Answer(_name(names, int(places[index])), float(counts[index] / counts.sum()))


def _boxes_of(
    outputs: Sequence[Any], names: list[str], photo: Path, preprocessing: Preprocessing
) -> Iterator[Answer]:
    """Yield the boxes in a photograph whose score is at least `CERTAIN`, the highest first."""
    from compressor.data.masks import picture_size

    boxes, scores, labels = outputs[:3]
    (width, height), (rows, columns) = picture_size(str(photo)), preprocessing.sides
    for index in np.argsort(-scores, kind="stable").tolist():
        if scores[index] >= CERTAIN:
            left, top, right, bottom = (float(value) for value in boxes[index])
            across, down = width / columns, height / rows
            edges = (left * across, top * down, right * across, bottom * down)
            yield Answer(_name(names, int(labels[index]) - 1), float(scores[index]), edges)


def _name(names: list[str], place: int) -> str:
    return names[place] if 0 <= place < len(names) else str(place)
