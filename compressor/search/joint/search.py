"""The steps of the joint agent's search."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core import progress
from compressor.search.allocation import Allocator
from compressor.search.bounds import Widths
from compressor.search.candidate import Candidate, Policy, SearchResult
from compressor.search.joint.learner import Learner
from compressor.search.joint.settings import BLOCK, ENVIRONMENT_MODEL, JointSettings
from compressor.search.neighbours import NearBest
from compressor.search.proposals import follow, followed, random_widths, uniform_or_cheapest
from compressor.search.session import (
    SearchSession,
    best_known,
    best_of_round,
    best_on_weights,
    from_earlier_rounds,
)
from compressor.search.values import POWERS, Sensitivity, saliency_values

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.pruning.plan import ChannelPlan


class JointSearch:
    """One search: the session, the learner, and the favored structure.

    Args:
        run: Session with progress, time and checkpoint; if it was restored from one, the search is restored too.
        settings: Settings of the method.
        alignment: Maps a plan to the regularizer that pulls the weights towards it; None for none.
    """

    def __init__(
        self,
        run: SearchSession,
        settings: JointSettings,
        alignment: Callable[[ChannelPlan], Callable[[nn.Module], Tensor]] | None,
    ) -> None:
        self.run, self.env, self.settings = run, run.env, settings
        self._alignment = alignment
        self.learner = Learner(run.env, settings, run.agent.seed)
        self._favoured: Widths | None = None
        self._target: str | None = None  # the plan of the aligned epochs, as JSON: the same after a resume
        self._new_episodes = 0
        self._near = NearBest(run, settings.near_spread, settings.proposals, land=partial(followed, run.env))
        self._allocator = Allocator(run.env)
        self._sensitivity: Sensitivity | None = None
        self._losses: list[list[list[float]]] = []
        run.own = self._state
        if run.restored is not None:
            self._restore(run.restored)

    # The steps, in the order of the method.

    def measure_groups(self, points: int) -> None:
        """For the warm start, measure the cost of pruning each group alone."""
        if points:
            self._sensitivity = Sensitivity(self.run, self._allocator.levels, points)
            self._sensitivity.losses = self._losses
            self._sensitivity.measure()

    def fill_replay(self, episodes: int, reserve: int) -> None:
        """Play random plans at the budget, the uniform one first, and learn from them; the weights stay fixed.

        With a warm start, knapsack plans follow the uniform one, and the second half of the rest lies near the best.
        """
        done = self.run.place.steps
        solved: dict[int, Widths] = {}
        with progress.bar("Filling the replay", total=episodes) as bar:
            bar.advance(done.get("fill", 0))
            for step in self.run.remaining("fill", episodes):
                if self.run.spent(reserve):
                    break
                widths = solved.pop(step) if step in solved else self._filling(step, episodes)
                self.env.ahead(self._foreseen(widths, step, episodes, solved))
                candidate = self._episode(follow(widths), "fill")
                done["fill"] = step + 1
                if (step + 1) % BLOCK == 0 or step + 1 == episodes:
                    self.run.save()
                bar.advance(note=f"{candidate.accuracy:.1%}")
        if self._new_episodes and not done.get("joint"):
            if self.settings.scale_rewards:
                self.learner.sac.replay_buffer.standardise()
            self.learn()

    def play(self, episodes: int, reserve: int) -> None:
        """Play a block of joint episodes: the policy's, and some that vary the currently best plan."""
        with progress.bar("Playing episodes", total=episodes) as bar:
            for _ in range(episodes):
                if self.run.spent(reserve):
                    return
                candidate = self._proposed()
                bar.advance(note=f"{candidate.accuracy:.1%}")

    def learn(self) -> None:
        """Update the policy for the episodes played since the last update."""
        if self._new_episodes and self._learns:
            losses = self.learner.learn(self._new_episodes)
            if self.learner.learned:
                self.run.place.learned[ENVIRONMENT_MODEL] = dict(self.learner.learned)
            self.run.curves.add(len(self.run.candidates), losses)
        self._new_episodes = 0

    def favour(self, reserve: int) -> None:
        """Favor the best plan on the current weights: of this round's, the policy's and the last favored.

        The paper favors the policy's own; after tens of episodes that is seldom the best plan so far.
        """
        policys: Candidate | None = None
        if self._learns and not self.run.spent(reserve):
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
        names = (group.name for group in self.env.space.groups)
        self.run.curves.add(
            self.run.place.epoch,
            {f"favoured/{name}": float(share) for name, share in zip(names, shares, strict=True)},
        )

    def train_joint_epoch(self) -> None:
        """Train one epoch that pulls the weights towards the favored structure; none after the time limit."""
        if self.run.late:
            return
        self._target = None
        self.align_to_favoured()
        self.run.train_epoch("joint")
        self._target = None
        self._begin_epoch()

    def train_aligned(self) -> None:
        """Train the last epochs, towards the favored structure; later episodes are on their weights."""
        self.align_to_favoured()
        epochs = self.run.agent.schedule.aligned
        self.run.train("aligned", epochs, "Training towards the chosen structure")
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.learner.begin_epoch(max(0, self.run.place.epoch - self.run.agent.schedule.warmup))

    def align_to_favoured(self) -> None:
        """Set the trainer's regularizer to the favored structure; to the same channels after a resume."""
        trainer = self.run.agent.trainer
        if trainer is None or self._alignment is None or self._favoured is None:
            return
        from compressor.pruning.plan import ChannelPlan

        if self._target is None:
            self._target = self.env.plan(self._favoured).to_json()
        trainer.regulariser = self._alignment(ChannelPlan.from_json(self._target))
        weight = float(getattr(trainer.regulariser, "beta", 1.0))
        self.run.curves.add(self.run.place.epoch, {"training/align_weight": weight})

    def play_again(self) -> None:
        """Continue with tightened budgets: near the best plan so far, scaled to them."""
        self._favoured = next(from_earlier_rounds(self.run))
        for step in self.run.remaining("again", self.settings.again_episodes):
            if self.run.spent(reserve=1):
                break
            if step == 0:
                self._episode(follow(self._favoured), "again")
            elif step == 1 and self._learns:
                self._episode(self.learner.policy(deterministic=True), "again")
            elif self._learns:
                self._nearby("again")
            else:
                self._episode(follow(self._instead()), "again")
            self.run.done("again")

    def play_out(self, blocks: int) -> None:
        """Spend the evaluations that known plans have saved, on the final weights, except those of the choice."""
        for _ in self.run.remaining("out", 4 * blocks):
            unknown = sum(not self.env.known(widths) for widths in self._shortlist())
            reserve = unknown + bool(unknown)  # and the policy's own
            if self.run.spent(reserve):
                return
            self.play(BLOCK, reserve)
            self.learn()
            self.run.done("out")

    def choose(self) -> SearchResult:
        """Score the shortlist on the final weights and choose the best."""
        if not self.settings.rescore:
            best, uniform = best_of_round(self.run), uniform_or_cheapest(self.env).tolist()
            known = uniform if self._favoured is None else self._favoured.tolist()
            first = known if best is None else best.widths
            return self._ended(self.run.choose([first, uniform], score_all=False))
        if self._learns and self._favoured is not None and not self.run.spent(reserve=1):
            self._episode(self.learner.policy(deterministic=True), "policy")
        return self._ended(self.run.choose(self._shortlist()))

    def _shortlist(self) -> list[list[int]]:
        """Return the currently best plan, the favored one, the best few so far and the uniform one; each once."""
        found: list[Any] = [self._best_now(), *([] if self._favoured is None else [self._favoured])]
        found += [*best_known(self.run, self.settings.shortlist), uniform_or_cheapest(self.env)]
        return [list(each) for each in dict.fromkeys(tuple(map(int, widths)) for widths in found)]

    def _ended(self, result: SearchResult) -> SearchResult:
        if self.run.agent.trainer is not None:
            self.run.agent.trainer.regulariser = None
        return result

    # Their helpers.

    def _episode(self, policy: Policy, phase: str) -> Candidate:
        episode = self.run.episode(policy, phase)
        self.learner.remember(episode)
        self._new_episodes += 1
        return episode.candidate

    @property
    def _learns(self) -> bool:
        return self.settings.proposer == "learned"

    def _proposed(self) -> Candidate:
        """Play the next joint episode: the policy's, one near the best, or that of the agent's substitute."""
        if not self._learns:
            return self._episode(follow(self._instead()), "joint")
        if self.learner.generator.random() < self.settings.near_share:
            return self._nearby("near")
        return self._episode(self.learner.policy(), "joint")

    def _nearby(self, phase: str) -> Candidate:
        """Play an episode of a plan near the currently best."""
        widths = self._near.next(self._best_now())
        self.env.ahead([widths, *self._near.coming])
        return self._episode(follow(widths), phase)

    def _instead(self, generator: np.random.Generator | None = None) -> Widths:
        """Return the plan to play instead of a learning agent's, or to fill its replay."""
        if self.settings.proposer == "uniform":
            return uniform_or_cheapest(self.env)
        return random_widths(self.env, generator or self.learner.generator)

    def _foreseen(
        self, widths: Widths, step: int, episodes: int, solved: dict[int, Widths]
    ) -> Iterator[Widths]:
        """Yield the widths that this episode ends with, and those of the following steps of the fill.

        Nothing is drawn from the generator. Solved plans are stored in `solved`: no step changes them.
        """
        yield followed(self.env, widths)
        generator = copy.deepcopy(self.learner.generator)
        for coming in range(step + 1, episodes):
            if self._is_near(coming, episodes):
                break
            found = solved[coming] if coming in solved else self._filling(coming, episodes, generator)
            if self._solved_for(coming):
                solved[coming] = found
            yield followed(self.env, found)
        if self._is_near(step, episodes):
            yield from self._near.coming

    def _solved_for(self, step: int) -> bool:
        """Return whether neither chance nor earlier plans determine the plan of this step of the fill."""
        if not self.settings.measures_groups or step > 1 + len(POWERS):
            return False
        return step != 1 or (self._sensitivity is not None and self._sensitivity.complete)

    def _is_near(self, step: int, episodes: int) -> bool:
        """Return whether this step of the fill plays a plan near the best."""
        first = 2 + len(POWERS)
        return self.settings.measures_groups and step >= first + (episodes - first) // 2

    def _filling(self, step: int, episodes: int, generator: np.random.Generator | None = None) -> Widths:
        if step == 0:
            return uniform_or_cheapest(self.env)
        if self.settings.measures_groups:
            sensitivity = self._sensitivity
            if step == 1 and sensitivity is not None and sensitivity.complete:
                return self._allocator.solve(sensitivity.values())
            if 1 < step <= 1 + len(POWERS):
                values = saliency_values(self.env.saliency(), self._allocator.levels, POWERS[step - 2])
                return self._allocator.solve(values)
            if self._is_near(step, episodes):
                return self._near.next(self._best_now())
        return self._instead(generator)

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
            "losses": self._losses,
            "near": self._near.state(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.learner.restore(state["learner"])
        favoured = state["favoured"]
        self._favoured = None if favoured is None else np.array(favoured, dtype=np.int64)
        self._target = state["target"]
        self._new_episodes = int(state["new_episodes"])
        self._losses = list(state["losses"])
        self._near.restore(state["near"])
