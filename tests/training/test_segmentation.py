"""Mean IoU, loss and distillation of class maps, by hand."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from compressor.data.preprocessing import Preprocessing
from compressor.data.scenes import Drawn, SceneSplit
from compressor.data.splits import DataBundle
from compressor.training.segmentation import Segmentation
from compressor.training.settings import TrainSettings


class Fixed(nn.Module):
    """Returns the same class maps for every picture."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.maps.expand(len(x), -1, -1, -1)}


def task(*masks: list[list[int]], classes: int = 2) -> Segmentation:
    """The task of blank pictures of 2x2 with these masks."""
    scenes = [Drawn(torch.zeros(3, 2, 2, dtype=torch.uint8), torch.tensor(mask, dtype=torch.uint8)) for mask in masks]
    split = SceneSplit(scenes, Preprocessing(size=2, crop_share=1.0))
    names = tuple(map(str, range(classes)))
    return Segmentation(DataBundle("masks", names, (3, 2, 2), split, split, split))


def answering(classes: list[list[int]], number: int = 2) -> Fixed:
    """A network that is sure of these classes."""
    return Fixed(10 * nn.functional.one_hot(torch.tensor(classes), number).permute(2, 0, 1)[None].float())


def test_mean_iou_by_hand() -> None:
    # class 0: 2 of 3 pixels in either; class 1: none of 1, and what is said of the ignored pixel does not count
    network = answering([[0, 0], [0, 1]])
    assert task([[0, 0], [1, 255]]).test_score(network, None, "cpu") == pytest.approx((2 / 3 + 0) / 2)


def test_classes_that_nobody_has_do_not_count() -> None:
    assert task([[0, 0], [1, 255]], classes=3).test_score(answering([[0, 0], [1, 2]], 3), None, "cpu") == 1


def test_pixels_are_counted_over_all_pictures() -> None:
    # class 0: 3 of 3 and 1 of 3 pixels; class 1: 1 of 1 and 1 of 3
    both = task([[0, 0], [0, 1]], [[1, 1], [0, 1]])
    score = both.test_score(answering([[0, 0], [0, 1]]), None, "cpu")
    assert score == pytest.approx((4 / 6 + 2 / 4) / 2)


def test_the_loss_ignores_pixels_without_a_class() -> None:
    maps = torch.randn(1, 2, 2, 2)
    found = task([[0, 0], [1, 255]])
    batch = next(iter(found.test.batches(1)))  # type: ignore[union-attr]
    losses = found.losses(Fixed(maps), batch, None, TrainSettings(), nullcontext)
    logs = maps[0].log_softmax(dim=0)
    assert losses.loss is not None
    assert float(losses.loss) == pytest.approx(float(-(logs[0, 0, 0] + logs[0, 0, 1] + logs[1, 1, 0]) / 3), rel=1e-5)
    nothing = found.losses(Fixed(maps), (batch[0], torch.full_like(batch[1], 255)), None, TrainSettings(), nullcontext)
    assert nothing.loss == 0


def test_distillation_is_the_mean_divergence_of_the_pixels() -> None:
    found = task([[0, 0], [1, 1]])
    batch = next(iter(found.test.batches(1)))  # type: ignore[union-attr]
    mine, theirs = torch.randn(1, 2, 2, 2), torch.randn(1, 2, 2, 2)
    settings = TrainSettings()
    losses = found.losses(Fixed(mine), batch, Fixed(theirs), settings, nullcontext)
    soft = [(maps / settings.temperature).log_softmax(dim=1) for maps in (mine, theirs)]
    divergence = (soft[1].exp() * (soft[1] - soft[0])).sum(dim=1).mean() * settings.temperature**2
    assert losses.distilled is not None
    assert float(losses.distilled) == pytest.approx(float(divergence), rel=1e-4)


def test_small_maps_are_scaled_to_the_mask() -> None:
    network = Fixed(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
    assert task([[0, 0], [0, 0]]).test_score(network, None, "cpu") == 1
