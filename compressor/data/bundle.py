"""A data set as the rest of the toolkit sees it, and how its images are divided into splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.data.preprocessing import Preprocessing
from compressor.data.splits import Split

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DataBundle:
    """A data set in three disjoint splits.

    Attributes:
        name: Requested name, such as "digits" or "folder:/data/birds".
        classes: Names of the classes, in the order of the labels.
        input_shape: (channels, height, width) of one image.
        train: Images for training the weights.
        search: Held out from training; scores candidates, and is never reported.
        test: Reported, and never used for a choice.
        notes: What the user should know, such as the number of images that could not be read.
    """

    name: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    train: Split
    search: Split
    test: Split
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def facts(self) -> dict[str, Any]:
        """What a network's files say about the images that it takes and about its classes; JSON's kinds only."""
        return {"classes": list(self.classes), "preprocessing": self.preprocessing.to_dict()}

    @property
    def preprocessing(self) -> Preprocessing:
        """How its images become inputs; the same in all splits."""
        return self.train.preprocessing

    def prepared(self, preprocessing: Preprocessing) -> DataBundle:
        """The same images for another kind of network; see `Split.prepared`."""
        parts = {name: getattr(self, name).prepared(preprocessing) for name in ("train", "search", "test")}
        return replace(self, input_shape=preprocessing.input_shape, **parts)


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
