"""Load what a recipe names: the images with their preprocessing, and the network with its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.core.progress import say

if TYPE_CHECKING:
    from torch import nn

    from compressor.core.manifest import SplitFiles
    from compressor.data import DataBundle, Preprocessing
    from compressor.models import Published
    from compressor.recipe import Recipe
    from compressor.training.task import Task


@dataclass(frozen=True)
class Loaded:
    """The objects of a run, before the network is traced.

    Attributes:
        recipe: Recipe with what follows from the objects filled in, such as image size and preprocessing.
        task: Batches, loss and scores.
        model: Network in training mode on the CPU.
        factory: What rebuilds the network for its artifact; None if its user has to.
        builder: What `pruning.artefact.load` builds the network with: a name, or a function.
        notes: Notes for the user, such as an assumed preprocessing.
        preprocessing: How images become inputs and why, for the manifest.
        files: The files of each split, for the manifest.
    """

    recipe: Recipe
    task: Task
    model: nn.Module
    factory: dict[str, Any] | None = None
    builder: Callable[[], nn.Module] | str | None = None
    notes: tuple[str, ...] = ()
    preprocessing: dict[str, Any] = field(default_factory=dict)
    files: Mapping[str, SplitFiles] = field(default_factory=dict)


BY_CLASS = ("mixup", "cutmix", "rand_augment", "random_erasing")
"""Training settings that are defined for images by class only."""

Loader = Callable[["Recipe"], Loaded]
"""Loads the objects of a run: those that its recipe names, or those of a caller."""


def load(
    recipe: Recipe, weights: str | None = None, *, decode_files: bool = True, network: Path | None = None
) -> Loaded:
    """Load the images and the network of a resolved recipe.

    Args:
        recipe: Resolved recipe.
        weights: Weights used instead of the recipe's; the images are still prepared for the recipe's weights.
        decode_files: Whether images are decoded now; else each is when it is used.
        network: ONNX file in the folder of a resumed run, which takes the place of the recipe's if it is there.

    Raises:
        CompressorError: A part is not available, or the network takes images with another number of channels.
    """

    from compressor.models import factory_of, input_channels
    from compressor.models.names import find_again
    from compressor.models.onnx_file import open_onnx

    refuse_python(recipe)
    find_again(recipe.model)
    if network is not None and recipe.onnx and network.is_file():
        loaded = load(recipe.changed({"model": str(network)}), weights, decode_files=decode_files)
        return replace(loaded, recipe=loaded.recipe.changed({"model": recipe.model}))
    if recipe.onnx and recipe.image_size is None:
        recipe = recipe.changed({"image_size": open_onnx(recipe.model).image_size})
    data = load_images(recipe, decode_files=decode_files)
    training, augmentation = recipe.training, data.train.augmentation
    data.train.augmentation = replace(
        augmentation, rand_augment=training.rand_augment, random_erasing=training.random_erasing
    )
    said: list[str] = []
    model = network_of(recipe, data.num_classes, data.input_shape, weights or recipe.weights, said)
    for sentence in said:
        say(sentence)
    channels = input_channels(model, data.input_shape)
    if channels != data.preprocessing.channels:
        order = "grey" if channels == 1 else "rgb"
        if recipe.data.channel_order is not None:
            raise CompressorError(
                f"{recipe.model} takes images of {channels} channel{'s' if channels > 1 else ''}, but "
                f"data.channel_order is {recipe.data.channel_order}.",
                f"Omit it, or set it to {order}.",
            )
        data = data.prepared(_wanted(recipe, order).at(data.preprocessing.image_size))
    notes = (*data.notes, *said, *_assumed(recipe, data.preprocessing))
    completed = _completed(recipe, data.preprocessing)
    return Loaded(
        completed,
        task_of(completed, data, model),
        model,
        factory_of(model),
        None if recipe.onnx else completed.model,
        notes,
        described(completed, data.preprocessing),
        data.files,
    )


def network_of(
    recipe: Recipe, num_classes: int, input_shape: tuple[int, int, int], weights: str, said: list[str]
) -> nn.Module:
    """Create a recipe's network for the classes of its data; without labels, for those of its weights.

    Args:
        recipe: Resolved recipe.
        num_classes: Classes of its data; 0 without labels.
        input_shape: (channels, height, width) of an input.
        weights: Weights as in a recipe.
        said: Receives sentences for the user.
    """
    import torch

    from compressor.models import create_model, usual_classes
    from compressor.models.weights import FRESH_HEAD

    task = recipe.task or "classification"
    background = task == "detection"  # one of a detector's classes, but none of the data's
    classes = (num_classes or usual_classes(recipe.model, input_shape)) + background
    for _ in range(2):
        torch.manual_seed(recipe.seed)
        model = create_model(recipe.model, classes, weights, input_shape, said.append, task)
        others = getattr(model, FRESH_HEAD, 0)
        if num_classes or not others:
            break
        classes = int(others)
        said.clear()
    return model


def task_of(recipe: Recipe, data: DataBundle, model: nn.Module | None = None) -> Task:
    """Return the task of a resolved recipe on its data.

    Args:
        recipe: Resolved recipe.
        data: Its data.
        model: Its network with any weights; built if it is needed and left out.

    Raises:
        CompressorError: Candidates cannot be scored as the recipe asks.
    """
    from compressor.training.classification import Classification
    from compressor.training.detection import Detection
    from compressor.training.segmentation import Segmentation

    if recipe.classifies:
        return Classification.of(data, recipe.search.measure)
    for name, value, usual in (
        ("search.measure", recipe.search.measure, "auto"),
        ("search.workers", str(recipe.search.workers or 1), "1"),
        ("data.crop_share", str(recipe.data.crop_share or 1.0), "1.0"),
        *((f"training.{name}", getattr(recipe.training, name), 0) for name in BY_CLASS),
    ):
        if value != usual:
            raise CompressorError(f"{name} is {value}, which is for images by class only.", "Leave it out.")
    if recipe.task == "detection":
        if recipe.training.label_smoothing:
            raise CompressorError("training.label_smoothing has no effect on a detector's loss.", "Leave it out.")
        raw: Any = model or network_of(recipe, data.num_classes, data.input_shape, "none", [])
        return Detection(data, raw)
    return Segmentation(data)


def refuse_python(recipe: Recipe) -> None:
    """Refuse a recipe whose network and data are objects of a Python program.

    Raises:
        CompressorError: Says how to go on.
    """
    if recipe.from_python:
        raise CompressorError(
            "The network and the data of this run are objects of the Python program that started it.",
            "Run that program again: compressor.compress(..., out=FOLDER, resume=True) continues the run in FOLDER.",
        )


def builder_of(recipe: Recipe, folder: Path, given: str | None) -> str | None:
    """Return what builds the dense network of a run; None if its saved network says so itself.

    Args:
        recipe: Recipe of the run.
        folder: Its folder.
        given: Factory that the user names now, if any.

    Raises:
        CompressorError: It is user code that was neither run here before nor named now, or that no name leads to.
    """
    from compressor.models.names import allowed_factory, is_users
    from compressor.pruning.artefact import saved_factory

    if not recipe.from_python or given is not None:
        return allowed_factory(recipe.model, given, folder)
    name = saved_factory(folder)
    if name is None:
        raise CompressorError(
            f"The network of {folder} is an object of the Python program that started the run; no file names what "
            "builds it.",
            "Name a function or class that builds the dense network from num_classes at most, in the folder of its "
            "module: --factory module:function",
        )
    return allowed_factory(name, None, folder) if is_users(name) else None


def missing_data(recipe: Recipe) -> str | None:
    """Return what a recipe's data is if it is not here, as on another machine; None if it is."""
    if recipe.from_python:
        return "The data of the Python program that started this run"
    kind, _, where = recipe.data.source.partition(":")
    path = Path(where).expanduser()
    return str(path) if where and kind != "shapes" and not path.is_dir() else None


