"""Values of widths, and the widths of the largest total value within the budgets: a knapsack whose prices interact."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compressor.budgets.function import FunctionBudget
from compressor.core import progress
from compressor.search.bounds import Widths
from compressor.search.environment import PruningEnv
from compressor.search.proposals import scaled_widths, uniform_or_cheapest
from compressor.search.records import MEASUREMENT

if TYPE_CHECKING:
    from compressor.search.session import SearchSession


POWERS = (1.0, 0.5, 0.25)
"""Exponents of the saliency: lower ones raise a layer's weak channels relative to its strong ones."""

_SAVE_EVERY = 5
_LEAST = 1e-4
_MOST = 0.99


def saliency_values(
    saliency: Sequence[NDArray[np.float64]], levels: Sequence[Widths], power: float
) -> list[NDArray[np.float64]]:
    """Return the value of each level of each group: the sum of its channels' saliencies, each to a power."""
    values = []
    for scores, widths in zip(saliency, levels, strict=True):
        kept = np.concatenate([[0.0], np.cumsum(np.sort(np.maximum(scores, 0.0) ** power)[::-1])])
        values.append(kept[widths])
    return values


class Sensitivity:
    """Cost of pruning one group alone, measured at few widths and fitted by a power of the removed share.

    Args:
        run: Session that scores the plans.
        levels: Widths of each group for which values are needed.

    Attributes:
        losses: For each group measured so far, pairs of removed share and lost reward.
    """

    def __init__(self, run: SearchSession, levels: Sequence[Widths]) -> None:
        self._run, self._levels = run, levels
        self.losses: list[list[list[float]]] = []

    def measure(self, points: int = 2) -> None:
        """Measure the remaining groups, saving now and then.

        Args:
            points: Widths measured in each group, 1 or 2: a quarter of the channels kept, and a half. A block is only
                removed.
        """
        shares = (0.25, 0.5)[:points]
        env, groups = self._run.env, len(self._levels)
        with progress.bar("Measuring each group", total=groups) as bar:
            bar.advance(len(self.losses))
            for group in self._run.remaining(MEASUREMENT, groups):
                if self._run.spent(reserve=1):
                    return
                pairs = []
                for kept in self._shares(group, shares):
                    if self._run.late:
                        return
                    levels, widths = self._levels[group], self._cut(group, kept)
                    env.ahead(self._planned(group, kept, shares))
                    lost = env.score(env.bounds.dense).reward - self._run.score(widths, MEASUREMENT).reward
                    pairs.append([1.0 - float(widths[group] / levels[-1]), float(lost)])
                self.losses.append(pairs)
                self._run.place.steps[MEASUREMENT] = group + 1
                if (group + 1) % _SAVE_EVERY == 0 or group + 1 == groups:
                    self._run.save()
                bar.advance()

    def _shares(self, group: int, shares: Sequence[float]) -> Sequence[float]:
        return shares if group < self._run.env.bounds.groups else shares[:1]

    def _cut(self, group: int, kept: float) -> Widths:
        """Return the widths with one group pruned to about this share of its channels."""
        widths, levels = self._run.env.bounds.dense.copy(), self._levels[group]
        widths[group] = levels[np.abs(levels - kept * levels[-1]).argmin()]
        return widths

    def _planned(self, group: int, kept: float, shares: Sequence[float]) -> Iterator[Widths]:
        """Yield the plans to score from this one on; the first time, the dense network is the reference."""
        dense = self._run.env.bounds.dense
        if not self._run.env.known(dense):
            yield dense
        cuts = [(each, share) for each in range(group, len(self._levels)) for share in self._shares(each, shares)]
        for each, share in cuts[cuts.index((group, kept)) :]:
            yield self._cut(each, share)

    @property
    def complete(self) -> bool:
        """Whether every group is measured."""
        return len(self.losses) == len(self._levels)

    def sum(self, widths: Widths) -> NDArray[np.float64]:
        """Return the sum of the groups' effects on the logarithm of the reward, of plans (N, G); 0 if unmeasured."""
        removed = 1.0 - widths / self._run.env.bounds.dense
        lost = [_Fitted(pairs)(removed[:, group]) for group, pairs in enumerate(self.losses)]
        return np.asarray(np.log1p(-np.clip(lost, 0.0, _MOST)).sum(axis=0)) if lost else np.zeros(len(widths))

    def values(self) -> list[NDArray[np.float64]]:
        """Return the value of each level of each group: the negative fitted loss."""
        return [
            -_Fitted(pairs)(1.0 - levels / levels[-1])
            for pairs, levels in zip(self.losses, self._levels, strict=True)
        ]


