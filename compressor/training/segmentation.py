"""The task of segmenting pictures: mean IoU, cross-entropy of the pixels, and distillation of their class scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.core.metrics import MEAN_IOU, Metric
from compressor.data import DataBundle, Split
from compressor.data.scenes import IGNORED
from compressor.models.computed import evaluated
from compressor.models.first_run import class_maps
from compressor.training.losses import distillation_loss, logits_of
from compressor.training.scenes import SceneTask
from compressor.training.settings import TrainSettings
from compressor.training.task import Losses, Precision
from export.convert.trees import channels_last


class Segmentation(SceneTask):
    """Pictures with the class of every pixel.

    Args:
        data: The data set; its targets are masks.
    """

    metric = Metric(MEAN_IOU)

    def __init__(self, data: DataBundle) -> None:
        super().__init__(data)
        self.classes = data.num_classes

    def losses(
        self,
        model: nn.Module,
        batch: Any,
        teacher: nn.Module | None,
        settings: TrainSettings,
        precision: Precision,
    ) -> Losses:
        images, masks = channels_last(batch[0]), batch[1].long()
        with precision():
            found = model(images)
        maps = logits_of(fitting(found, masks))
        loss = functional.cross_entropy(
            maps, masks, ignore_index=IGNORED, label_smoothing=settings.label_smoothing, reduction="sum"
        ) / (masks != IGNORED).sum().clamp(min=1)  # a batch may hold ignored pixels only
        distilled = None
        if teacher is not None:
            with torch.no_grad(), precision():
                goals = fitting(teacher(images), masks)
            mine, theirs = (each.movedim(1, -1).flatten(0, -2) for each in (maps, goals))
            distilled = distillation_loss(mine, theirs, settings.temperature)
        return Losses(loss, distilled, len(masks))

    def score(
        self,
        model: nn.Module,
        split: Split,
        device: str | torch.device,
        advance: Callable[[int], None] = lambda _: None,
    ) -> float:
        metric = mean_iou(self.classes).to(device)
        with evaluated(model), torch.no_grad():
            for images, masks in split.batches(self.batch_size, device=device):
                maps = fitting(model(channels_last(images)), masks)
                metric.update(maps.argmax(dim=1), masks.long())
                advance(len(masks))
        return float(metric.compute())


def mean_iou(classes: int) -> Any:
    """Return torchmetrics' mean over the classes of intersection over union, counted over all pixels of a split.

    Pixels of the class `IGNORED` do not count, nor do classes that neither the masks nor the network have.
    """
    from torchmetrics.classification import MulticlassJaccardIndex

    return MulticlassJaccardIndex(classes, average="macro", ignore_index=IGNORED, validate_args=False)


def fitting(output: Any, masks: Tensor) -> Tensor:
    """Return a network's class maps in the size of the masks (N, H, W): float32 (N, classes, H, W)."""
    maps: Tensor = class_maps(output).float()
    if maps.shape[-2:] == masks.shape[-2:]:
        return maps
    return functional.interpolate(maps, masks.shape[-2:], mode="bilinear", align_corners=False)
