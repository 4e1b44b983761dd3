"""The joint agent: SAC chooses widths while the weights train towards the favored structure (arXiv 2403.19490).

`_JointSearch.search` is the method, step by step. Its settings are in `joint_settings`; what it learns with (networks,
replay, environment model) is in `joint_learner`, which imports Stable-Baselines3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core import progress
from compressor.search.allocation import POWERS, Allocator, Sensitivity, starting_plans
from compressor.search.base import IDLE, Agent, register_agent
from compressor.search.bounds import Widths
from compressor.search.joint_settings import (
    ALIGNMENT,
    BLOCK,
    ENVIRONMENT_MODEL,
    PUBLISHED,
    EpisodePlan,
    JointSettings,
    plan_episodes,
)
from compressor.search.neighbours import NearBest
from compressor.search.proposals import follow, followed, random_widths, uniform_or_cheapest
from compressor.search.records import Candidate, Policy, SearchResult
from compressor.search.schedule import JOINT_EPOCHS_TO_LEARN
from compressor.search.session import (
    SearchSession,
    best_known,
    best_of_round,
    best_on_weights,
    from_earlier_rounds,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.pruning.plan import ChannelPlan


@register_agent
class JointAgent(Agent):
    """Trains and prunes together: a soft actor-critic chooses the ratios, with the accuracy as reward.

    The phases, each resumable at the end of a step: warm-up epochs; episodes that fill the replay, with fixed weights;
    joint epochs, each after a round of episodes and with a regularizer that pulls the weights towards the structure
    favored then; aligned epochs, with that structure fixed; and the final choice among the best few, the deterministic
    policy's and the uniform plan, all scored again on the final weights.

    Without a trainer the weights stay fixed.
    """

    name = "joint"
    source = "arXiv 2403.19490"
    published = PUBLISHED
    trains_jointly = True
    Settings = JointSettings

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._joint_epochs = self.schedule.joint if self.trainer is not None else 0
        self._model_is_idle = ""
        if self.context_size and self._joint_epochs < JOINT_EPOCHS_TO_LEARN:
            epochs = self._joint_epochs
            had = f"the search has {epochs or 'no'} joint epoch{'' if epochs == 1 else 's'}"
            self._model_is_idle = f"it learns how rewards change from one joint epoch to the next, and {had}"
            self.context_size = 0

    def idle(self) -> dict[str, str]:
        found = {}
        if self._model_is_idle:
            found[ENVIRONMENT_MODEL] = self._model_is_idle
        if self.alignment is not None and (self.trainer is None or not self.schedule.joint + self.schedule.aligned):
            found[ALIGNMENT] = "no epoch of training follows the choice of a structure"
        return found

    def unread_settings(self) -> dict[str, str]:
        found: dict[str, str] = self.settings.unread(environment_model=bool(self.context_size))
        return found

    def effects(self, result: SearchResult) -> dict[str, str]:
        found = {name: f"{IDLE}{reason}" for name, reason in self.idle().items()}
        if learned := result.learned.get(ENVIRONMENT_MODEL):
            found[ENVIRONMENT_MODEL] = (
                f"{int(learned['updates'])} updates on rewards of {int(learned['weights'])} states of the weights; "
                f"squared error of scaled rewards {learned['first_error']:.2f} at first, "
                f"{learned['last_error']:.2f} at last"
            )
        elif self.context_size:
            found[ENVIRONMENT_MODEL] = f"{IDLE}no round of episodes followed the first joint epoch"
        pulled = [each["regulariser"] for each in result.training if each["phase"] in ("joint", "aligned")]
        if pulled and self.alignment is not None and ALIGNMENT not in found:
            epochs = f"{len(pulled)} epoch{'' if len(pulled) == 1 else 's'}"
            found[ALIGNMENT] = f"{epochs}; mean penalty {pulled[0]:.3g} in the first, {pulled[-1]:.3g} in the last"
        return found

    def _search(self, run: SearchSession) -> SearchResult:
        return _JointSearch(run, self.settings, self.alignment).search()


class _JointSearch:
    """One search: the session, the learner, and the favored structure."""

    def __init__(
        self,
        run: SearchSession,
        settings: JointSettings,
        alignment: Callable[[ChannelPlan], Callable[[nn.Module], Tensor]] | None,
    ) -> None:
        from compressor.search.joint_learner import Learner  # imports Stable-Baselines3

        self.run, self.env, self.settings = run, run.env, settings
        self.trainer, self.schedule = run.agent.trainer, run.agent.schedule
        self._alignment = alignment
        self.learner = Learner(run.env, settings, run.agent.seed)
        self._favoured: Widths | None = None
        self._target: str | None = None  # the plan of the aligned epochs, as JSON: the same after a resume
        self._new_episodes = 0
        self._allocator = Allocator(run.env)
        self._sensitivity = Sensitivity(run, self._allocator.levels)
        land = partial(followed, run.env)
        self._near = NearBest(run, self._allocator, self._sensitivity, settings.near_spread, settings.proposals, land)
        run.own = self._state
        if run.restored is not None:
            self._restore(run.restored)

    def search(self) -> SearchResult:
        run = self.run
        if run.place.round:  # other budgets: the weights stay, and the search reuses what it has learned
            self._play_again()
            return self._choose()

        plan = plan_episodes(self.settings, self.schedule.joint, run.limits, len(self.env.bounds.dense))
        if plan.points:
            self._sensitivity.measure(plan.points)
        self._fill_replay(plan)
        for block in run.remaining("joint", plan.rounds * plan.blocks):
            if run.late:
                break
            self._play(plan.block_episodes(block), plan.reserve)
            self._learn()
            if plan.ends_round(block):
                self._favour(plan.reserve)
                if self.schedule.joint and not run.late:
                    self._target = None
                    self._align_to_favoured()
                    run.train_epoch("joint")
                    self._target = None
                    self._begin_epoch()
            run.done("joint")
        self._align_to_favoured()
        run.train("aligned", self.schedule.aligned, "Training towards the chosen structure")
        self._begin_epoch()  # later episodes are on these weights
        if run.limits.use_all:
            self._play_out(plan.rounds * plan.blocks)
        return self._choose()

    # The steps, in the order of the method.

    def _fill_replay(self, plan: EpisodePlan) -> None:
        """Play random plans at the budget, the uniform one first, and learn from them; the weights stay fixed.

        With a warm start, knapsack plans follow the uniform one, and the second half of the rest lies near the best.
        """
        steps, episodes = self.run.place.steps, plan.fill
        measured = bool(plan.points) and self._sensitivity.complete
        solved: dict[int, Widths] = {}
        with progress.bar("Filling the replay", total=episodes) as bar:
            bar.advance(steps.get("fill", 0))
            for step in self.run.remaining("fill", episodes):
                if self.run.spent(plan.reserve):
                    break
                widths = solved.pop(step) if step in solved else self._filling(step, episodes, measured)
                self.env.ahead(self._foreseen(widths, step, episodes, measured, solved))
                candidate = self._episode(follow(widths), "fill")
                steps["fill"] = step + 1
                if (step + 1) % BLOCK == 0 or step + 1 == episodes:
                    self.run.save()
                bar.advance(note=f"{candidate.accuracy:.1%}")
        if self._new_episodes and not steps.get("joint"):
            if self.settings.scale_rewards:
                self.learner.sac.replay_buffer.standardise()
            self._learn()

    def _play(self, episodes: int, reserve: int) -> None:
        """Play a block of joint episodes: the policy's, and some that vary the currently best plan."""
        with progress.bar("Playing episodes", total=episodes) as bar:
            for _ in range(episodes):
                if self.run.spent(reserve):
                    return
                if self.learner.generator.random() < self.settings.near_share:
                    candidate = self._nearby("near")
                else:
                    candidate = self._episode(self.learner.policy(), "joint")
                bar.advance(note=f"{candidate.accuracy:.1%}")

    def _learn(self) -> None:
        """Update the policy for the episodes played since the last update."""
        if self._new_episodes:
            losses = self.learner.learn(self._new_episodes)
            if self.learner.learned:
                self.run.place.learned[ENVIRONMENT_MODEL] = dict(self.learner.learned)
            self.run.curves.add(len(self.run.candidates), losses)
        self._new_episodes = 0

    def _favour(self, reserve: int) -> None:
        """Favor the best plan on the current weights: of this round's, the policy's and the last favored.

        The paper favors the policy's own; after tens of episodes that is seldom the best plan so far.
        """
        policys: Candidate | None = None
        if not self.run.spent(reserve):
            policys = self._episode(self.learner.policy(deterministic=True), "policy")
        if self.settings.favour == "policy" and policys is not None:
            self._favoured = np.array(policys.widths, dtype=np.int64)
        else:
            if self._favoured is not None and not self.run.spent(reserve):
                best = best_on_weights(self.run)
                # Only whether it beats the best matters here, and it does not go into the replay.
                self.run.score(self._favoured, "favoured", floor=None if best is None else best.reward)
            self._favoured = self._best_now()
        shares = self._favoured / self.env.bounds.dense
        names = self.env.bounds.names
        self.run.curves.add(
            self.run.place.epoch,
            {f"favoured/{name}": float(share) for name, share in zip(names, shares, strict=True)},
        )

    def _align_to_favoured(self) -> None:
        """Set the trainer's regularizer to the favored structure; to the same channels after a resume."""
        if self.trainer is None or self._alignment is None or self._favoured is None:
            return
        from compressor.pruning.plan import ChannelPlan

        if self._target is None:
            self._target = self.env.plan(self._favoured).to_json()
        self.trainer.regulariser = self._alignment(ChannelPlan.from_json(self._target))
        weight = float(getattr(self.trainer.regulariser, "beta", 1.0))
        self.run.curves.add(self.run.place.epoch, {"training/align_weight": weight})

    def _begin_epoch(self) -> None:
        self.learner.begin_epoch(max(0, self.run.place.epoch - self.schedule.warmup))

    def _play_again(self) -> None:
        """Continue with other budgets near the best plan so far, scaled to them; for another target, also elsewhere."""
        self._favoured = next(from_earlier_rounds(self.run))
        phase, starts = f"again{self.run.place.round}", list[Callable[[], Widths]]()
        if self.run.another_target and self.settings.warm_start:
            starts = starting_plans(self.env, self._allocator, self._sensitivity)
        for step in self.run.remaining(phase, self.run.later(self.settings.again_episodes)):
            if self.run.spent(reserve=1):
                break
            if step == 0:
                self._episode(follow(self._favoured), "again")
            elif step == 1:
                self._episode(self.learner.policy(deterministic=True), "again")
            elif step < 2 + len(starts):
                self._episode(follow(starts[step - 2]()), "start")
            else:
                self._nearby("again")
            self.run.done(phase)

    def _play_out(self, blocks: int) -> None:
        """Spend the evaluations that known plans have saved, on the final weights, except those of the choice."""
        for _ in self.run.remaining("out", 4 * blocks):
            unknown = sum(not self.env.known(widths) for widths in self._shortlist())
            reserve = unknown + bool(unknown)  # and the policy's own
            if self.run.spent(reserve):
                return
            self._play(BLOCK, reserve)
            self._learn()
            self.run.done("out")

    def _choose(self) -> SearchResult:
        """Score the shortlist on the final weights and choose the best."""
        if self.settings.rescore:
            if self._favoured is not None and not self.run.spent(reserve=1):
                self._episode(self.learner.policy(deterministic=True), "policy")
            result = self.run.choose(self._shortlist(), expected=self._near.expected)
        else:
            best, uniform = best_of_round(self.run), uniform_or_cheapest(self.env).tolist()
            known = uniform if self._favoured is None else self._favoured.tolist()
            result = self.run.choose([known if best is None else best.widths, uniform], score_all=False)
        if self.trainer is not None:
            self.trainer.regulariser = None
        return result

    # Their helpers.

    def _shortlist(self) -> list[list[int]]:
        """Return the currently best plan, the favored one, the best few so far and the uniform one; each once."""
        found: list[Any] = [self._best_now(), *([] if self._favoured is None else [self._favoured])]
        found += [*best_known(self.run, self.settings.shortlist), uniform_or_cheapest(self.env)]
        return [list(each) for each in dict.fromkeys(tuple(map(int, widths)) for widths in found)]

    def _episode(self, policy: Policy, phase: str) -> Candidate:
        episode = self.run.episode(policy, phase)
        self.learner.remember(episode)
        self._new_episodes += 1
        return episode.candidate

    def _nearby(self, phase: str) -> Candidate:
        """Play an episode of a plan near the currently best."""
        widths = self._near.next(self._best_now())
        self.env.ahead([widths, *self._near.coming])
        return self._episode(follow(widths), phase)

    def _filling(
        self, step: int, episodes: int, measured: bool, generator: np.random.Generator | None = None
    ) -> Widths:
        """Return the plan of a step of the fill; without `generator`, random ones draw from the learner's."""
        if step == 0:
            return uniform_or_cheapest(self.env)
        if self._is_solved(step, measured):
            if step == 1:
                return self._allocator.solve(self._sensitivity.values())
            return self._allocator.solve_saliency(POWERS[step - 2])
        if self._is_near(step, episodes):
            return self._near.next(self._best_now())
        return random_widths(self.env, generator or self.learner.generator)

    def _is_solved(self, step: int, measured: bool) -> bool:
        """Return whether a step of the fill plays a knapsack plan; neither chance nor earlier plans decide it."""
        return self.settings.warm_start and (measured if step == 1 else 1 < step <= 1 + len(POWERS))

    def _is_near(self, step: int, episodes: int) -> bool:
        """Return whether a step of the fill plays a plan near the best."""
        first = 2 + len(POWERS)
        return self.settings.warm_start and step >= first + (episodes - first) // 2

    def _foreseen(
        self, widths: Widths, step: int, episodes: int, measured: bool, solved: dict[int, Widths]
    ) -> Iterator[Widths]:
        """Yield the widths that this episode ends with, and those of the following steps of the fill.

        Nothing is drawn from the learner's generator. Solved plans are stored in `solved`: no step changes them.
        """
        yield followed(self.env, widths)
        generator = copy.deepcopy(self.learner.generator)
        for coming in range(step + 1, episodes):
            if self._is_near(coming, episodes):
                break
            found = solved[coming] if coming in solved else self._filling(coming, episodes, measured, generator)
            if self._is_solved(coming, measured):
                solved[coming] = found
            yield followed(self.env, found)
        if self._is_near(step, episodes):
            yield from self._near.coming

    def _best_now(self) -> Widths:
        """Return the best plan on the current weights, else the favored one, else the uniform one."""
        best = best_on_weights(self.run)
        if best is not None:
            return np.array(best.widths, dtype=np.int64)
        return uniform_or_cheapest(self.env) if self._favoured is None else self._favoured

    def _state(self) -> dict[str, Any]:
        return {
            "learner": self.learner.state(),
            "favoured": None if self._favoured is None else self._favoured.tolist(),
            "target": self._target,
            "new_episodes": self._new_episodes,
            "losses": self._sensitivity.losses,
            "near": self._near.state(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.learner.restore(state["learner"])
        favoured = state["favoured"]
        self._favoured = None if favoured is None else np.array(favoured, dtype=np.int64)
        self._target = state["target"]
        self._new_episodes = int(state["new_episodes"])
        self._sensitivity.losses = list(state["losses"])
        self._near.restore(state["near"])
