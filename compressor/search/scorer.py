"""A worker: it builds candidates of the dense network that it was given, and scores them.

Run as a program it answers the process that started it (`compressor.core.processes`); with Ray it is an actor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compressor.pruning.blueprint import read_tensors, rebuild, reweigh
from compressor.pruning.plan import ChannelPlan
from compressor.search.evaluate import Evaluator, Scoring
from compressor.search.workers import split_of
from compressor.training.classification import Classification

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace


class Scorer:
    """An evaluator of a network that another process described.

    Args:
        plain: `blueprint(space)` as "network", the splits' descriptions as "train" and "search", the task's
            "measure", the fields of `Scoring` as "scoring", the "device", and whether weights are in channels-last
            format as "channels_last".
        weights, images: Safetensors, as bytes or as the path of a file.
        threads: Number of torch's threads; None for the current number.
    """

    def __init__(
        self, plain: Mapping[str, Any], weights: bytes | str, images: bytes | str, threads: int | None = None
    ) -> None:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        device = str(plain["device"])
        self._space: PruningSpace = rebuild(plain["network"], read_tensors(weights), device)
        tensors = read_tensors(images)
        train, search = (split_of(name, plain[name], tensors) for name in ("train", "search"))
        task = Classification(train, search, measure=plain["measure"])
        self._evaluator = Evaluator(self._space, task, Scoring(**plain["scoring"]), device=device)
        self.reweigh(weights, plain["channels_last"])

    def reweigh(self, weights: bytes | str, channels_last: bool) -> None:
        """Score with these weights from now on."""
        reweigh(self._space, read_tensors(weights), channels_last)
        self._evaluator.weights_moved()

    def score(self, plan: str, floor: float | None) -> float:
        """Return the accuracy of a plan's network (the plan as JSON), 0..1; see `Evaluator`."""
        return self._evaluator.scored(ChannelPlan.from_json(plan), floor=floor)


def main() -> None:
    from compressor.core.processes import serve

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
