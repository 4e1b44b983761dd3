"""Accuracies of plans on the present weights: each is asked for once, and workers score some of them ahead."""

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
    """The accuracy that an evaluator gave, 0..1.

    Raises:
        CompressorError: it is no such number; nothing can be learned from it.
    """
    if not 0.0 <= accuracy <= 1.0:
        raise CompressorError(
            f"The evaluation of a candidate gave an accuracy of {accuracy}, expected a number from 0 to 1.",
            "Are the weights NaN, or is the search split empty? What was found until then is kept.",
        )
    return float(accuracy)


@dataclass(frozen=True)
class Early:
    """An accuracy that was not asked for yet, the floor that it was scored with, and its seconds."""

    accuracy: float
    floor: float | None
    seconds: float

    def serves(self, floor: float | None) -> bool:
        """Whether scoring with this floor would give the same; below its own, an accuracy is but an estimate."""
        if floor == self.floor:
            return True
        whole = self.floor is None or self.accuracy >= self.floor
        return whole and (floor is None or self.accuracy >= floor)


class Accuracies:
    """What an evaluator says of widths (a tuple of G), remembered until the weights move.

    Args:
        evaluate: accuracy of a plan, 0..1; with the keyword `floor`, one below which it may give up. With several
            `workers`, its method `many` scores plans side by side.
        plan: from widths to their plan.

    Attributes:
        known: accuracies that were asked for and not given up.
    """

    def __init__(self, evaluate: Evaluate, plan: Callable[[Key], ChannelPlan]) -> None:
        self.known: dict[Key, float] = {}
        self._evaluate, self._plan = evaluate, plan
        self._ahead: dict[Key, Early] = {}

    @property
    def workers(self) -> int:
        """Plans that the evaluator scores at a time."""
        return int(getattr(self._evaluate, "workers", 1))

    def ask(self, key: Key, floor: float | None) -> tuple[float, float]:
        """The accuracy of widths that are not known yet, and the seconds that it took.

        Raises:
            CompressorError: it is no number from 0 to 1.
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
        """Score what will probably be asked for next, each with its floor; with one worker, nothing is drawn.

        Nothing is remembered or counted before `ask` asks. As many new ones are taken as there are workers.
        """
        if self.workers <= 1:
            return
        wanted: dict[Key, float | None] = {}
        for count, (key, floor) in enumerate(itertools.islice(proposals, 2 * self.workers)):
            early = self._ahead.get(key)
            if key not in self.known and (early is None or not early.serves(floor)):
                wanted[key] = floor
            elif count == 0:
                return  # what is asked for next needs no scoring: it is too early
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
        """The weights are others now."""
        self.known.clear()
        self._ahead.clear()