def starting_plans(
    env: PruningEnv, allocator: Allocator, sensitivity: Sensitivity
) -> list[Callable[[], Widths]]:
    """Return the uniform plan and knapsack plans within the budgets; each is solved when it is called.

    The values of the knapsacks are the measured sensitivities, if they are complete, and powers of the saliency.
    """
    found: list[Callable[[], Widths]] = [partial(uniform_or_cheapest, env)]
    if sensitivity.complete:
        found.append(lambda: allocator.solve(sensitivity.values()))
    return [*found, *(partial(allocator.solve_saliency, power) for power in POWERS)]


class _Fitted:
    """loss(x) = a * (x / x1) ** p through one or two points; p is 2 for one, and between 1 and 6 for two."""

    def __init__(self, pairs: Sequence[Sequence[float]]) -> None:
        self._most, lost = pairs[0]
        self._lost = max(lost, _LEAST)
        self._power = 2.0
        if len(pairs) > 1 and 0 < pairs[1][0] < self._most:
            half, at_half = pairs[1]
            at_half = min(max(at_half, 1e-3 * self._lost), self._lost)
            power = np.log(self._lost / at_half) / np.log(self._most / half)
            self._power = float(np.clip(power, 1.0, 6.0))

    def __call__(self, removed: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._most <= 0:  # the group has no smaller width
            return np.zeros_like(removed)
        return self._lost * np.power(removed / self._most, self._power)


Values = Sequence[NDArray[np.float64]]
"""For each group the value of keeping each of its `Allocator.levels`; it rises with the width."""

_BINS = 2000
_ITERATIONS = 24
_POLISHING = 60
_TRIED = 256
_TRIED_EXPENSIVE = 16
"""Number of estimated moves that are priced first if each price is a call of a user's function."""
_STEPS = (1, 2, 4, 8)


class Allocator:
    """Chooses one width per group so that the sum of values is largest and all budgets are met.

    Latency-aware pruners solve this problem (HALP, arXiv 2110.10811; Shen et al., NeurIPS 2022): a multiple-choice
    knapsack, solved by dynamic programming. The price of a group's width depends on its neighbors', because a layer's
    cost depends on its inputs and outputs together. So prices are computed at the current widths, the knapsack is
    solved within a range around them, and the solution, scaled to meet the true budgets, is the next point. The range
    shrinks when there is no improvement. Finally, single steps and exchanges of steps between two groups are made as
    long as they raise the value. If blocks may go, this is done from three plans, and the best result counts.

    Several budgets share one price, in which those closest to their limit have the largest weight.

    Args:
        env: Environment with widths, budgets and rounding.
        levels: Maximum number of widths considered per group, evenly spaced.
    """

    def __init__(self, env: PruningEnv, levels: int = 64) -> None:
        self.env = env
        self.bounds = env.bounds
        self._expensive = any(isinstance(budget, FunctionBudget) for budget in env.budgets)
        self.levels: tuple[Widths, ...] = tuple(
            choices[
                np.unique(
                    np.linspace(0, len(choices) - 1, min(levels, len(choices))).round().astype(np.int64)
                )
            ]
            for choices in self.bounds.choices
        )

    def solve(self, values: Values) -> Widths:
        """Return the best widths found, (G,), legal and within the budgets."""
        dense = self.bounds.dense
        if self.bounds.feasible(dense)[0]:
            return dense.copy()
        found = [self._climbed(start, values) for start in self._starts(values)]
        return max(found, key=lambda widths: self._value(widths, values))

    def _starts(self, values: Values) -> list[Widths]:
        """Return legal plans (G,) within the budgets: the uniform one and, if blocks may go, plans with fewer of them.

        Where narrow layers are hardly faster, no path of better plans may lead from one to the other.
        """
        starts = [self._snap(uniform_or_cheapest(self.env))]
        gone = [] if self._expensive else self._blocks_first(values)
        for removed in (gone[: len(gone) // 2], gone):
            if removed:
                row = self.bounds.dense.copy()
                row[removed] = 0
                starts.append(self._snap(self._fitted(row)))
        return list({start.tobytes(): start for start in starts}.values())

    def _blocks_first(self, values: Values) -> list[int]:
        """Return the columns of blocks to remove from the dense network, in their order, until it keeps the budgets.

        The next one is that of the least value for the share of the budget that it saves.
        """
        row, gone = self.bounds.dense.copy(), list[int]()
        left = list(range(self.bounds.groups, len(row)))
        while left and not self.bounds.feasible(row)[0]:
            rows = np.repeat(row[None], len(left) + 1, axis=0)
            rows[np.arange(len(left)), left] = 0
            shares = self.bounds.shares(rows).max(axis=0)
            saved = np.maximum(shares[-1] - shares[:-1], 1e-12)
            lost = np.array([values[column][-1] - values[column][0] for column in left])
            gone.append(left.pop(int((lost / saved).argmin())))
            row[gone] = 0
        return gone

    def _climbed(self, current: Widths, values: Values) -> Widths:
        """Return the best widths (G,) that solutions at changing prices, and then single moves, lead to."""
        best, best_value = current, self._value(current, values)
        reach = 2.0
        for _ in range(_ITERATIONS):
            found = self._snap(self._fitted(self._knapsack(current, values, reach)))
            value = self._value(found, values)
            if value > best_value + 1e-9 * abs(best_value):
                best, best_value = found, value
            else:
                reach /= 2
            if reach < 0.05:
                break
            current = best
        return self._polish(best, values)

    def solve_saliency(self, power: float) -> Widths:
        """Return the best widths found, (G,), with a power of the channels' saliency as value."""
        return self.solve(saliency_values(self.env.saliency(), self.levels, power))

    def _fitted(self, widths: Widths) -> Widths:
        return scaled_widths(self.env, widths / self.bounds.dense)

    def _snap(self, widths: Widths) -> Widths:
        """Round down to levels; return the cheapest widths if these exceed a budget."""
        lower = [
            levels[max(0, np.searchsorted(levels, w, "right") - 1)]
            for levels, w in zip(self.levels, widths, strict=True)
        ]
        snapped: Widths = np.array(lower, dtype=np.int64)
        return snapped if self.bounds.feasible(snapped)[0] else self.bounds.cheapest.copy()

    def _value(self, widths: Widths, values: Values) -> float:
        at = [np.searchsorted(levels, w) for levels, w in zip(self.levels, widths, strict=True)]
        return float(sum(value[min(i, len(value) - 1)] for value, i in zip(values, at, strict=True)))

    def _prices(self, current: Widths) -> list[NDArray[np.float64]]:
        """Return the price of each level of each group with the others unchanged; 1 is the whole budget."""
        rows = np.repeat(current[None], sum(map(len, self.levels)) + 1, axis=0)
        start = 0
        for i, levels in enumerate(self.levels):
            rows[start : start + len(levels), i] = levels
            start += len(levels)
        shares = self.bounds.shares(rows)
        weights = np.exp(20 * (shares[:, -1] - shares[:, -1].max()))
        price = (weights / weights.sum()) @ shares
        return np.split(price[:-1], np.cumsum([len(levels) for levels in self.levels])[:-1])

    def _knapsack(self, current: Widths, values: Values, reach: float) -> Widths:
        """Solve the knapsack over the groups at the prices of `current`, for widths within `reach` of it."""
        prices = self._prices(current)
        here = [
            int(np.searchsorted(levels, w).clip(0, len(levels) - 1))
            for levels, w in zip(self.levels, current, strict=True)
        ]
        options = [
            np.flatnonzero(np.abs(np.arange(len(levels)) - at) <= np.maximum(1, reach * np.maximum(at, 1)))
            for levels, at in zip(self.levels, here, strict=True)
        ]
        least = [float(price[option].min()) for price, option in zip(prices, options, strict=True)]
        at_current = float(prices[0][here[0]])
        room = (
            1.0 - at_current + sum(float(p[i]) - low for p, i, low in zip(prices, here, least, strict=True))
        )
        if room <= 0:
            return current
        best = np.zeros(_BINS + 1)
        steps: list[tuple[NDArray[np.float64], NDArray[np.int64]]] = []  # the best before a group, and its bins
        for price, option, low, value in zip(prices, options, least, values, strict=True):
            bins = np.ceil((price[option] - low) / room * _BINS - 1e-9).astype(np.int64)
            steps.append((best, bins))
            before, best = best, np.full(_BINS + 1, -np.inf)
            for bin_, worth in zip(bins.tolist(), value[option].tolist(), strict=True):
                if bin_ <= _BINS:
                    np.maximum(best[bin_:], before[: _BINS + 1 - bin_] + worth, out=best[bin_:])
        widths = current.copy()
        left = _BINS
        for i in reversed(range(len(steps))):
            before, bins = steps[i]
            totals = np.where(bins <= left, before[np.maximum(left - bins, 0)] + values[i][options[i]], -np.inf)
            taken = int(totals.argmax())
            widths[i] = self.levels[i][options[i][taken]]
            left -= int(bins[taken])
        return widths

    def _polish(self, widths: Widths, values: Values) -> Widths:
        """Raise one group by a step, or one against another, while a budget allows it and the value rises."""
        at = np.array([np.searchsorted(levels, w) for levels, w in zip(self.levels, widths, strict=True)])
        if any(self.levels[i][min(k, len(self.levels[i]) - 1)] != widths[i] for i, k in enumerate(at)):
            return widths
        # Large moves are the most promising; if none of these is allowed, a small one may be.
        tries = [(_STEPS, _TRIED, np.inf), (_STEPS[:1], len(at) * len(at), np.inf)]
        if (
            self._expensive
        ):  # first the moves that fit by single groups' prices, though a cost need not be their sum
            tries = [(_STEPS, _TRIED_EXPENSIVE, 1e-9), (_STEPS, _TRIED, np.inf)]
        shape = (len(at), max(len(levels) for levels in self.levels))
        worth, table = np.full(shape, -np.inf), np.zeros(shape, dtype=np.int64)
        for i, (value, levels) in enumerate(zip(values, self.levels, strict=True)):
            worth[i, : len(value)], table[i, : len(levels)] = value, levels
        groups = np.arange(len(at))
        added = np.zeros(shape)  # to the share of the budget, by each level of each group
        if self._expensive:
            for i, price in enumerate(self._prices(widths)):
                added[i, : len(price)] = price - price[at[i]]
            added[0] += self.bounds.excess(widths[None])[0] - 1.0
        for _ in range(_POLISHING):
            for steps, most, room in tries:
                gains = _moved(worth, at, steps)
                allowed = gains > 1e-12
                if np.isfinite(room):
                    allowed &= added[groups, at].sum() + _moved(added, at, steps) <= room
                order = _largest(gains, np.flatnonzero(allowed), most)
                rows = at + _moves(order, len(at), steps)
                first = self._first_kept(table[groups, rows])
                if first is not None:
                    at = rows[first]
                    break
            else:
                break
        return np.asarray(table[groups, at])

    def _first_kept(self, rows: Widths) -> int | None:
        """Return the index of the first row of (N, G) that meets the budgets; row by row if prices are expensive."""
        size = 1 if self._expensive else _TRIED
        chunks = (rows[start : start + size] for start in range(0, len(rows), size))
        kept = (self.bounds.feasible(chunk) for chunk in chunks)
        return next((i for i, here in enumerate(itertools.chain.from_iterable(kept)) if here), None)


def _moved(by_level: NDArray[np.float64], at: NDArray[np.int64], steps: Sequence[int]) -> NDArray[np.float64]:
    """Return each move's change of a sum over the groups of `by_level` (G, L) at levels `at` (G,); -inf if impossible.

    Returns:
        (G + S * S * G * G,): one group up by a level; then, for each pair of steps up and down, one group up and
        another one down.
    """
    groups, most = np.arange(len(at)), by_level.shape[1]

    def by(step: int) -> NDArray[np.float64]:
        to = at + step
        there = by_level[groups, to.clip(0, most - 1)] - by_level[groups, at]
        return np.where((to >= 0) & (to < most), there, -np.inf)

    up, down = np.array([by(step) for step in steps]), np.array([by(-step) for step in steps])
    pairs = up[:, None, :, None] + down[None, :, None, :]
    pairs[:, :, groups, groups] = -np.inf
    return np.concatenate([by(1), pairs.reshape(-1)])


def _moves(chosen: NDArray[np.int64], groups: int, steps: Sequence[int]) -> NDArray[np.int64]:
    """Return the changes of levels (N, G) of the moves with these indices (N,), as `_moved` numbers them."""
    moves = np.zeros((len(chosen), groups), dtype=np.int64)
    single = np.flatnonzero(chosen < groups)
    moves[single, chosen[single]] = 1
    paired = np.flatnonzero(chosen >= groups)
    up, down, raised, lowered = np.unravel_index(
        chosen[paired] - groups, (len(steps), len(steps), groups, groups)
    )
    moves[paired, raised] = np.asarray(steps)[up]
    moves[paired, lowered] = -np.asarray(steps)[down]
    return moves


def _largest(gains: NDArray[np.float64], among: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return the indices in `among` with the largest gains, in falling order; among equal ones, the first."""
    if len(among) > most:
        least = np.partition(gains[among], -most)[-most]
        among = among[gains[among] >= least]
    return among[np.argsort(-gains[among], kind="stable")[:most]]
