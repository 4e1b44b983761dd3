"""Accuracies of plans on the current weights: each is evaluated once, and workers score some in advance."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan

Key = tuple[int, ...]
Evaluate = Callable[..., float]


def checked_accuracy(accuracy: float) -> float:
    """Return an evaluator's accuracy, 0..1.

    Raises:
        CompressorError: It is not a number in that range.
    """
    if not 0.0 <= accuracy <= 1.0:
        raise CompressorError(
            f"The evaluation of a candidate gave an accuracy of {accuracy}, expected a number from 0 to 1.",
            "Check whether the weights are NaN, or the search split is empty. Earlier results are saved.",
        )
    return float(accuracy)


@dataclass(frozen=True)
class Early:
    """An accuracy scored in advance, the floor that it was scored with, and its seconds."""

    accuracy: float
    floor: float | None
    seconds: float

    def serves(self, floor: float | None) -> bool:
        """Return whether scoring with this floor would give the same; below its own floor it is only an estimate."""
        if floor == self.floor:
            return True
        whole = self.floor is None or self.accuracy >= self.floor
        return whole and (floor is None or self.accuracy >= floor)


class Accuracies:
    """Accuracies of widths (a tuple of G), remembered until the weights change.

    Args:
        evaluate: Accuracy of a plan, 0..1; the keyword `floor` is an accuracy below which it may stop early. With
            several `workers`, its method `many` scores plans in parallel.
        plan: Converts widths to their plan.

    Attributes:
        known: Accuracies that were requested and fully evaluated.
    """

    def __init__(self, evaluate: Evaluate, plan: Callable[[Key], ChannelPlan]) -> None:
        self.known: dict[Key, float] = {}
        self._evaluate, self._plan = evaluate, plan
        self._ahead: dict[Key, Early] = {}

    @property
    def workers(self) -> int:
        """Number of plans that the evaluator scores in parallel."""
        return int(getattr(self._evaluate, "workers", 1))

    def ask(self, key: Key, floor: float | None) -> tuple[float, float]:
        """Return the accuracy of widths that are not known yet, and the seconds that it took.

        Raises:
            CompressorError: It is not a number from 0 to 1.
        """
        started = time.perf_counter()
        early = self._ahead.pop(key, None)
        if early is not None and early.serves(floor):
            accuracy, before = early.accuracy, early.seconds
        else:
            plan, before = self._plan(key), 0.0
            accuracy = float(self._evaluate(plan) if floor is None else self._evaluate(plan, floor=floor))
        accuracy = checked_accuracy(accuracy)
        if floor is None or accuracy >= floor:
            self.known[key] = accuracy
        return accuracy, before + time.perf_counter() - started

    def ahead(self, proposals: Iterable[tuple[Key, float | None]]) -> None:
        """Score plans that will probably be requested next, each with its floor; with one worker, draw none.

        Nothing is remembered or counted before `ask`. At most as many new plans are scored as there are workers.
        """
        if self.workers <= 1:
            return
        wanted: dict[Key, float | None] = {}
        for count, (key, floor) in enumerate(itertools.islice(proposals, 2 * self.workers)):
            early = self._ahead.get(key)
            if key not in self.known and (early is None or not early.serves(floor)):
                wanted[key] = floor
            elif count == 0:
                return  # the next request needs no scoring: it is too early
            if len(wanted) == self.workers:
                break
        if not wanted:
            return
        started = time.perf_counter()
        plans, floors = [self._plan(key) for key in wanted], list(wanted.values())
        accuracies = self._evaluate.many(plans, floors=floors, remember=False)  # type: ignore[attr-defined]
        seconds = (time.perf_counter() - started) / len(wanted)
        for (key, floor), accuracy in zip(wanted.items(), accuracies, strict=True):
            self._ahead[key] = Early(float(accuracy), floor, seconds)

    def forget(self) -> None:
        """Forget all accuracies after the weights changed."""
        self.known.clear()
        self._ahead.clear()
