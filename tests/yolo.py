"""A small detector with the constructs of YOLO networks: no weights of theirs and no code of any package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Unit(nn.Module):
    """Convolution, batch norm and an activation in place."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(c_out)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Pair(nn.Module):
    """Two 3x3 convolutions, with a shortcut or without."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.one, self.two, self.shortcut = Unit(width, width, 3), Unit(width, width, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x))
        return x + y if self.shortcut else y


class Halves(nn.Module):
    """Both halves of a convolution's channels, and what further blocks make of the second, side by side.

    Args:
        c_in, c_out, shortcut: Channels, and whether the blocks have shortcuts.
        form: How the halves are made: "chunk", "split" by sizes, or "apart", by two convolutions.
    """

    def __init__(self, c_in: int, c_out: int, shortcut: bool, form: str = "chunk") -> None:
        super().__init__()
        self.half, self.form = c_out // 2, form
        self.enter, self.leave = Unit(c_in, (1 + (form != "apart")) * self.half), Unit(3 * self.half, c_out)
        self.other = Unit(c_in, self.half) if form == "apart" else None
        self.blocks = nn.ModuleList([Pair(self.half, shortcut)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        if self.other is not None:
            parts = [y, self.other(x)]
        else:
            parts = list(torch.Tensor.split(y, (self.half, self.half), 1) if self.form == "split" else y.chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return self.leave(torch.cat(parts, 1))


class Pools(nn.Module):
    """A map beside the maps that repeated pooling makes of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = Unit(width, width // 2), Unit(4 * (width // 2), width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.enter(x)]
        parts.extend(self.pool(parts[-1]) for _ in range(3))
        return self.leave(torch.cat(parts, 1))


class Join(nn.Module):
    """Concatenation of channels."""

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, 1)


class Expected(nn.Module):
    """The expected distances of the four sides of a box, from the scores of bins: (N, 4 * bins, P) to (N, 4, P)."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins, self.conv = bins, nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins, dtype=torch.float32).reshape(1, bins, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        count, _, places = x.shape
        return self.conv(x.view(count, 4, self.bins, places).transpose(2, 1).softmax(1)).view(count, 4, places)


class Boxes(nn.Module):
    """Scores of classes and boxes for every place of two maps; the centres are kept for maps of the same shape."""

    def __init__(self, channels: Sequence[int], classes: int, bins: int, raw: bool) -> None:
        super().__init__()
        self.classes, self.bins, self.raw = classes, bins, raw
        self.shape: torch.Size | None = None
        self.centres, self.steps = torch.zeros(0), torch.zeros(0)
        self.stride = torch.tensor([4.0, 8.0])
        self.sides = nn.ModuleList(
            nn.Sequential(Unit(each, 16, 3), nn.Conv2d(16, 4 * bins, 1)) for each in channels
        )
        self.kinds = nn.ModuleList(
            nn.Sequential(Unit(each, 12, 3), nn.Conv2d(12, classes, 1)) for each in channels
        )
        self.expected = Expected(bins)

    def forward(self, x: list[Tensor]) -> Tensor | tuple[Tensor, dict[str, Tensor | list[Tensor]]]:
        count = x[0].shape[0]
        sides = torch.cat([part(y).view(count, 4 * self.bins, -1) for part, y in zip(self.sides, x, strict=True)], -1)
        kinds = torch.cat([part(y).view(count, self.classes, -1) for part, y in zip(self.kinds, x, strict=True)], -1)
        if self.shape != x[0].shape:
            self.centres, self.steps = (each.transpose(0, 1) for each in self._places(x))
            self.shape = x[0].shape
        before, after = self.expected(sides).chunk(2, 1)
        first, last = self.centres.unsqueeze(0) - before, self.centres.unsqueeze(0) + after
        boxes = torch.cat(((first + last) / 2, last - first), 1) * self.steps
        found = torch.cat((boxes, kinds.sigmoid()), 1)
        return (found, {"sides": sides, "kinds": kinds, "maps": x}) if self.raw else found

    def _places(self, x: list[Tensor]) -> tuple[Tensor, Tensor]:
        centres, steps = [], []
        for stride, y in zip(self.stride, x, strict=True):
            height, width = y.shape[-2:]
            rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            centres.append(torch.stack((columns, rows), -1).view(-1, 2))
            steps.append(torch.full((height * width, 1), stride.item()))
        return torch.cat(centres), torch.cat(steps)


class Yolo(nn.Module):
    """A list of layers with the numbers of those that each reads. 3xHxW, both multiples of 8, to (4 + classes, places).

    Args:
        raw: Whether the maps before the decoding of the boxes, and those that the head reads, are outputs, too.
        form: Of the halves; by default the second ones are split by their sizes.
    """

    def __init__(self, classes: int = 3, raw: bool = False, form: str = "chunk") -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                Unit(3, 8, 3, 2), Unit(8, 16, 3, 2), Halves(16, 16, True, form), Unit(16, 32, 3, 2),
                Halves(32, 32, True, "split" if form == "chunk" else form), Pools(32),
                nn.Upsample(None, 2, "nearest"), Join(), Halves(48, 16, False, form), Unit(16, 16, 3, 2), Join(),
                Halves(48, 32, False, form), Boxes((16, 32), classes, 4, raw),
            ]
        )  # fmt: skip
        self.reads = {7: [6, 2], 10: [9, 5], 12: [8, 11]}

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, dict[str, Tensor | list[Tensor]]]:
        made: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            x = layer([made[each] for each in self.reads[number]] if number in self.reads else x)
            made.append(x)
        return x