def load_images(recipe: Recipe, *, decode_files: bool = True) -> DataBundle:
    """Load the images of a resolved recipe, prepared as it says; in color unless it says that they are gray."""
    from compressor.data import load_data

    return load_data(
        recipe.data.source,
        seed=recipe.seed,
        wanted=_wanted(recipe, recipe.data.channel_order),
        task=recipe.task or "classification",
        decode_files=decode_files,
    )


def refuse_other_files(
    recipe: Recipe, began: Mapping[str, SplitFiles], found: Mapping[str, SplitFiles]
) -> None:
    """Refuse data whose files are not those that a run began with: it is divided into other splits.

    Args:
        recipe: Recipe of the run.
        began: The files of each split in the run's manifest; runs of earlier versions have none.
        found: Those of the data now.

    Raises:
        CompressorError: Files came or went, or have other names or labels.
    """
    if not found or all(files.sha256 == found.get(name, files).sha256 for name, files in began.items()):
        return
    then, now = (
        ", ".join(f"{files.images} in {name}" for name, files in each.items()) for each in (began, found)
    )
    raise CompressorError(
        f"{recipe.data.source} does not hold the pictures that the run began with: expected {then}; found {now}"
        f"{', with other names or labels' if then == now else ''}.",
        "Pictures that come or go change the splits, and the run would be tested on some that it was trained on. "
        "Restore the files, or start a new run with --out DIR.",
    )


