"""The task of detecting objects: mAP, the detector's own loss, and distillation of its raw outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.metrics import MEAN_AP, Metric
from compressor.data import DataBundle, Split
from compressor.models.computed import evaluated
from compressor.models.detectors import Boxes, RawDetector
from compressor.training.likeness import RawOutputs
from compressor.training.scenes import SceneTask
from compressor.training.settings import TrainSettings
from compressor.training.task import Losses, Precision
from export.convert.trees import channels_last, outputs_of


class Detection(SceneTask):
    """Pictures with boxes.

    Args:
        data: The data set; its targets are boxes.
        model: The dense network, whose anchors and post-processing are used for all.
    """

    metric = Metric(MEAN_AP)

    def __init__(self, data: DataBundle, model: RawDetector) -> None:
        super().__init__(data)
        self._boxes = Boxes(model, self.example[0])
        self._likeness = RawOutputs()

    def losses(
        self,
        model: nn.Module,
        batch: Any,
        teacher: nn.Module | None,
        settings: TrainSettings,
        precision: Precision,
    ) -> Losses:
        images = channels_last(batch[0])
        with precision():
            outputs = model(images)
        loss = self._boxes.loss(outputs, images, [_target(boxes) for boxes in batch[1]])
        distilled = None
        if teacher is not None:
            with torch.no_grad(), precision():
                goals = teacher(images)
            distilled = self._likeness.distance(outputs_of(outputs), outputs_of(goals), settings.temperature)
        return Losses(loss, distilled, len(images))

    def score(
        self,
        model: nn.Module,
        split: Split,
        device: str | torch.device,
        advance: Callable[[int], None] = lambda _: None,
    ) -> float:
        with evaluated(model), torch.no_grad():
            return self.found_score(
                lambda images: self._boxes.found(model(channels_last(images)), images), split, device, advance
            )

    def found_score(
        self,
        find: Callable[[Tensor], list[dict[str, Tensor]]],
        split: Split,
        device: str | torch.device,
        advance: Callable[[int], None] = lambda _: None,
    ) -> float:
        """Return the mAP of what a function finds in the pictures of a split; see `score`."""
        metric = mean_ap()
        for images, targets in split.batches(self.batch_size, device=device):
            metric.update(_on_cpu(find(images)), _on_cpu([_target(boxes) for boxes in targets]))
            advance(len(images))
        return max(0.0, float(metric.compute()["map"]))  # -1 if there are no boxes at all


def mean_ap() -> Any:
    """Return torchmetrics' mean average precision as COCO counts it: over classes and overlaps from 50 % to 95 %."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox", backend="pycocotools")
    metric.warn_on_many_detections = False
    return metric


def _target(boxes: Tensor) -> dict[str, Tensor]:
    """Return boxes (n, 5) as torchvision's detectors take them."""
    return {"boxes": boxes[:, :4], "labels": boxes[:, 4].long()}


def _on_cpu(found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: each.cpu() for name, each in picture.items()} for picture in found]
