"""A recipe's images and its network, made for each other: size, channels and preprocessing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.core.progress import say

if TYPE_CHECKING:
    from torch import nn

    from compressor.data import DataBundle, Preprocessing
    from compressor.models.published import Published
    from compressor.recipe import Recipe


@dataclass(frozen=True)
class Loaded:
    """What `load` gives.

    Attributes:
        recipe: With size and preprocessing filled in.
        data: Its images as the network takes them.
        model: In training mode on the CPU.
        notes: What the user must see, such as a preprocessing that is only assumed.
    """

    recipe: Recipe
    data: DataBundle
    model: nn.Module
    notes: tuple[str, ...]


def load(recipe: Recipe, weights: str | None = None) -> Loaded:
    """The images and the network of a resolved recipe.

    Args:
        recipe: resolved.
        weights: in the place of the recipe's; images are prepared for the recipe's all the same.

    Raises:
        CompressorError: whatever of it cannot be had, or the network takes images of other channels.
    """
    import torch

    from compressor.models import create_model, input_channels

    data = load_images(recipe)
    torch.manual_seed(recipe.seed)
    said: list[str] = []
    model = create_model(
        recipe.model, data.num_classes, weights or recipe.weights, data.input_shape, said.append
    )
    for sentence in said:
        say(sentence)
    channels = input_channels(model, data.input_shape)
    if channels != data.preprocessing.channels:
        order = "grey" if channels == 1 else "rgb"
        if recipe.data.channel_order is not None:
            raise CompressorError(
                f"{recipe.model} takes images of {channels} channel{'s' if channels > 1 else ''}, but "
                f"data.channel_order is {recipe.data.channel_order}.",
                f"Leave it out, or set it to {order}.",
            )
        data = data.prepared(_wanted(recipe, order).at(data.preprocessing.size))
    notes = (*data.notes, *said, *_assumed(recipe, data.preprocessing))
    return Loaded(_completed(recipe, data.preprocessing), data, model, notes)


def load_images(recipe: Recipe) -> DataBundle:
    """The images of a resolved recipe, prepared as it says; colours where it does not say that they are grey."""
    from compressor.data import load_data

    return load_data(recipe.data.source, seed=recipe.seed, wanted=_wanted(recipe, recipe.data.channel_order))


def described(recipe: Recipe, preprocessing: Preprocessing) -> dict[str, Any]:
    """A preprocessing for the manifest, with the place that it comes from."""
    usual = _usual(recipe)
    mine = preprocessing.to_dict()
    theirs = _wanted(recipe.changed({"data": _UNSAID}), preprocessing.channel_order).at(preprocessing.size)
    other = [
        name for name, value in theirs.to_dict().items() if value != mine[name] and name != "resize_size"
    ]
    origin = "assumed: usual for ImageNet" if usual is None else usual.origin
    if other:
        origin += f"; {', '.join(other)} as the recipe says"
    return {**mine, "origin": origin}


_UNSAID = {"mean": None, "std": None, "crop_share": None, "interpolation": None, "range": 1}


def _usual(recipe: Recipe) -> Published | None:
    """What is published about a recipe's weights; None where they are none of a library's networks."""
    from compressor.models import published

    return published(recipe.model) if recipe.weights != "none" else None


def _wanted(recipe: Recipe, channel_order: str | None) -> Any:
    from compressor.data import Preprocessing, Wanted

    usual, data = _usual(recipe), recipe.data
    return Wanted(
        usual=Preprocessing(**usual.preprocessing) if usual is not None else Preprocessing(),
        image_size=recipe.image_size,
        mean=data.mean,
        std=data.std,
        crop_share=data.crop_share,
        interpolation=data.interpolation,
        channel_order=channel_order,
        range=data.range,
    )


def _completed(recipe: Recipe, preprocessing: Preprocessing) -> Recipe:
    """The recipe with its preprocessing in numbers, so that it prepares images alike wherever it is run."""
    return recipe.changed(
        {
            "image_size": preprocessing.size,
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
    """What to say where nothing says how the images of the weights were prepared.

    It follows from the numbers alone, not from who set them: a resumed run, whose recipe has them all, says the same.
    """
    usual = _usual(recipe)
    own = ":" in recipe.model and not recipe.model.startswith("timm:")  # may bring weights of its own
    given = recipe.weights not in ("none", "default")
    if not given and (usual is not None or not own or recipe.data_kind == "digits"):
        return
    expected = _wanted(recipe.changed({"data": _UNSAID}), preprocessing.channel_order).at(preprocessing.size)
    if (preprocessing.mean, preprocessing.std) != (expected.mean, expected.std):
        return
    whose = recipe.weights if given else recipe.model
    source = (
        "what is usual for ImageNet is assumed" if usual is None else f"what {usual.origin} says is taken"
    )
    yield (
        f"{whose} does not say how its images were prepared: {source}, {preprocessing.describe()}. "
        "--mean, --std, --set data.crop_share=... and data.interpolation=... set something else."
    )
