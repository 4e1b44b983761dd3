"""Small networks that tests name as `tests.nets:NAME`."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from typing import ClassVar

import torch
from torch import nn

from compressor.data import load_data
from compressor.models import create_model


class Tiny(nn.Module):
    """Three convolutions with a residual addition: trains on digits in about a second an epoch."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv1 = nn.Conv2d(16, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 16, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.head = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.linear = nn.Linear(32, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        inner = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(inner)))
        return self.linear(self.head(x).mean((2, 3)))


def tiny(num_classes: int = 10) -> nn.Module:
    """`Tiny` as a factory."""
    return Tiny(num_classes)


def sure(num_classes: int = 10) -> nn.Module:
    """`Tiny` that ends in a softmax."""
    return nn.Sequential(Tiny(num_classes), nn.Softmax(dim=1))


def trained_tiny() -> nn.Module:
    """`Tiny`, trained on digits until the learning rate is 0: its running statistics are those of its weights."""
    model = create_model("tests.nets:tiny", 10)
    model.load_state_dict(_trained_weights())
    return model.eval()


@cache
def _trained_weights() -> dict[str, torch.Tensor]:
    epochs, data = 8, load_data("digits", seed=0)
    torch.manual_seed(0)
    model = create_model("tests.nets:tiny", len(data.classes))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    steps = epochs * len(list(data.train.batches(64)))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        for images, labels in data.train.batches(64, shuffle_seed=epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            rate.step()
    return model.state_dict()


def no_channels(num_classes: int = 10) -> nn.Module:
    """A network in which nothing can be pruned."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))


class Segmenter(nn.Module):
    """Two convolutions and class maps of half the size, as `out` of a dictionary."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.maps = nn.Conv2d(24, num_classes, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.maps(self.body(self.stem(x)))}


def segmenter(num_classes: int = 4) -> nn.Module:
    """`Segmenter` as a factory."""
    return Segmenter(num_classes)


class _Levels(nn.Module):
    """Features of an eighth and a sixteenth of the input's size."""

    out_channels: ClassVar[list[int]] = [32, 24]

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(32, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        second = self.second(self.first(x))
        return OrderedDict([("0", second), ("1", self.third(second))])


def detector(num_classes: int = 4) -> nn.Module:
    """A small detector of torchvision's kind."""
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD

    anchors = DefaultBoxGenerator([[2], [2]], scales=[0.3, 0.5, 0.7])
    return SSD(_Levels(), anchors, (32, 32), num_classes)


class NoOnnx(Tiny):
    """It can be pruned, but an operation on its classes has no form in ONNX."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        classes = super().forward(x)
        return classes + 1e-3 * torch.frac(classes)


def no_onnx(num_classes: int = 10) -> nn.Module:
    """`NoOnnx` as a factory."""
    return NoOnnx(num_classes)


def transformer(num_classes: int = 10) -> nn.Module:
    """A vision transformer of timm for images of 16x16 pixels: two blocks of four heads."""
    from timm.models import VisionTransformer

    return VisionTransformer(16, 4, num_classes=num_classes, embed_dim=32, depth=2, num_heads=4)
