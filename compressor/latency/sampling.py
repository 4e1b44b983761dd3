"""Selects and measures sub-networks until the table predicts well enough.

An initial set fills every operator's grid, and a few networks are held out. Each group gets p levels of width. Of all
combinations only p x p networks are measured, chosen as in an orthogonal array: network (i, j) gives group g the level
(a i + b j) mod p with the group's own slope (a : b). Two groups with different slopes meet in each pair of their levels
exactly once, so that an operator between them has its complete p x p grid of (input channels, output channels). Groups
that meet in one operator get different slopes by colouring a graph; p prime gives p + 1 slopes. (R. C. Bose, "On the
construction of orthogonal sets of Latin squares", 1938.)

Then two steps alternate. Networks that ran on a slowed processor, or were slower than predicted, are measured again,
because background load can only slow a network down. Random networks are added where similar ones have the largest
cross-validation error. Measuring ends when the error on the held-out networks meets the goal, or the time is up.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from compressor.core.errors import CompressorError
from compressor.core.progress import bar
from compressor.latency.assemble import Predictor, Sample
from compressor.latency.fit import held_out_error
from compressor.latency.operators import Widths, channels
from compressor.latency.stored import Journal, Record, Role
from compressor.pruning.space import PruningSpace

Floats = npt.NDArray[np.float64]

LEVELS = 5
"""Widths of each group: prime, so that the slopes are as described."""

HELD_OUT = 10
MIN_NETWORKS = 12
"""Fewest networks that are measured whatever the time limit, besides the dense one at both ends."""

MAX_NETWORKS = 160
"""Most networks of a table."""

BATCH = 6
"""Networks that are added between two evaluations of the error."""

FOLDS = 5
CANDIDATES = 200
NEIGHBOURS = 5
SUSPICIOUS = 0.04
"""A network that is slower than predicted by this share, and by three times the median error, is measured again."""

MAX_REPEATS = 3
"""Most measurements of one network."""

REFERENCE_EVERY = 12
"""The dense network is measured again after this many networks."""

MAX_SPREAD = 0.5
"""Largest relative distance between the quartiles of the dense network's times at which a table is built."""

MAX_DENSE_RUNS = 9
"""Dense measurements before a machine is rejected as too noisy: three could fall into one period of load."""


def grid_widths(space: PruningSpace, *, levels: int = LEVELS, seed: int = 0) -> Widths:
    """Return the p x p sub-networks in random order, (p * p, G).

    The levels of each group include its smallest and its dense width.
    """
    rng = np.random.default_rng(seed)
    slopes = _slopes(space, levels)
    columns = []
    for index, slope in enumerate(slopes):
        i, j = np.divmod(np.arange(levels * levels), levels)
        level = i if slope == levels else (j + slope * i) % levels
        columns.append(_levels(space.choices(index), levels)[rng.permutation(levels)][level])
    rows = np.stack(columns, axis=1) if columns else np.zeros((levels * levels, 0), dtype=np.int64)
    return np.asarray(rng.permutation(rows, axis=0), dtype=np.int64)


def anchor_widths(space: PruningSpace) -> Widths:
    """Return the smallest network and networks of a few uniform ratios, (N, G)."""
    dense, least = np.asarray(space.dense_widths), np.asarray(space.min_widths)
    rows = [least, *(space.round(dense * share) for share in (0.15, 0.25, 0.35, 0.55, 0.75, 0.9))]
    return np.unique(np.asarray(rows, dtype=np.int64), axis=0)


def random_widths(space: PruningSpace, count: int, *, seed: int) -> Widths:
    """Draw sub-networks of all sizes, (count, G): a random ratio each, with the groups scattered around it."""
    rng = np.random.default_rng(seed)
    dense = np.asarray(space.dense_widths, dtype=np.float64)
    share = rng.uniform(0.2, 1.0, size=(count, 1)) + rng.normal(0.0, 0.25, size=(count, len(dense)))
    wanted = dense * np.clip(share, 0.0, 1.0)
    return np.asarray([space.round(row) for row in wanted], dtype=np.int64).reshape(count, len(dense))