def described(recipe: Recipe, preprocessing: Preprocessing) -> dict[str, Any]:
    """Return a preprocessing and its origin for the manifest."""
    usual = _usual(recipe)
    mine = preprocessing.to_dict()
    theirs = _wanted(recipe.changed({"data": _UNSAID}), preprocessing.channel_order).at(preprocessing.image_size)
    other = [
        name for name, value in theirs.to_dict().items() if value != mine[name] and name != "resize_size"
    ]
    origin = "assumed: usual for ImageNet" if usual is None else usual.origin
    if other:
        origin += f"; {', '.join(other)} set by the recipe"
    return preprocessing.recorded(origin)


def network_facts(recipe: Recipe, task: Task) -> dict[str, Any]:
    """Return what the file of a run's network says in its metadata: model, classes and normalization."""
    facts = task.facts()
    images = facts.get("preprocessing", {})
    return {
        "model": Path(recipe.model).name if recipe.onnx else recipe.model,
        **facts,
        **{name: images[name] for name in ("mean", "std") if name in images},
    }


_UNSAID = {"mean": None, "std": None, "crop_share": None, "interpolation": None, "range": 1}


def _usual(recipe: Recipe) -> Published | None:
    """Return what is published about a recipe's weights; None if the network is not from a library."""
    from compressor.models import published

    return published(recipe.model) if recipe.weights != "none" else None


def _wanted(recipe: Recipe, channel_order: str | None) -> Any:
    from compressor.data import Preprocessing, Wanted

    published, data = _usual(recipe), recipe.data
    try:
        usual = Preprocessing(**published.preprocessing) if published is not None else Preprocessing()
    except (TypeError, ValueError) as error:
        raise CompressorError(f"{published.origin if published else ''} is no preprocessing: {error}.") from None
    if not recipe.classifies:  # nothing of a picture is cut off: what is there may be at its edges
        usual = replace(usual, resize="squash", crop_share=1.0)
    return Wanted(
        usual=usual,
        image_size=recipe.image_size,
        mean=data.mean,
        std=data.std,
        crop_share=data.crop_share,
        interpolation=data.interpolation,
        channel_order=channel_order,
        range=data.range,
    )


def _completed(recipe: Recipe, preprocessing: Preprocessing) -> Recipe:
    """Return the recipe with explicit preprocessing values, so that images are prepared alike on every machine."""
    return recipe.changed(
        {
            "image_size": preprocessing.image_size,
            "data": {
                "mean": preprocessing.mean,
                "std": preprocessing.std,
                "crop_share": preprocessing.crop_share,
                "interpolation": preprocessing.interpolation,
                "channel_order": preprocessing.channel_order,
                "range": preprocessing.range,
            },
        }
    )


def _assumed(recipe: Recipe, preprocessing: Preprocessing) -> Iterator[str]:
    """Yield a note if nothing says how the images for the weights were prepared.

    The note depends on the numbers alone, not on their origin: a resumed run, whose recipe has them all, gets the same.
    """
    usual = _usual(recipe)
    given = recipe.weights not in ("none", "default")
    if not given and (usual is not None or not (recipe.own_network or recipe.onnx) or recipe.small_data):
        return
    expected = _wanted(recipe.changed({"data": _UNSAID}), preprocessing.channel_order).at(preprocessing.image_size)
    if (preprocessing.mean, preprocessing.std) != (expected.mean, expected.std):
        return
    whose = recipe.weights if given else recipe.model
    source = (
        "the usual ImageNet values are assumed" if usual is None else f"the values of {usual.origin} are used"
    )
    yield (
        f"{whose} does not say how its images were prepared: {source}, {preprocessing.describe()}. "
        "Change it with --mean, --std, --set data.crop_share=... and data.interpolation=...."
    )
