"""What the rest of the toolkit sees of a data set, and how its images are dealt into splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compressor.data.splits import Split

MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's channels on the scale 0..1; every data set is normalised with it."""
STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's channels on the scale 0..1."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DataBundle:
    """A data set in three disjoint splits.

    Attributes:
        name: As it was asked for, such as "digits" or "folder:/data/birds".
        classes: Names of the classes, in the order of the labels.
        input_shape: (channels, height, width) of one image.
        mean: Per channel, subtracted after scaling to 0..1.
        std: Per channel, divided by after that.
        train: What the weights see.
        search: Held from training; scores candidates, and is never reported.
        test: Reported, and never chosen by.
        notes: What the user should know, such as the number of images that could not be read.
    """

    name: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    train: Split
    search: Split
    test: Split
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def hold_out(
    labels: Sequence[int] | Indices, share: float, limit: int | None, seed: int
) -> tuple[Indices, Indices]:
    """Deal indices into a part that stays and a part that is held out, stratified by label.

    Args:
        labels: One label an image, shape (N,).
        share: Share of each class to hold out, rounded to whole images, at least one where there are two.
        limit: The most images to hold out in all; the share is lowered to it.
        seed: Same seed, same split.

    Returns:
        (stays, held out), both ascending.
    """
    labels = np.asarray(labels, dtype=np.int64)
    if limit is not None and len(labels) * share > limit:
        share = limit / len(labels)
    rng = np.random.default_rng(seed)
    held: list[Indices] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(len(members) * share), 1), len(members) - 1)
        held.append(members[:count])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out