def with_blocks(space: PruningSpace, widths: Widths, *, seed: int) -> Widths:
    """Remove random blocks where a search may: in two rows of three, each with a share of its own; (N, columns)."""
    if not space.depth:
        return widths
    rng = np.random.default_rng([seed, 1])
    share = np.maximum(rng.uniform(-0.45, 0.9, size=(len(widths), 1)), 0.0)
    present = rng.random((len(widths), len(space.blocks))) >= share
    return space.settled(np.concatenate([widths, present.astype(np.int64)], axis=1))


def ends_of_depth(space: PruningSpace, widths: Widths) -> list[Widths]:
    """Return these networks with all blocks and, where a search may remove blocks, without any."""
    if not space.depth:
        return [widths]
    blocks = np.ones((len(widths), len(space.blocks)), dtype=np.int64)
    rows = [np.concatenate([widths, present], axis=1) for present in (blocks, 0 * blocks)]
    return [space.settled(each) for each in rows]


def _levels(choices: Widths, levels: int) -> Widths:
    """Return `levels` evenly spread legal widths, ends included; widths repeat where there are fewer."""
    places = np.round(np.linspace(0, len(choices) - 1, levels)).astype(np.int64)
    return np.asarray(choices)[places]


def _slopes(space: PruningSpace, levels: int) -> list[int]:
    """Choose a slope for each group, 0 to `levels`; groups of one operator get different slopes where possible."""
    count = len(space.groups)
    meets: list[Counter[int]] = [Counter() for _ in range(count)]
    for layer in space.layers:
        near = {group for group, _ in (*layer.in_channels.terms, *layer.out_channels.terms)}
        for group in near:
            meets[group].update(near - {group})
    slopes = [-1] * count
    used: Counter[int] = Counter()
    for group in sorted(range(count), key=lambda index: -len(meets[index])):
        clashes: Counter[int] = Counter()
        for other, times in meets[group].items():
            if slopes[other] >= 0:
                clashes[slopes[other]] += times
        slopes[group] = min(range(levels + 1), key=lambda slope: (clashes[slope], used[slope]))
        used[slopes[group]] += 1
    return slopes


class TooNoisy(CompressorError):
    """The dense network's time varies too much for a usable table."""


def mixed_roles(fitted: Widths, held: Widths) -> list[tuple[Role, Widths]]:
    """Return networks to fit and to hold out, evenly mixed, so that a time limit shortens both equally.

    Args:
        fitted, held: Widths of the networks, (N, dimensions) each.
    """
    queue: list[tuple[float, Role, Widths]] = []
    queue += [((place + 0.5) / len(fitted), "fit", row) for place, row in enumerate(fitted)]
    queue += [((place + 0.5) / len(held), "held", row) for place, row in enumerate(held)]
    return [(role, row) for _, role, row in sorted(queue, key=lambda item: item[0])]


@dataclass
class Samples:
    """The measured samples.

    Attributes:
        dense: All measurements of the dense network, in order.
        fitted, held: Widths -> least disturbed measurement, of networks to fit to and of held-out networks.
        seconds: Duration of the measurement, over all attempts.
    """

    dense: list[Sample] = field(default_factory=list)
    fitted: dict[tuple[int, ...], Sample] = field(default_factory=dict)
    held: dict[tuple[int, ...], Sample] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def drift(self) -> float:
        """Dense time at the end over that at the start, minus one."""
        return self.dense[-1].times.median_ms / self.dense[0].times.median_ms - 1.0

    @property
    def spread(self) -> float:
        """Interquartile range of the dense network's times, divided by their median."""
        times = [sample.times.median_ms for sample in self.dense]
        low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
        return float((high - low) / middle)

    def to_fit(self) -> list[Sample]:
        """Return the undisturbed dense measurements (all, if there are none), then the other networks."""
        dense = [sample for sample in self.dense if sample.times.undisturbed] or self.dense
        return [*dense, *self.fitted.values()]


