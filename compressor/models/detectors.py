"""torchvision's one-stage detectors as networks of fixed-size tensors: backbone and heads, without post-processing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.models.computed import evaluated

LOGITS = "cls_logits"
OUTPUTS = (LOGITS, "bbox_regression", "bbox_ctrness")
"""Raw outputs by torchvision's names, in the order of the ONNX file's; only FCOS has the last."""

FOUND = ("boxes", "scores", "labels")
"""What is found in a picture, by torchvision's names."""

CLASS_HEAD = "head.classification_head."
"""Beginning of the names of the weights that depend on the number of classes."""

_PARTS = ("backbone", "head", "anchor_generator", "transform")
_USUAL = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PREPARED: Mapping[str, tuple[int, tuple[float, ...], tuple[float, ...]]] = {
    "ssdlite320_mobilenet_v3_large": (320, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "ssd300_vgg16": (300, (0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)),
    "retinanet_resnet50_fpn": (640, *_USUAL),
    "retinanet_resnet50_fpn_v2": (640, *_USUAL),
    "fcos_resnet50_fpn": (640, *_USUAL),
}
"""Torchvision's detectors of one stage: side of an input in pixels, mean and deviation. Those of 640 take any size."""


class RawDetector(nn.Module):
    """A detector's backbone and heads: what is pruned, exported and timed.

    Args:
        detector: torchvision's `SSD`, `RetinaNet` or `FCOS`. Its own call then takes inputs as they are prepared here,
            without another normalization or scaling: `raw.detector(images)` gives boxes in pixels of the input.
    """

    detector: Any

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.detector.transform = _AsGiven()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the class logits (N, anchors, classes) and box regressions (N, anchors, 4), by their names."""
        features: Any = self.detector.backbone(images)
        levels = [features] if isinstance(features, Tensor) else list(features.values())
        found: Mapping[str, Tensor] = self.detector.head(levels)
        return {name: found[name] for name in OUTPUTS if name in found}


def wrapped(model: nn.Module) -> nn.Module:
    """Return a detector as its raw network; any other network is returned as it is."""
    return RawDetector(model) if all(hasattr(model, part) for part in _PARTS) else model


class WithBoxes(nn.Module):
    """A detector with its post-processing as a network of one picture; its results are named as `FOUND` says.

    Args:
        raw: The network; it is not copied.
        example: A batch of inputs of the right size.
    """

    def __init__(self, raw: RawDetector, example: Tensor) -> None:
        super().__init__()
        self.raw = raw
        self._boxes = Boxes(raw, example)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the boxes (n, 4) in pixels of the input, their scores (n,) and labels (n,)."""
        (found,) = self._boxes.found(self.raw(images), images)
        return {name: found[name] for name in FOUND}


class Boxes:
    """Losses and boxes from raw outputs, by torchvision's own code; they do not depend on any weights.

    Args:
        raw: A network whose anchors and post-processing are used.
        example: A batch of inputs of the right size.
    """

    def __init__(self, raw: RawDetector, example: Tensor) -> None:
        with evaluated(raw), torch.no_grad():
            features: Any = raw.detector.backbone(example)
        levels = [features] if isinstance(features, Tensor) else list(features.values())
        self._outputs = _Outputs(raw.detector.head)
        self._detector = copy.copy(raw.detector)
        self._detector._modules = dict(raw.detector._modules)
        self._detector.backbone = _Shapes([(int(each.shape[-2]), int(each.shape[-1])) for each in levels])
        self._detector.head = self._outputs

    def loss(self, outputs: Mapping[str, Tensor], images: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """Return the sum of the detector's losses on a batch; targets have "boxes" (n, 4) and "labels" (n,)."""
        found = self._called(True, outputs, images, targets)
        return torch.stack(list(found.values())).sum()

    def found(self, outputs: Mapping[str, Tensor], images: Tensor) -> list[dict[str, Tensor]]:
        """Return the "boxes", "scores" and "labels" of each picture."""
        result: list[dict[str, Tensor]] = self._called(False, outputs, images, None)
        return result

    def _called(self, training: bool, outputs: Mapping[str, Tensor], images: Tensor, targets: Any) -> Any:
        self._detector.training = training  # of the copy alone
        self._outputs.values = {name: each.float() for name, each in outputs.items()}
        try:
            return self._detector(list(images), targets)
        finally:
            self._outputs.values = {}


class _AsGiven(nn.Module):
    """Takes pictures of equal size as they are, in the place of torchvision's scaling and normalization."""

    def forward(self, images: Any, targets: Any = None) -> Any:
        from torchvision.models.detection.image_list import ImageList

        batch = images if isinstance(images, Tensor) else torch.stack(list(images))
        return ImageList(batch, [(int(batch.shape[-2]), int(batch.shape[-1]))] * len(batch)), targets

    def postprocess(self, result: Any, image_shapes: Any, original_sizes: Any) -> Any:
        """Leave boxes in pixels of the input."""
        return result


class _Shapes(nn.Module):
    """Gives empty features of known sizes, in the place of a backbone: anchors depend on nothing else."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self._sizes = sizes

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(
            (str(level), images.new_zeros(1, 1, *size)) for level, size in enumerate(self._sizes)
        )


class _Outputs(nn.Module):
    """Gives outputs that are computed already, in the place of a head."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self.compute_loss = getattr(head, "compute_loss", None)

    def forward(self, features: Any) -> dict[str, Tensor]:
        return self.values


def check_detector(model: nn.Module, name: str, classes: int, shape: tuple[int, ...]) -> RawDetector:
    """Return a new network as a detector, after it ran once on a blank image.

    Raises:
        CompressorError: It is no detector of one stage, it cannot take such images, or it has other classes.
    """
    if not isinstance(model, RawDetector):
        raise CompressorError(
            f"{name} gives a {type(model).__name__}; a one-stage detector of torchvision was expected.",
            f"Have the factory return an SSD, RetinaNet or FCOS. By name: {', '.join(PREPARED)}.",
        )
    try:
        with evaluated(model), torch.no_grad():
            outputs = model(torch.zeros(1, *shape))
    except Exception as error:  # a factory's code may raise anything
        said = (str(error).splitlines() or [""])[0][:200]
        raise CompressorError(
            f"{name} fails on one image of {'x'.join(map(str, shape))}: {type(error).__name__}: {said}.",
            "Give another --image-size; most detectors need 64 pixels or more.",
        ) from error
    found = outputs[LOGITS].shape[-1] if LOGITS in outputs else 0
    if found != classes:
        raise CompressorError(
            f"{name} gives scores of {found} classes, and the data has {classes - 1} and the background.",
            "Have the factory accept num_classes, the background included.",
        )
    return model
