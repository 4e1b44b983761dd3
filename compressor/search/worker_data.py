"""Data that a worker receives, the network and the images for scoring, and how it reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.data.images import ImageFile
from compressor.data.preprocessing import Preprocessing
from compressor.data.splits import FileSplit, MemorySplit, Split
from compressor.pruning.blueprint import blueprint
from compressor.pruning.space import PruningSpace


@dataclass(frozen=True)
class Images:
    """The two splits that an evaluator reads, on the worker's side."""

    train: Split
    search: Split


def described(
    space: PruningSpace, train: Split, search: Split, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of a `Scorer` without the weights: plain values, and the images of both splits as tensors.

    Args:
        space: Pruning space of the dense network.
        train, search: As the evaluator reads them.
        options: Arguments of the evaluator.
    """
    plain: dict[str, Any] = {"network": blueprint(space), "evaluator": dict(options)}
    images: dict[str, Tensor] = {}
    for name, split in (("train", train), ("search", search)):
        plain[name], tensors = _plain(split)
        images |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    return plain, images


def _plain(split: Split) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a split as plain values and, if it is in memory, tensors."""
    plain: dict[str, Any] = {"preprocessing": split.preprocessing.to_dict()}
    if isinstance(split, FileSplit):
        files = [[str(Path(file.path).resolve()), file.label] for file in split.files]
        return plain | {"files": files}, {}
    assert isinstance(split, MemorySplit)
    return plain, {"images": split.images.contiguous(), "labels": split.labels.contiguous()}


def split_of(name: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Split:
    preprocessing = Preprocessing.from_dict(plain["preprocessing"])
    if "files" in plain:
        files = [ImageFile(path, label) for path, label in plain["files"]]
        return FileSplit(files, preprocessing)
    return MemorySplit(tensors[f"{name}.images"], tensors[f"{name}.labels"], preprocessing)
