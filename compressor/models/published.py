"""Published facts of timm's and torchvision's weights: their preprocessing and accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from compressor.models.names import resolve


@dataclass(frozen=True)
class Published:
    """Published facts of a network's weights.

    Attributes:
        origin: Source of the facts.
        preprocessing: size, mean, std, crop_share, interpolation and resize, as `data.Preprocessing` names them.
        accuracy: Top-1 share of its default weights on ImageNet's validation images, 0..1; None if not stated.
    """

    origin: str
    preprocessing: dict[str, Any]
    accuracy: float | None = None


def published(name: str) -> Published | None:
    """Return what is published about a network's weights, without downloading; None for networks of no library.

    Raises:
        CompressorError: There is no such network.
    """
    source, inner = resolve(name)
    if source == "timm":
        return _of_timm(inner)
    return _of_torchvision(inner) if source == "torchvision" else None


def _of_timm(name: str) -> Published | None:
    from timm.data.config import resolve_data_config
    from timm.models import get_pretrained_cfg

    found = get_pretrained_cfg(name)
    if found is None:
        return None
    config: dict[str, Any] = resolve_data_config(pretrained_cfg=dict(vars(found)))  # type: ignore[no-untyped-call]
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        return None
    return Published(
        origin=f"timm's pretrained_cfg of {name}",
        preprocessing={
            "size": height,
            "mean": tuple(config["mean"]),
            "std": tuple(config["std"]),
            "crop_share": float(config["crop_pct"]),
            "interpolation": config["interpolation"],
            "resize": "squash" if config["crop_mode"] == "squash" else "short",
        },
    )


def _of_torchvision(name: str) -> Published | None:
    from torchvision.models import get_model_weights

    default: Any = getattr(get_model_weights(name), "DEFAULT", None)
    if default is None:
        return None
    transforms = default.transforms()
    (size,), (scaled,) = transforms.crop_size, transforms.resize_size
    share = default.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1", math.nan)
    return Published(
        origin=f"torchvision's {default}",
        preprocessing={
            "size": size,
            "mean": tuple(transforms.mean),
            "std": tuple(transforms.std),
            "crop_share": size / scaled,
            "interpolation": transforms.interpolation.value,
        },
        accuracy=None if math.isnan(share) else share / 100,
    )
