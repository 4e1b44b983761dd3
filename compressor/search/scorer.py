"""What a worker does: it builds candidates of the dense network that it was given, and scores them.

Run as a program it answers the process that started it (`compressor.core.child`); through Ray it is an actor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compressor.data.files import ImageFile
from compressor.data.preprocessing import Preprocessing
from compressor.data.splits import FileSplit, MemorySplit, Split
from compressor.pruning.blueprint import blueprint, read_tensors, rebuild, reweigh
from compressor.pruning.plan import ChannelPlan
from compressor.search.evaluate import Evaluator

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace


@dataclass(frozen=True)
class Images:
    """The two splits that an evaluator reads, as a worker sees them."""

    train: Split
    search: Split


class Scorer:
    """An evaluator of a network that another process described.

    Args:
        plain: `blueprint(space)` as "network", the splits' descriptions as "train" and "search", the evaluator's
            arguments as "evaluator", and whether weights lie in channels-last format as "channels_last".
        weights, images: safetensors, as bytes or as the path of a file.
        threads: torch's; None leaves them as they are.
    """

    def __init__(
        self, plain: Mapping[str, Any], weights: bytes | str, images: bytes | str, threads: int | None = None
    ) -> None:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        device = str(plain["evaluator"]["device"])
        self._space: PruningSpace = rebuild(plain["network"], read_tensors(weights), device)
        self.reweigh(weights, plain["channels_last"])
        tensors = read_tensors(images)
        data = Images(*(_split(name, plain[name], tensors) for name in ("train", "search")))
        self._evaluator = Evaluator(self._space, data, **plain["evaluator"])

    def reweigh(self, weights: bytes | str, channels_last: bool) -> None:
        """Score with these weights from now on."""
        reweigh(self._space, read_tensors(weights), channels_last)

    def score(self, plan: str, floor: float | None) -> float:
        """Accuracy of a plan's network (the plan as JSON), 0..1; see `Evaluator`."""
        model = self._space.apply(ChannelPlan.from_json(plan)).to(self._evaluator.device)
        return self._evaluator.score(model, floor=floor)


def described(
    space: PruningSpace, train: Split, search: Split, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a `Scorer` takes, but for the weights: plain values, and the images of both splits as tensors.

    Args:
        space: of the dense network.
        train, search: as the evaluator reads them.
        options: the evaluator's arguments.
    """
    plain: dict[str, Any] = {"network": blueprint(space), "evaluator": dict(options)}
    images: dict[str, Tensor] = {}
    for name, split in (("train", train), ("search", search)):
        plain[name], tensors = _plain(split)
        images |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    return plain, images


def _plain(split: Split) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A split as plain values and, where it lies in memory, tensors."""
    plain: dict[str, Any] = {"preprocessing": split.preprocessing.to_dict()}
    if isinstance(split, FileSplit):
        files = [[str(Path(file.path).resolve()), file.label] for file in split.files]
        return plain | {"files": files}, {}
    assert isinstance(split, MemorySplit)
    return plain, {"images": split.images.contiguous(), "labels": split.labels.contiguous()}


def _split(name: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Split:
    preprocessing = Preprocessing.from_dict(plain["preprocessing"])
    if "files" in plain:
        files = [ImageFile(path, label) for path, label in plain["files"]]
        return FileSplit(files, preprocessing)
    return MemorySplit(tensors[f"{name}.images"], tensors[f"{name}.labels"], preprocessing)


def main() -> None:
    from compressor.core.child import serve

    scorer: list[Scorer] = []

    def answer(request: dict[str, Any]) -> Any:
        if request["do"] == "begin":
            scorer.append(Scorer(request["plain"], request["weights"], request["images"]))
            return None
        if request["do"] == "weights":
            return scorer[0].reweigh(request["weights"], request["channels_last"])
        return scorer[0].score(request["plan"], request["floor"])

    serve(answer)


if __name__ == "__main__":
    main()
