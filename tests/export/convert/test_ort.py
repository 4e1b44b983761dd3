"""Accuracy of a file for one input: many at a time where that is exact, one at a time where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from export.convert import ort
from export.convert.to_onnx import export_onnx

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Shuffled(nn.Module):
    """Reshapes with the batch's size in them, as ShuffleNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        batch, channels, height, width = x.shape
        x = (
            x.view(batch, 2, channels // 2, height, width)
            .transpose(1, 2)
            .reshape(batch, channels, height, width)
        )
        return self.head(x.mean((2, 3)))


class Mixing(Shuffled):
    """What it says of an image depends on those beside it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) - 3 * super().forward(x).mean(0, keepdim=True)


@pytest.mark.parametrize(("network", "largest"), [(Shuffled, 20), (Mixing, 1)])
def test_a_file_for_one_input_is_scored_as_it_is(
    network: type[nn.Module], largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = network().eval()
    export_onnx(model, IMAGES[:1], tmp_path / "net.onnx")
    with torch.no_grad():
        labels = torch.cat([model(image[None]) for image in IMAGES]).argmax(1).numpy()
    labels[:6] = (labels[:6] + 1) % 4
    sizes: list[int] = []
    original = ort.run_session

    def noted(session: Any, feeds: dict[str, Any]) -> Any:
        sizes.append(len(next(iter(feeds.values()))))
        return original(session, feeds)

    monkeypatch.setattr(ort, "run_session", noted)
    batches = [(IMAGES[:20].numpy(), labels[:20]), (IMAGES[20:].numpy(), labels[20:])]
    assert ort.accuracy_onnx(tmp_path / "net.onnx", batches) == 18 / 24
    assert max(sizes[-2:]) == largest
