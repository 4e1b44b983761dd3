"""The pruning environment: an episode is a plan, a step decides one group."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from compressor.budgets.function import FunctionBudget
from compressor.core.errors import CompressorError
from compressor.search.bounds import ActionBounds, LegalWidths, Widths
from compressor.search.reward import Reward, accuracy_needed, accuracy_reward

if TYPE_CHECKING:
    from compressor.budgets.base import Budget
    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.space import PruningSpace


FEATURES = (
    "index",
    "channels_in",
    "channels_out",
    "stride",
    "kernel",
    "macs_here",
    "macs_before",
    "macs_after",
    "previous_action",
)


class Observer:
    """Describes a group in the state of an episode (arXiv 2403.19490; the nine numbers of its state).

    A group's layer is the first, in execution order, whose outputs it holds. Its input channels are those
    left by the widths chosen so far. The three counts of MACs add up to the network with all remaining groups
    dense, as a share of the dense network: `macs_before` is fixed whatever is decided from here on, `macs_here` is
    decided by this group, and `macs_after` by those after it. They are differences of whole-network counts, and thus
    correct for coupled groups too, for which no sum over single layers is.
    """

    def __init__(self, space: PruningSpace) -> None:
        self._space = space
        self._dense = np.asarray(space.dense_row, dtype=np.int64)
        self._smallest = np.array([space.choices(i)[0] for i in range(len(self._dense))], dtype=np.int64)
        self._macs = float(np.asarray(space.macs(self._dense[None]))[0])
        self._producers = [first_layer(space, i) for i in range(len(self._dense))]
        known = [layer for layer in self._producers if layer is not None]
        dense = self._dense[None]
        inputs = [int(layer.in_channels(dense)[0]) for layer in known]
        self._channels = float(max([*self._dense.tolist(), *inputs]))

        self._stride = float(max([1, *(int(np.max(layer.stride)) for layer in known)]))
        self._kernel = float(max([1, *(int(np.max(layer.kernel)) for layer in known)]))

    def __call__(self, step: int, widths: Widths, previous: float) -> NDArray[np.float32]:
        """Return the observation (9,) before group `step`, with the first `step` of `widths` (G,) chosen."""
        current = self._dense.copy()
        current[:step] = widths[:step]
        rows = np.stack([current, current, current])
        rows[0, step:] = self._smallest[step:]
        rows[1, step + 1 :] = self._smallest[step + 1 :]
        before, with_here, everything = np.asarray(self._space.macs(rows), dtype=np.float64) / self._macs
        layer = self._producers[step]
        return np.array(
            [
                step / len(self._dense),
                0.0 if layer is None else float(layer.in_channels(current[None])[0]) / self._channels,
                self._dense[step] / self._channels,
                0.0 if layer is None else float(np.max(layer.stride)) / self._stride,
                0.0 if layer is None else float(np.max(layer.kernel)) / self._kernel,
                with_here - before,
                before,
                everything - with_here,
                previous,
            ],
            dtype=np.float32,
        )


def first_layer(space: PruningSpace, column: int) -> Layer | None:
    """Return the first layer whose outputs a group holds, or the first of a block; None if there is none."""
    if column >= len(space.groups):
        return space.layers[space.blocks[column - len(space.groups)].layers[0]]
    for layer in space.layers:
        if any(index == column for index, _ in layer.out_channels.terms):
            return layer
    return None


if TYPE_CHECKING:
    from compressor.pruning.space import Layer


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

    def evaluate(self, key: Key, floor: float | None) -> tuple[float, float]:
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

        Nothing is remembered or counted before `evaluate`. At most as many new plans are scored as there are workers.
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


Observation = NDArray[np.float32]


@dataclass(frozen=True)
class Score:
    """Score of one candidate.

    Attributes:
        widths: Channels that each group keeps, in the space's order.
        accuracy: Accuracy on the search split, 0..1.
        reward: Reward that the agent maximizes.
        costs: Predicted cost of each budget by name, in its own unit.
        seconds: Time of the evaluation; 0 if the accuracy was known.
        given_up: Whether it was stopped early because the floor could not be reached.
    """

    widths: tuple[int, ...]
    accuracy: float
    reward: float
    costs: Mapping[str, float]
    seconds: float
    given_up: bool = False


class PruningEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """Decides the width of one group after another; the reward comes with the last.

    - Observation: `Box` of 9 scaled numbers (`Observer`), then `context_size` numbers that the caller sets as
      `context`; the joint agent puts the state of its environment model there.
    - Action: `Box(0, 1)`, the ratio of channels to remove, below 1. It is clipped to the bounds that keep every
      budget reachable; `info["action"]` is the clipped one, to be stored in a replay buffer, and
      `info["width"]` the kept width.
    - Reward: 0 before the last group, then `reward(accuracy, costs)`.

    Args:
        space: Pruning space with the groups; ranked with its model's weights when a plan is first needed.
        budgets: All are met at the end of every episode; if empty, nothing needs to be pruned.
        evaluator: Accuracy of a plan, 0..1; the keyword `floor` is an accuracy below which it may stop early.
        reward: Maps accuracy and costs to the reward.
        importance: Criterion that ranks a group's channels, as for `space.rank`.
        importance_data: Batches of images and labels for criteria that need them, as for `space.rank`.
        reconstruction_data: Batches of inputs for the criterion "reconstruction"; None for `importance_data`.
        context_size: Number of values appended to the observation.

    Raises:
        CompressorError: The space has no groups, or the budgets cannot be met.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (gymnasium's own attribute)

    def __init__(
        self,
        space: PruningSpace,
        budgets: Sequence[Budget],
        evaluator: Evaluate,
        reward: Reward = accuracy_reward,
        importance: Any = "l1",
        context_size: int = 0,
        importance_data: Any = None,
        reconstruction_data: Any = None,
    ) -> None:
        if not len(space.groups):
            raise CompressorError(
                "The model has no group of channels that could be pruned.",
                "See the skipped layers that --dry-run lists.",
            )
        self.space = space
        self.budgets = tuple(budgets)
        self.bounds = ActionBounds(space, budgets)
        self.importance = importance
        self.importance_data = importance_data
        self._ranking_data = importance_data
        if importance == "reconstruction" and reconstruction_data is not None:
            self._ranking_data = reconstruction_data
        self._accuracies = Accuracies(evaluator, self.plan)
        self._reward = reward
        self._observe = Observer(space)
        self._ranking: Any = None
        self._saliency: tuple[NDArray[np.float64], ...] | None = None
        self.evaluations = 0
        self.evaluation_seconds = 0.0
        self.context_size = context_size
        self.context: Observation = np.zeros(context_size, dtype=np.float32)
        shape = (len(FEATURES) + context_size,)
        high = np.full(shape, 1.0, dtype=np.float32)
        high[len(FEATURES) :] = np.inf
        low = np.where(np.isinf(high), -np.inf, 0.0).astype(np.float32)
        self.observation_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        below_one = float(np.nextafter(np.float32(1), np.float32(0)))
        self.action_space = gymnasium.spaces.Box(0.0, below_one, (1,), np.float32)
        self._restart()

    def _restart(self) -> None:
        self._step = 0
        self._previous = 0.0
        self._widths: Widths = self.bounds.dense.copy()
        self._legal: LegalWidths | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode with nothing pruned."""
        super().reset(seed=seed)
        self._restart()
        return self._observation(), {}

    @property
    def legal(self) -> LegalWidths:
        """Return the legal widths of the current group."""
        if self._legal is None:
            self._legal = self.bounds.legal(self._step, self._widths)
        return self._legal

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Prune one group; after the last one, evaluate the plan.

        Returns:
            Observation, reward, whether that was the last group, False, and info with `action` and `width`;
            after the last group also `score`.
        """
        if self._step == len(self.bounds.dense):
            raise CompressorError("The episode has ended: every group has its width.", "Call reset() first.")
        clipped = self.legal.clip(float(np.asarray(action).reshape(-1)[0]))
        width = self.legal.width(clipped)
        self._widths[self._step] = width
        self._step += 1
        self._previous = clipped
        self._legal = None
        info: dict[str, Any] = {"action": clipped, "width": width}
        if self._step < len(self.bounds.dense):
            return self._observation(), 0.0, False, False, info
        score = self.score(self._widths)
        info["score"] = score
        return self._observation(), score.reward, True, False, info

    def score(self, widths: Widths | Sequence[int], reward_floor: float | None = None) -> Score:
        """Evaluate a plan of these widths (G,); the same widths on the same weights are evaluated once.

        Args:
            widths: Channels that each group keeps.
            reward_floor: Reward below which the evaluation may stop early. The result is then that of the images seen
                so far; it lies below the floor, and is not remembered.
        """
        key = self._key(widths)
        costs = self.costs(key)
        accuracy, seconds, given_up = self._accuracies.known.get(key), 0.0, False
        if accuracy is None:
            floor = None if reward_floor is None else accuracy_needed(self._reward, reward_floor, costs)
            accuracy, seconds = self._accuracies.evaluate(key, floor)
            self.evaluations += 1
            given_up = floor is not None and accuracy < floor
        self.evaluation_seconds += seconds
        return Score(key, accuracy, self.reward(accuracy, costs), costs, seconds, given_up)

    def score_by(self, widths: Widths | Sequence[int], measure: Callable[[], float]) -> Score:
        """Evaluate a candidate of these widths (G,) with the caller's function, such as after a few training steps.

        `measure` returns its accuracy, which is not remembered; the evaluation counts like any other.
        """
        key = self._key(widths)
        started = time.perf_counter()
        accuracy = checked_accuracy(measure())
        self.evaluations += 1
        seconds = time.perf_counter() - started
        self.evaluation_seconds += seconds
        costs = self.costs(key)
        return Score(key, accuracy, self.reward(accuracy, costs), costs, seconds)

    def reward(self, accuracy: float, costs: Mapping[str, float]) -> float:
        """Return the reward of a network of this accuracy (0..1) and these costs by name."""
        return float(self._reward(accuracy, costs))

    @property
    def workers(self) -> int:
        """Number of plans that the evaluator scores in parallel."""
        return self._accuracies.workers

    def ahead(self, proposals: Iterable[Widths | Sequence[int]], reward_floor: float | None = None) -> None:
        """Let several workers score in parallel what will probably be passed to `score` next.

        Nothing is recorded or counted before `score`: the result of a search does not depend on what is scored in
        advance, and thus not on the number of workers. With one worker this does nothing, and draws no proposal.

        Args:
            proposals: Widths (G,) in the expected order; at most as many new ones are scored as there are workers.
            reward_floor: Floor that `score` will be given; if it is another one then, plans that were stopped early
                are scored again.
        """

        def with_floors() -> Iterator[tuple[Key, float | None]]:
            for key in map(self._key, proposals):
                if reward_floor is None:
                    yield key, None
                else:
                    yield key, accuracy_needed(self._reward, reward_floor, self.costs(key))

        self._accuracies.ahead(with_floors())

    def known(self, widths: Widths | Sequence[int]) -> bool:
        """Return whether these widths were scored on the current weights."""
        return self._key(widths) in self._accuracies.known

    def rewards(self) -> dict[Key, float]:
        """Return the rewards of all plans fully scored on the current weights, by widths, in order of scoring."""
        known = self._accuracies.known
        if not known:
            return {}
        rows = np.array(list(known), dtype=np.int64)
        costs = {budget.name: np.asarray(budget.predict(rows), dtype=np.float64) for budget in self.budgets}
        return {
            widths: self.reward(accuracy, {name: float(of[i]) for name, of in costs.items()})
            for i, (widths, accuracy) in enumerate(known.items())
        }

    def costs(self, widths: Widths | Sequence[int]) -> dict[str, float]:
        """Return the predicted cost of each budget by name, in its own unit, for widths (G,)."""
        row = np.asarray(widths, dtype=np.int64)[None]
        return {budget.name: float(np.asarray(budget.predict(row))[0]) for budget in self.budgets}

    def plan(self, widths: Widths | Sequence[int]) -> ChannelPlan:
        """Return the plan of these widths, by the importance of the current weights."""
        if self._ranking is None:
            self._ranking = self.space.rank(self.importance, self._ranking_data)
        return self.space.plan([int(width) for width in widths], importance=self._ranking)

    def saliency(self) -> tuple[NDArray[np.float64], ...]:
        """Return the saliency of each channel of each group on the current weights, (width,) per group.

        First-order Taylor scores if there is data for them; else L1 norms, which are less comparable between
        groups. A block, (1,), has that of all channels of its own groups; without any, that of all groups.
        """
        if self._saliency is None:
            method = "l1" if self.importance_data is None else "taylor"
            ranking = self.space.rank(method, self.importance_data)
            groups = [np.asarray(scores, dtype=np.float64) for scores in ranking.scores]
            total = [float(np.maximum(scores, 0.0).sum()) for scores in groups]
            blocks = self.space.blocks if self.space.depth else ()
            whole = [sum(total[group] for group in block.groups) or sum(total) for block in blocks]
            self._saliency = (*groups, *(np.array([value]) for value in whole))
        return self._saliency

    def weights_moved(self) -> None:
        """Forget accuracies and rankings after the model's weights changed. Notify the evaluator as well."""
        self._accuracies.forget()
        self._ranking = self._saliency = None

    def state(self) -> dict[str, Any]:
        """Return what was evaluated on the current weights, as plain values."""
        return {
            "known": [[list(widths), accuracy] for widths, accuracy in self._accuracies.known.items()],
            "evaluations": self.evaluations,
            "evaluation_seconds": self.evaluation_seconds,
            "functions": {
                budget.name: [[list(widths), value] for widths, value in budget.known.items()]
                for budget in self.budgets
                if isinstance(budget, FunctionBudget)
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; the weights must be those of that moment."""
        self.weights_moved()
        self._accuracies.known.update({tuple(map(int, widths)): float(accuracy) for widths, accuracy in state["known"]})
        # A noisy function would otherwise return other values than those that the search used.
        for budget in self.budgets:
            if isinstance(budget, FunctionBudget):
                values = state.get("functions", {}).get(budget.name, [])
                budget.known.update({tuple(widths): float(value) for widths, value in values})
        self.evaluations = int(state["evaluations"])
        self.evaluation_seconds = float(state["evaluation_seconds"])

    def _observation(self) -> Observation:
        last = min(self._step, len(self.bounds.dense) - 1)
        seen = self._observe(last, self._widths, self._previous)
        return np.concatenate([seen, self.context]).astype(np.float32)

    def _key(self, widths: Widths | Sequence[int]) -> Key:
        """Return the widths by which a network is known: what removed blocks hold counts as dense."""
        return tuple(self.space.settled(np.asarray(widths, dtype=np.int64)[None])[0].tolist())