@dataclass
class Collector:
    """Measures sub-networks of a space until their error meets the goal or the time is up.

    Attributes:
        space: The space of the sub-networks.
        measure: Measures one network, given its widths.
        journal: Earlier measurements of an interrupted attempt; new ones are appended.
        time_limit_s: No further network is started after this many seconds, except the first `MIN_NETWORKS`.
        goal: Mean error on the held-out networks, as a share, at which measuring stops.
        seed: Seed for the choice of networks.
        block: Channels per kernel block.
        ready: Prepares samples for a fit: if a device does not time operators one by one, each gets a share of the
            whole time.
    """

    space: PruningSpace
    measure: Callable[[Widths], Sample]
    journal: Journal
    time_limit_s: float
    goal: float
    seed: int
    block: int
    ready: Callable[[Sequence[Sample]], Sequence[Sample]]

    def __post_init__(self) -> None:
        self.dense = np.asarray(self.space.dense_row, dtype=np.int64)
        self.samples = Samples()
        self.times_measured: dict[tuple[int, ...], int] = {}
        self.settled: set[tuple[int, ...]] = set()  # slow in two measurements: accepted as their time
        for record in self.journal.records:
            self._keep(record)
        before = self.journal.records[-1].at_s if self.journal.records else 0.0
        self.started = time.monotonic() - before

    def run(self) -> Samples:
        """Measure.

        Raises:
            TooNoisy: The machine is too noisy for a usable table.
        """
        start = self._start_set()
        with bar("Measuring latency", len(start) + 2) as progress:
            self._take("dense", self.dense)
            progress.advance(1, self._note())
            for role, widths in start:
                if self._late():
                    break
                if tuple(widths.tolist()) in self.times_measured:
                    continue
                self._take(role, widths)
                progress.advance(1, self._note())
            while not self._late() and not self._good_enough():
                for role, widths in self._next_batch():
                    if self._late():
                        break
                    self._take(role, widths)
                    progress.advance(1, self._note())
            self._take("dense", self.dense)
            progress.advance(1)
        while self.samples.spread > MAX_SPREAD and len(self.samples.dense) < MAX_DENSE_RUNS:
            self._take("dense", self.dense)
        self.samples.seconds = self._elapsed()
        times = [sample.times.median_ms for sample in self.samples.dense]
        if self.samples.spread > MAX_SPREAD:
            raise TooNoisy(
                "This machine is too noisy to measure a latency table: the same dense network took between "
                f"{min(times):.3g} and {max(times):.3g} ms (quartiles {self.samples.spread:.0%} apart, at most "
                f"{MAX_SPREAD:.0%} is accepted).",
                "End other programs, fix the processor's clock (governor 'performance') and try again, or "
                "give the budget in --flops or --params.",
            )
        return self.samples

    # ---------------------------------------------------------------- one measurement
    def _take(self, role: Role, widths: Widths) -> None:
        record = Record(role, tuple(int(width) for width in widths), self.measure(widths), self._elapsed())
        self.journal.add(record)
        self._keep(record)
        others = sum(self.times_measured.values())
        if role != "dense" and others % REFERENCE_EVERY == 0 and not self._late():
            self._take("dense", self.dense)

    def _keep(self, record: Record) -> None:
        if record.role == "dense":
            self.samples.dense.append(record.sample)
            return
        kept = self.samples.fitted if record.role == "fit" else self.samples.held
        before = kept.get(record.widths)
        if before is not None and record.sample.times.undisturbed:
            again, first = record.sample.times.median_ms, before.times.median_ms
            if abs(again / first - 1.0) <= SUSPICIOUS:
                self.settled.add(record.widths)
        if before is None or record.sample.times.median_ms < before.times.median_ms:
            kept[record.widths] = record.sample
        self.times_measured[record.widths] = self.times_measured.get(record.widths, 0) + 1

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _late(self) -> bool:
        count = sum(self.times_measured.values())
        return count >= MAX_NETWORKS or (count >= MIN_NETWORKS and self._elapsed() > self.time_limit_s)

    def _note(self) -> str:
        left = max(0.0, self.time_limit_s - self._elapsed())
        return f"{len(self.times_measured)} networks; ends in {left:.0f} s at the latest"

    # ---------------------------------------------------------------- what is measured next
    def _start_set(self) -> list[tuple[Role, Widths]]:
        """Return the initial networks, both roles evenly mixed."""
        held = with_blocks(self.space, random_widths(self.space, HELD_OUT, seed=self.seed + 1), seed=self.seed + 1)
        anchors = anchor_widths(self.space)
        grid = with_blocks(self.space, grid_widths(self.space, seed=self.seed), seed=self.seed)
        fitted = np.concatenate([*ends_of_depth(self.space, anchors), grid])
        return mixed_roles(fitted, held)

    def _good_enough(self) -> bool:
        held = list(self.samples.held.values())
        predicted = self._predictor(self.samples.to_fit())(held)
        error = held_out_error(predicted.tolist(), [each.times.median_ms for each in held])
        return error.mape <= self.goal and not self._suspects()

    def _next_batch(self) -> list[tuple[Role, Widths]]:
        suspects = self._suspects()[:BATCH]
        if suspects:
            return suspects
        chosen = self._worst_predicted(BATCH)
        return [("fit", row) for row in chosen]

    def _suspects(self) -> list[tuple[Role, Widths]]:
        """Return networks that ran on a slowed processor or were slower than predicted, the worst first."""
        predict = self._predictor(self.samples.to_fit())
        found: list[tuple[float, Role, Widths]] = []
        kinds: tuple[tuple[Role, dict[tuple[int, ...], Sample]], ...] = (
            ("fit", self.samples.fitted),
            ("held", self.samples.held),
        )
        for role, kept in kinds:
            samples = list(kept.values())
            error = np.asarray([each.times.median_ms for each in samples]) / predict(samples) - 1.0
            limit = max(SUSPICIOUS, 3.0 * float(np.median(np.abs(error))))
            for widths, sample, slower in zip(kept, samples, error, strict=True):
                if widths in self.settled or self.times_measured[widths] >= MAX_REPEATS:
                    continue
                if slower > limit or not sample.times.undisturbed:
                    worst = max(float(slower), sample.times.slowdown)
                    found.append((worst, role, np.asarray(widths, dtype=np.int64)))
        return [(role, row) for _, role, row in sorted(found, key=lambda item: -item[0])]

    def _worst_predicted(self, count: int) -> Widths:
        """Choose random networks far from all measured ones whose neighbours have the largest errors."""
        samples = list(self.samples.fitted.values())
        places, errors = self._features(samples), self._left_out_errors(samples)
        seed = self.seed + 1000 + len(self.times_measured)
        drawn = with_blocks(self.space, random_widths(self.space, CANDIDATES, seed=seed), seed=seed)
        fresh = [row for row in drawn if tuple(row.tolist()) not in self.times_measured]
        if not fresh:
            return drawn[:count]
        pool = np.stack(fresh)
        inputs, outputs = channels(self.space, pool)
        wanted = self._features_of(inputs, outputs, self._predictor(samples).of_channels(inputs, outputs))
        distance = np.linalg.norm(wanted[:, None] - places[None], axis=2)
        near = np.argsort(distance, axis=1)[:, :NEIGHBOURS]
        expected = errors[near].mean(axis=1)
        nearest = distance.min(axis=1)
        chosen: list[int] = []
        for _ in range(min(count, len(pool))):
            best = int(np.argmax(expected * nearest))
            chosen.append(best)
            nearest = np.minimum(nearest, np.linalg.norm(wanted - wanted[best], axis=1))
        return pool[chosen]

    def _left_out_errors(self, samples: Sequence[Sample]) -> Floats:
        """Return |predicted / measured - 1| of every network with its fold left out of the fit."""
        measured = np.asarray([each.times.median_ms for each in samples])
        fold = np.arange(len(samples)) % FOLDS
        errors = np.zeros(len(samples))
        for left_out in range(FOLDS):
            kept = [each for each, own in zip(samples, fold, strict=True) if own != left_out]
            out = np.flatnonzero(fold == left_out)
            if len(kept) and len(out):
                predicted = self._predictor([*self.samples.dense, *kept])(
                    [samples[int(place)] for place in out]
                )
                errors[out] = np.abs(predicted / measured[out] - 1.0)
        return errors

    def _features(self, samples: Sequence[Sample]) -> Floats:
        inputs, outputs = (np.stack([getattr(each, name) for each in samples]) for name in ("c_in", "c_out"))
        return self._features_of(inputs, outputs, np.asarray([each.times.median_ms for each in samples]))

    def _features_of(self, inputs: Widths, outputs: Widths, times_ms: Floats) -> Floats:
        """Return the feature vectors of networks: the logarithm of the time, and each operator's channel shares."""
        first = self.samples.dense[0]
        shares = np.concatenate([inputs / first.c_in, outputs / first.c_out], axis=1) / np.sqrt(
            2 * inputs.shape[1]
        )
        return np.concatenate([np.log(times_ms)[:, None], shares], axis=1)

    def _predictor(self, samples: Sequence[Sample]) -> Predictor:
        return Predictor(self.space, self.ready(samples), self.block)
