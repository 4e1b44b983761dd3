"""Whether two ways differ in their test accuracy by more than chance."""

from __future__ import annotations

import base64
import statistics
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Right = NDArray[np.bool_]
"""Whether each test image (N,) is classified correctly."""


@dataclass(frozen=True)
class Compared:
    """A difference of mean accuracies.

    Attributes:
        gap: ours less theirs, in points.
        noise: two standard errors of it, in points: of the test images, or between seeds where that is larger.
    """

    gap: float
    noise: float

    @property
    def verdict(self) -> str:
        if abs(self.gap) <= self.noise:
            return "not distinguishable from"
        return "better than" if self.gap > 0 else "worse than"


def compared(
    ours: Mapping[int, float],
    theirs: Mapping[int, float],
    images: int,
    right: tuple[Mapping[int, Right], Mapping[int, Right]] | None = None,
) -> Compared:
    """Compare accuracies (0..1) by seed, over the seeds that both have, where there are any.

    Args:
        ours, theirs: accuracy of each seed.
        images: how many each accuracy was taken on.
        right: by seed, which of the same images each network has right. Networks of one dense network err on mostly the
            same images, so that the difference is known more exactly than that of accuracies on other images each.
    """
    both = ours.keys() & theirs.keys()
    pair = [[value for seed, value in part.items() if not both or seed in both] for part in (ours, theirs)]
    first, second = (statistics.fmean(values) for values in pair)
    if right is not None and both and all(both <= part.keys() for part in right):
        shares = [np.mean([part[seed] for seed in sorted(both)], axis=0) for part in right]
        of_images = float(np.var(shares[0] - shares[1])) / images
    else:
        of_images = sum(
            mean * (1 - mean) / images / len(values) for mean, values in zip((first, second), pair, strict=True)
        )
    between = sum(statistics.variance(values) / len(values) for values in pair if len(values) > 1)
    return Compared(100 * (first - second), 200 * max(of_images, between) ** 0.5)


def packed(right: Right) -> str:
    """Return as text which images (N,) are right; `unpacked` reads it."""
    return base64.b85encode(zlib.compress(np.packbits(right).tobytes(), 9)).decode()


def unpacked(text: str, images: int) -> Right:
    """Return which of `images` images are right, from what `packed` wrote."""
    bits = np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype=np.uint8)
    return np.unpackbits(bits, count=images).astype(bool)
