"""The constrained agent: PPO with a Lagrange multiplier for each budget (arXiv 2110.08558).

`_ConstrainedSearch.search` is the method, step by step. Its settings are in `constrained_settings`; actions, states and
costs are in `constrained_episodes`; what it learns with (PPO, cost critics, multipliers) is in `constrained_learner`,
which imports Stable-Baselines3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compressor.core import progress
from compressor.core.errors import CompressorError
from compressor.pruning.plan import ChannelPlan
from compressor.search.allocation import POWERS, Allocator, Sensitivity, starting_plans
from compressor.search.base import Agent, register_agent
from compressor.search.bounds import Widths
from compressor.search.constrained_settings import PUBLISHED, ConstrainedSettings
from compressor.search.neighbours import NearBest
from compressor.search.proposals import fitted_widths, uniform_or_cheapest
from compressor.search.randomness import OwnRandomness
from compressor.search.records import Candidate, SearchResult
from compressor.search.session import SearchSession, eligible

if TYPE_CHECKING:
    from compressor.budgets.base import Budget
    from compressor.pruning.space import PruningSpace
    from compressor.search.constrained_episodes import Masks, Walk

_START = "start"


@register_agent
class ConstrainedAgent(Agent):
    """Learns a policy whose plans meet the budgets on average, and keeps the best plan that does.

    Episodes may exceed the budgets: the excess cost is weighed against the accuracy by multipliers, which rise while
    the budgets are exceeded. Budgets are only evaluated, never differentiated. The result is the best episode within
    the budgets, scored again beside the best few and the policy's own plan, scaled to the budgets.
    """

    name = "constrained"
    source = "arXiv 2110.08558"
    published = PUBLISHED
    Settings = ConstrainedSettings

    def unread_settings(self) -> dict[str, str]:
        names = ("near_spread", "proposals")
        if self.settings.action == "channel":
            return dict.fromkeys(
                (*names, "near_share"), "action is 'channel': plans are more than their widths"
            )
        if any(self.settings.finetune_iterations):
            return dict.fromkeys((*names, "near_share"), "finetune_iterations trains each candidate")
        return {} if self.settings.near_share else dict.fromkeys(names, "near_share is 0")

    def check(self, space: PruningSpace, budgets: Sequence[Budget]) -> None:
        if self.settings.action == "channel" and space.depth and space.blocks:
            raise CompressorError(
                "Decisions on single channels (search.settings.action=channel) cannot remove blocks.",
                "Set pruning.depth=off, or action=layer.",
            )

    def _search(self, run: SearchSession) -> SearchResult:
        dense = run.env.bounds.dense
        if run.env.bounds.feasible(dense)[0]:
            return run.choose([dense.tolist()])  # no budget requires pruning
        return _ConstrainedSearch(run, self.settings).search()


class _ConstrainedSearch:
    """One search: the session, the policy, and the measures of rewards and costs."""

    def __init__(self, run: SearchSession, settings: ConstrainedSettings) -> None:
        from compressor.search.constrained_episodes import ChannelActions, Costs, LayerActions, States, Walker
        from compressor.search.constrained_learner import LagrangianPpo

        self.run, self.env, self.settings = run, run.env, settings
        self.groups = len(run.env.bounds.dense)
        self._channels = settings.action == "channel"
        self.actions = (ChannelActions if self._channels else LayerActions)(run.env, fold=settings.fold)
        self.states = States(run.env, past=self.actions.sums_past, one_hot=settings.one_hot)
        self._costs = Costs(run.env, steps=self.groups, excess=settings.scale_costs)
        self.randomness = OwnRandomness(run.agent.seed)
        steps = settings.episodes_per_update * self.groups
        with self.randomness.active():
            self.ppo = LagrangianPpo(self.states.size, self.actions.size, steps, len(self._costs.budgets), settings)
        self._walk = Walker(self.actions, self.states, self.ppo, self.randomness)
        self._masks: list[tuple[float, Masks]] = []  # of the best episodes, with their merit
        self._scale: list[float] | None = None
        self._allocator = Allocator(run.env)
        self._sensitivity = Sensitivity(run, self._allocator.levels)
        self._near = NearBest(run, self._allocator, self._sensitivity, settings.near_spread, settings.proposals)
        run.own = self._state
        if run.restored is not None:
            self._restore(run.restored)

    def search(self) -> SearchResult:
        run = self.run
        if run.place.round:  # other budgets: the search reuses what it has learned
            if run.another_target:
                self._start_again()
            return self._choose()
        self._start()
        updates = self._updates()
        # Known plans cost nothing: if all evaluations are to be used, more updates follow.
        for update in run.remaining("update", (4 if run.limits.use_all else 1) * updates):
            if not self._play(update, updates):
                break
            self._learn()
            self._stay_near_the_best()
            run.done("update")
        return self._choose()

    # The steps, in the order of the method.

    def _start(self) -> None:
        """Choose the plan around which the policy acts first."""
        if self.settings.start == "dense":
            return
        if self._points():
            self._sensitivity.measure(self._points())
        starts = self._plans_to_start_from()
        for number in self.run.remaining(_START, len(starts)):
            if self.run.spent(reserve=1):
                return
            self.run.score(starts[number](), _START)
            scored = [c for c in self.run.candidates if c.phase == _START]
            self.actions.centre(np.array(max(scored, key=lambda candidate: candidate.reward).widths))
            self.run.done(_START)

    def _start_again(self) -> None:
        """For another target, score the plans to start from, and plans near the best."""
        starts, number = self._plans_to_start_from(), self.run.place.round
        near = max(0, self.run.later(0) - len(starts)) if self._near_plans() else 0
        for step in self.run.remaining(f"{_START}{number}", len(starts) + near):
            if self.run.spent(self._reserve):
                return
            best = self._best_kept()
            if step < len(starts):
                self.run.score(starts[step](), f"{_START}{number}")
            elif best is not None:
                self._near.score(np.array(best.widths, dtype=np.int64))
            self.run.done(f"{_START}{number}")

    def _updates(self) -> int:
        """Return the number of updates within the remaining evaluations, including the finished ones."""
        total = self.run.limits.planned(self.settings.evaluations)
        before = self.groups * self._points() + bool(self._points()) + self._starts()
        each = self.settings.episodes_per_update + self._near_plans()
        return max(1, (total - before - self._reserve) // each)

    @property
    def _reserve(self) -> int:
        """Number of evaluations reserved for the final choice."""
        most = self.run.limits.max_evaluations
        wanted = int(self.settings.shortlist) + 2 + any(self.settings.finetune_iterations)
        return wanted if most is None else max(1, min(wanted, most // 4))

    def _play(self, update: int, updates: int) -> bool:
        """Play the episodes of an update into the rollout buffer; return whether all of them could be played."""
        self.ppo.rollout_buffer.reset()
        share = min(1.0, update / updates)
        cap = self._cap(share)
        training = self.settings.finetune_iterations[min(2, int(3 * share))]
        walks = [self._walk(cap) for _ in range(self.settings.episodes_per_update)]
        scored: list[tuple[Walk, Candidate]] = []
        with progress.bar("Playing episodes", total=len(walks)) as bar:
            for number, walk in enumerate(walks):
                if self.run.spent(self._reserve):
                    return False
                if not (self._channels or training):
                    self.env.ahead(each.widths for each in walks[number:])
                candidate = self._scored(walk, training)
                scored.append((walk, candidate))
                bar.advance(note=f"{candidate.accuracy:.1%}")
        self._fill_buffer(scored)
        return True

    def _learn(self) -> None:
        """Update the policy from the rollout buffer, and the multipliers from the episodes' mean costs."""
        import torch

        self.ppo.rollout_buffer.compute_returns_and_advantage(torch.zeros(1), np.ones(1))
        with self.randomness.active():
            self.ppo.train()
        recent = self.run.candidates[-self.settings.episodes_per_update :]
        costs = np.mean([self._costs.percent(candidate) for candidate in recent], axis=0)
        self.ppo.multipliers.step(costs.tolist(), self._costs.budgets)
        self.states.update()
        names = [budget.name for budget in self.env.budgets]
        curves = {f"agent/cost_{name}": float(cost) for name, cost in zip(names, costs, strict=True)}
        for name, value in zip(names, self.ppo.multipliers.values.tolist(), strict=True):
            curves[f"agent/multiplier_{name}"] = value
        self.run.curves.add(len(self.run.candidates), curves)

    def _stay_near_the_best(self) -> None:
        """Score plans near the best feasible one, and let the policy act around the best from now on."""
        for _ in range(self._near_plans()):
            best = self._best_kept()
            if best is None or self.run.spent(self._reserve):
                break
            self._near.score(np.array(best.widths, dtype=np.int64))
        best = self._best_kept()
        if best is not None and self._near_plans():
            self.actions.centre(np.array(best.widths))

    def _choose(self) -> SearchResult:
        """Choose the best episode that meets the budgets, after scoring it and the best few, scaled, again.

        If candidates were trained before they were scored, all of these are, for the steps of the last third.
        """
        plans: dict[tuple[int, ...], ChannelPlan] = {}
        steps = self.settings.finetune_iterations[-1]

        def measure(plan: ChannelPlan) -> float:
            return self.run.evaluator.scored(plan, steps=steps)

        widths = (each.tolist() for each in [*self._of_masks(plans), *self._of_candidates()])
        more = itertools.chain([self._more()], self._last_near_plans()) if self.run.limits.use_all else ()
        return self.run.choose(
            widths,
            ((each.tolist() for each in rest) for rest in more),
            plans=plans,
            measure=measure if steps else None,
            expected=self._near.expected,
        )

    # Their helpers.

    def _plans_to_start_from(self) -> list[Callable[[], Widths]]:
        """Return the uniform plan and, if groups are measured, knapsack plans; each is solved when it is needed."""
        if self._points():
            return starting_plans(self.env, self._allocator, self._sensitivity)
        return [partial(uniform_or_cheapest, self.env)]

    def _of_masks(self, plans: dict[tuple[int, ...], ChannelPlan]) -> list[Widths]:
        """For decisions on single channels: cut the best masks and the policy's to the budgets, into `plans`."""
        from compressor.search.constrained_episodes import ChannelActions, plan_of_masks

        if not isinstance(self.actions, ChannelActions):
            return []
        names = [group.name for group in self.env.space.groups]
        found: list[Widths] = []
        for masks in [*(masks for _, masks in self._masks), self._policys_walk().masks]:
            widths = fitted_widths(self.env, self.actions.hard(masks) / self.env.bounds.dense)
            found.append(widths)
            plans.setdefault(tuple(widths.tolist()), plan_of_masks(names, masks, widths))
        return found

    def _of_candidates(self) -> list[Widths]:
        """Return the best feasible candidate; the best few by reward minus excess and the policy's, scaled."""
        dense, known, best = self.env.bounds.dense, self._known(), self._best_kept()
        shortlist = [] if best is None else [np.array(best.widths, dtype=np.int64)]
        shortlist += itertools.islice(self._more(), int(self.settings.shortlist))
        if not self._channels:
            policys = np.array(self._policys_walk().widths)
            shortlist.append(fitted_widths(self.env, policys / dense))
        starts = [c for c in known if c.phase == _START]
        if starts and any(self.settings.finetune_iterations):  # they were scored with less training, or none
            best_start = np.array(max(starts, key=lambda c: c.reward).widths)
            shortlist.append(fitted_widths(self.env, best_start / dense))
        return shortlist or [self.env.bounds.cheapest]

    def _more(self) -> Iterator[Widths]:
        """Yield all candidates scaled to the budgets, the best by reward minus excess first."""
        known, bounds = self._known(), self.env.bounds
        rows = [np.array(c.widths, dtype=np.int64) for c in known]
        worth = [
            c.reward - max(0.0, float(bounds.excess(row[None])[0]) - 1.0)
            for c, row in zip(known, rows, strict=True)
        ]
        for index in np.argsort([-value for value in worth], kind="stable"):
            yield fitted_widths(self.env, rows[index] / bounds.dense)

    def _policys_walk(self) -> Walk:
        """Return the deterministic policy's episode, as at the end of the curriculum."""
        return self._walk(self._cap(1.0), deterministic=True)

    def _cap(self, share: float) -> float:
        """Return the largest ratio that is removed from a group, after a share of the updates."""
        return min(self.settings.cap + 0.05 * share, 1.0)

    def _near_plans(self) -> int:
        """Return the number of plans near the best after each update; 0 if candidates are more than their widths."""
        if self._channels or any(self.settings.finetune_iterations):
            return 0
        share = self.settings.near_share
        return round(self.settings.episodes_per_update * share / (1.0 - share))

    def _last_near_plans(self) -> Iterator[list[Widths]]:
        """Yield plans near the best, for evaluations that known plans have saved; each uses all scores before it."""
        for _ in range(2 * self._reserve if self._near_plans() else 0):  # some are known already
            best = self._best_kept()
            if best is not None:
                yield [self._near.next(np.array(best.widths, dtype=np.int64))]

    def _best_kept(self) -> Candidate | None:
        """Return the best candidate that meets the budgets."""
        known = self._known()
        widths = np.array([c.widths for c in known], dtype=np.int64).reshape(-1, self.groups)
        best = best_feasible([c.reward for c in known], self.env.bounds.feasible(widths)) if known else None
        return None if best is None else known[best]

    def _known(self) -> list[Candidate]:
        """Return the candidates whose plans follow from their widths."""
        return [c for c in eligible(self.run) if not (self._channels and c.phase == "policy")]

    def _scored(self, walk: Walk, training: int) -> Candidate:
        """Return the candidate of an episode, after some training steps if these are set."""
        if not (self._channels or training):
            return self.run.score(walk.widths, "policy")

        def measure() -> float:
            steps = training or None
            if self._channels:
                return self.run.evaluator.score(self.env.space.soften(walk.masks), steps=steps)
            return self.run.evaluator.scored(self.env.plan(walk.widths), steps=steps)

        candidate = self.run.score_by(walk.widths, measure, "policy")
        if self._channels:
            excess = float(self.env.bounds.excess(np.array([walk.widths]))[0])
            self._masks.append((candidate.reward - max(0.0, excess - 1.0), walk.masks))
            self._masks.sort(key=lambda each: -each[0])
            del self._masks[self.settings.shortlist :]
        return candidate

    def _fill_buffer(self, scored: list[tuple[Walk, Candidate]]) -> None:
        rewards = np.array([100.0 * candidate.reward for _, candidate in scored])
        if self.settings.scale_rewards:
            if self._scale is None:
                self._scale = [float(rewards.mean()), float(max(rewards.std(), 1e-3))]
            rewards = (rewards - self._scale[0]) / self._scale[1]
        for (walk, candidate), reward in zip(scored, rewards, strict=True):
            costs = self._costs.terminal(candidate)
            for number, (state, step) in enumerate(zip(walk.states, walk.steps, strict=True)):
                last = number == self.groups - 1
                self.ppo.rollout_buffer.add_with_costs(
                    state, step, reward if last else 0.0, costs if last else 0.0 * costs, number == 0
                )

    def _points(self) -> int:
        """Return the number of widths measured per group for the start; at most a third of the evaluations."""
        if self.settings.start != "measured":
            return 0
        return min(2, self.run.limits.planned(self.settings.evaluations) // (3 * self.groups))

    def _starts(self) -> int:
        if self.settings.start == "dense":
            return 0
        return 2 + len(POWERS) if self._points() else 1

    def _state(self) -> dict[str, Any]:
        return {
            "ppo": self.ppo.state(),
            "states": self.states.state(),
            "randomness": self.randomness.state(),
            "around": self.actions.around.tolist(),
            "masks": [[worth, [mask.tolist() for mask in masks]] for worth, masks in self._masks],
            "scale": self._scale,
            "losses": self._sensitivity.losses,
            "near": self._near.state(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.ppo.restore(state["ppo"])
        self.states.restore(state["states"])
        self.randomness.restore(state["randomness"])
        self.actions.around = np.array(state["around"])
        self._masks = [(worth, [np.array(mask) for mask in masks]) for worth, masks in state["masks"]]
        self._scale = None if state["scale"] is None else [float(number) for number in state["scale"]]
        self._sensitivity.losses = list(state["losses"])
        self._near.restore(state["near"])


def best_feasible(rewards: list[float], feasible: NDArray[np.bool_]) -> int | None:
    """Return the index of the highest reward among those that meet the budgets; None if none does.

    >>> best_feasible([0.9, 0.5, 0.7], np.array([False, True, True]))
    2
    """
    kept = np.flatnonzero(feasible)
    return None if not len(kept) else int(kept[int(np.argmax(np.asarray(rewards)[kept]))])
