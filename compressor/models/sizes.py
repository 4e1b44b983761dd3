"""Networks that are built for one image size, such as vision transformers, whose positions belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compressor.core.errors import CompressorError
from compressor.core.plugins import raised_at, shown

_TORCHVISION = "vit_"
_TORCHVISION_SIZE = (224, 224)


def usual_size(source: str, name: str) -> tuple[int, int] | None:
    """Return (height, width) of the images that a library's builder fixes by default; None if it fixes none.

    Args:
        source, name: As `names.resolve` returns them.
    """
    if source == "torchvision":
        return _TORCHVISION_SIZE if name.startswith(_TORCHVISION) else None
    if source != "timm":
        return None
    from timm.models import get_pretrained_cfg

    found = get_pretrained_cfg(name)
    if found is None or not found.fixed_input_size:
        return None
    height, width = found.input_size[1:]
    return int(height), int(width)


def size_argument(source: str, size: Sequence[int] | None) -> dict[str, Any]:
    """Return the keyword argument by which a library's builder is given an image size; empty for None.

    Raises:
        CompressorError: torchvision's transformers take square images only.
    """
    if size is None:
        return {}
    if source == "timm":
        return {"img_size": tuple(size)}
    height, width = size
    if height != width:
        raise CompressorError(
            f"torchvision's vision transformers take square images, not {height}x{width}.", "Give --image-size N."
        )
    return {"image_size": height}


def cannot_build(source: str, name: str, size: Sequence[int], error: Exception) -> CompressorError:
    """Return the error for a network that cannot be built for an image size."""
    height, width = usual_size(source, name) or size
    return CompressorError(
        f"{name} cannot be built for images of {size[0]}x{size[1]}: {shown(error)}{raised_at(error)}.",
        f"By default it is built for {height}x{width}: --image-size {height}",
    )


def interpolated(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of torchvision's vision transformer with positions for the image size of `model`."""
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    if not isinstance(model, VisionTransformer):
        return state
    return dict(interpolate_embeddings(model.image_size, model.patch_size, dict(state)))
