"""Whether two ways differ in their test accuracy by more than chance."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass


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


def compared(ours: Mapping[int, float], theirs: Mapping[int, float], images: int) -> Compared:
    """Compare accuracies (0..1) by seed, over the seeds that both have, where there are any.

    Args:
        ours, theirs: accuracy of each seed.
        images: how many each accuracy was taken on.
    """
    both = ours.keys() & theirs.keys()
    pair = [[value for seed, value in part.items() if not both or seed in both] for part in (ours, theirs)]
    first, second = (statistics.fmean(values) for values in pair)
    of_images = sum(
        mean * (1 - mean) / images / len(values) for mean, values in zip((first, second), pair, strict=True)
    )
    between = sum(statistics.variance(values) / len(values) for values in pair if len(values) > 1)
    return Compared(100 * (first - second), 200 * max(of_images, between) ** 0.5)
