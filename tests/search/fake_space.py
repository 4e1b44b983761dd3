"""A space, budgets, an evaluator and a trainer without a network: numbers follow from widths alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class FakeGroup:
    name: str
    width: int
    granularity: int
    min_width: int
    index: int
    coupled: bool = False


@dataclass(frozen=True)
class FakeAffine:
    constant: int
    terms: tuple[tuple[int, int], ...] = ()

    def __call__(self, widths: np.ndarray) -> np.ndarray:
        return np.full(len(widths), self.constant) + sum(c * widths[:, i] for i, c in self.terms)


@dataclass(frozen=True)
class FakePlan:
    keep: dict[str, tuple[int, ...]]
    removed: tuple[str, ...] = ()

    @property
    def widths(self) -> dict[str, int]:
        return {name: len(kept) for name, kept in self.keep.items()}


class FakeSpace:
    """Convolutions in a chain on 8 x 8 images; group i is what layer i puts out, a last layer has 10."""

    def __init__(
        self, dense: list[int], granularity: int | list[int] = 1, smallest: int | list[int] = 1
    ) -> None:
        steps = granularity if isinstance(granularity, list) else [granularity] * len(dense)
        least = smallest if isinstance(smallest, list) else [smallest] * len(dense)
        self.groups = tuple(FakeGroup(f"g{i}", dense[i], steps[i], least[i], i) for i in range(len(dense)))
        self.dense_widths = np.array(dense, dtype=np.int64)
        sides = [FakeAffine(3), *(FakeAffine(0, ((i, 1),)) for i in range(len(dense))), FakeAffine(10)]
        self.layers = tuple(
            SimpleNamespace(
                name=f"conv{i}",
                kind="conv",
                kernel=(3, 3),
                stride=(1 + i % 2,) * 2,
                padding=(1, 1),
                in_channels=sides[i],
                out_channels=sides[i + 1],
            )
            for i in range(len(dense) + 1)
        )
        self.ranked = 0
        self.depth, self.blocks, self.columns = False, (), len(dense)
        self.dense_row = self.dense_widths
        self.smallest_row = np.array([self.choices(i)[0] for i in range(len(dense))], dtype=np.int64)

    def settled(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def row(self, plan: Any) -> np.ndarray:
        return np.array([plan.widths[group.name] for group in self.groups], dtype=np.int64)

    def choices(self, i: int) -> np.ndarray:
        group = self.groups[i]
        steps = range(group.granularity, group.width + 1, group.granularity)
        legal = sorted({w for w in steps if w >= group.min_width} | {group.width})
        return np.array(legal, dtype=np.int64)

    def round(self, widths: np.ndarray) -> np.ndarray:
        nearest = [self.choices(i)[np.abs(self.choices(i) - w).argmin()] for i, w in enumerate(widths)]
        return np.array(nearest, dtype=np.int64)

    def macs(self, widths: np.ndarray) -> np.ndarray:
        widths = np.atleast_2d(widths)
        first, last = self.layers[0].in_channels.constant, self.layers[-1].out_channels.constant
        pairs = (widths[:, :-1] * widths[:, 1:]).sum(axis=1)
        return 9 * 64 * (first * widths[:, 0] + pairs + widths[:, -1] * last)

    def rank(self, importance: Any = "l1", data: Any = None) -> Any:
        self.ranked += 1
        return SimpleNamespace(scores=[np.linspace(2, 0, group.width) for group in self.groups])

    def plan(self, widths: Any, importance: Any = "l1") -> FakePlan:
        return FakePlan({g.name: tuple(range(int(w))) for g, w in zip(self.groups, widths, strict=True)})


@dataclass
class FakeBudget:
    """A cost from a function of widths (N, G); `calls` counts rows."""

    name: str
    target: float
    function: Any
    unit: str = "units"
    rows: int = 0

    def predict(self, widths: np.ndarray) -> np.ndarray:
        assert widths.ndim == 2
        self.rows += len(widths)
        return np.asarray(self.function(widths), dtype=np.float64)


def macs_budget(space: FakeSpace, share: float) -> FakeBudget:
    return FakeBudget("macs", share * float(space.macs(space.dense_widths)[0]), space.macs, "MACs")


class FakeEvaluator:
    """Accuracy rises with the widths of groups that matter, and with training; counts its calls."""

    def __init__(self, space: FakeSpace, worth: list[float], trained: FakeTrainer | None = None) -> None:
        self.dense = space.dense_widths
        self.worth = np.array(worth) / sum(worth)
        self.trained = trained
        self.evaluations = 0
        self.moves = 0
        self.fail_after: int | None = None

    def __call__(self, plan: FakePlan, *, floor: float | None = None) -> float:
        if self.fail_after is not None and self.evaluations >= self.fail_after:
            raise KeyboardInterrupt
        self.evaluations += 1
        torch.rand(3)  # evaluation may draw from the global generators
        np.random.rand(2)
        ratios = np.array(list(plan.widths.values())) / self.dense
        learned = (
            1.0 if self.trained is None else float(self.trained.weight) / (1 + float(self.trained.weight))
        )
        return float(learned * (self.worth * np.sqrt(ratios)).sum())

    def weights_moved(self) -> None:
        self.moves += 1


@dataclass
class FakeTrainer:
    """One number is the network's weight; each epoch adds to it, partly at random."""

    weight: torch.Tensor = field(default_factory=lambda: torch.tensor(1.0, dtype=torch.float64))
    regulariser: Any = None
    epoch: int = 0
    steps_per_epoch: int = 3
    seen: list[Any] = field(default_factory=list)
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def run_epoch(self, on_step: Callable[[int], None] | None = None) -> SimpleNamespace:
        if on_step is not None:
            on_step(self.steps_per_epoch)
        self.weight = self.weight + 1 + torch.rand(1, generator=self.random, dtype=torch.float64)[0]
        self.epoch += 1
        self.seen.append(self.regulariser)
        return SimpleNamespace(loss=1.0 / float(self.weight), accuracy=0.5, seconds=0.01, regulariser=0.0)

    def state(self) -> dict[str, Any]:
        return {"weight": self.weight.clone(), "epoch": self.epoch, "random": self.random.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.weight, self.epoch = state["weight"].clone(), state["epoch"]
        self.random.set_state(state["random"])
