"""What every search keeps while it runs: its place, candidates, time, and the file that it resumes from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor import progress
from compressor.agents.base import Agent, Candidate, Limits, SearchResult
from compressor.agents.curves import Curves
from compressor.env.bounds import LegalWidths, Widths
from compressor.env.environment import Observation, PruningEnv, Score
from compressor.errors import CompressorError
from compressor.pruning.plan import ChannelPlan

if TYPE_CHECKING:
    from compressor.run_dir import Checkpoint, EpisodeLog
    from compressor.training.evaluate import Evaluator

FORMAT = 1
"""Version of the checkpoint's content; another one is refused."""

Policy = Callable[[Observation, LegalWidths], float]
"""From an observation and what is legal for the group at hand to a ratio to remove."""


@dataclass(frozen=True)
class Transition:
    """One step of an episode.

    Attributes:
        observation, following: (9 + context,), before and after it.
        action: the ratio removed, as the bounds moved it.
        reward: 0 but for the last step.
        last: whether it ended the episode.
        asked: the ratio that the policy asked for.
    """

    observation: Observation
    action: float
    following: Observation
    reward: float
    last: bool
    asked: float


@dataclass(frozen=True)
class Episode:
    """A finished walk through all groups."""

    transitions: tuple[Transition, ...]
    candidate: Candidate


@dataclass
class Place:
    """Where a search stands; all of it goes into the checkpoint.

    Attributes:
        steps: how many steps of each phase are done.
        epoch: epochs of training so far.
        round: 0, and one more each time that the search goes on with tightened budgets.
        evaluations_before: evaluations of earlier rounds.
        training_seconds, seconds: of the time before the last save.
        chosen: widths of the result, once there is one.
        kept: its plan as JSON, where the agent chose the channels as well.
        training: what each epoch of training was, as the manifest has it.
    """

    steps: dict[str, int] = field(default_factory=dict)
    epoch: int = 0
    round: int = 0
    evaluations_before: int = 0
    training_seconds: float = 0.0
    seconds: float = 0.0
    chosen: list[int] | None = None
    kept: str | None = None
    training: list[dict[str, Any]] = field(default_factory=list)


class SearchRun:
    """One search of one agent, from its first line to its result.

    The agent acts through this: `train_epoch`, `episode`, `score`, `choose`; and calls `done` at the end of
        each step of
    a phase, which saves. What it must remember itself, `own` returns; `restored` holds what that was when a
    checkpoint was found, else None.

    Raises:
        CompressorError: the checkpoint is of another agent, space or version.
    """

    def __init__(
        self,
        agent: Agent,
        env: PruningEnv,
        evaluator: Evaluator,
        limits: Limits,
        log: EpisodeLog,
        checkpoint: Checkpoint,
    ) -> None:
        self.agent, self.env, self.evaluator, self.limits = agent, env, evaluator, limits
        self._log, self._checkpoint = log, checkpoint
        self.own: Callable[[], dict[str, Any]] = dict
        self.restored: dict[str, Any] | None = None
        self.place = Place()
        self.candidates: list[Candidate] = []
        self.curves = Curves(agent.curves)
        self._started = time.perf_counter()
        state = checkpoint.load()
        log.truncate(0 if state is None else int(state.get("episodes", 0)))
        if state is not None:
            self._restore(state)

    def remaining(self, phase: str, total: int) -> Iterator[int]:
        """The steps of a phase that are not done yet."""
        yield from range(self.place.steps.get(phase, 0), total)

    def done(self, phase: str) -> None:
        """A step of a phase is done: save everything, so that a resume starts behind it."""
        self.place.steps[phase] = self.place.steps.get(phase, 0) + 1
        self.save()

    @property
    def evaluations(self) -> int:
        """Candidates scored in this round of the search."""
        return self.env.evaluations - self.place.evaluations_before

    @property
    def seconds(self) -> float:
        """Wall time of the search, that before a resume included."""
        return self.place.seconds + time.perf_counter() - self._started

    def spent(self, reserve: int = 0) -> bool:
        """Whether a limit is reached, with `reserve` evaluations put by for later."""
        most, seconds = self.limits.max_evaluations, self.limits.max_seconds
        if most is not None and self.evaluations + reserve >= most:
            return True
        return seconds is not None and self.seconds >= seconds

    def train_epoch(self, phase: str) -> None:
        """Train the weights for one epoch, if the agent has a trainer; scores so far are of the past then."""
        trainer = self.agent.trainer
        if trainer is None:
            return
        started = time.perf_counter()
        stats = trainer.run_epoch()
        self.place.training_seconds += time.perf_counter() - started
        self.place.epoch += 1
        self.place.training.append(
            {
                "phase": phase,
                "epoch": self.place.epoch,
                "loss": stats.loss,
                "accuracy": stats.accuracy,
                "regulariser": stats.regulariser,
                "seconds": round(stats.seconds, 3),
            }
        )
        self._forget()
        self.curves.add(
            self.place.epoch,
            {
                f"training/loss_{phase}": stats.loss,
                "training/accuracy": stats.accuracy,
                "training/regulariser": stats.regulariser,
            },
        )

    def train(self, phase: str, epochs: int, label: str) -> None:
        """Train for `epochs` in all, saving after each."""
        if self.agent.trainer is None or self.place.steps.get(phase, 0) >= epochs:
            return
        with progress.bar(label, total=epochs) as bar:
            bar.advance(self.place.steps.get(phase, 0))
            for _ in self.remaining(phase, epochs):
                self.train_epoch(phase)
                self.done(phase)
                bar.advance()

    def episode(self, policy: Policy, phase: str) -> Episode:
        """Walk through all groups by `policy`, score the plan and log it."""
        transitions: list[Transition] = []
        observation, _ = self.env.reset()
        last = False
        while not last:
            action = np.array([policy(observation, self.env.legal)], dtype=np.float32)
            following, reward, last, _, info = self.env.step(action)
            clipped, asked = float(info["action"]), float(np.clip(action[0], 0.0, 1.0))
            transitions.append(Transition(observation, clipped, following, reward, last, asked))
            observation = following
        return Episode(tuple(transitions), self._record(info["score"], phase))

    def score(self, widths: Widths | Sequence[int], phase: str, floor: float | None = None) -> Candidate:
        """Score a plan of these widths (G,) and log it; given up where it cannot earn `floor`."""
        return self._record(self.env.score(widths, reward_floor=floor), phase)

    def score_by(self, widths: Widths | Sequence[int], measure: Callable[[], float], phase: str) -> Candidate:
        """Score a candidate of these widths (G,) in a way of the agent's, and log it; see `PruningEnv.score_by`."""
        return self._record(self.env.score_by(widths, measure), phase)

    def choose(
        self,
        shortlist: Sequence[Sequence[int]],
        *,
        score_all: bool = True,
        plans: Mapping[tuple[int, ...], ChannelPlan] | None = None,
    ) -> SearchResult:
        """Score the feasible ones of a shortlist on the weights as they are now; the best is the result.

        The first feasible one is scored whatever the limits say, so that there is a result; with `score_all` off, it
        is the result. Only the best matters here: one that cannot beat the best so far is given up. `plans` has, by
        widths, the channels to keep where these are not the most important ones.

        Raises:
            CompressorError: none keeps the budgets.
        """
        scored: list[Candidate] = []
        for widths in dict.fromkeys(tuple(int(width) for width in widths) for widths in shortlist):
            feasible = bool(self.env.bounds.feasible(np.array(widths, dtype=np.int64))[0])
            if feasible and (not scored or (score_all and not self.spent())):
                floor = max((candidate.reward for candidate in scored), default=None)
                if (plan := (plans or {}).get(widths)) is None:
                    scored.append(self.score(widths, "final", floor))
                else:
                    scored.append(self.score_by(widths, partial(self.evaluator, plan), "final"))
        if not scored:
            raise CompressorError(
                f"None of {len(shortlist)} final candidates keeps the budgets.", "Loosen the budget a little."
            )
        self.place.chosen = list(max(scored, key=lambda candidate: candidate.reward).widths)
        chosen = (plans or {}).get(tuple(self.place.chosen))
        self.place.kept = None if chosen is None else chosen.to_json()
        self.save()
        return self._result(self.place.chosen)

    def result(self) -> SearchResult | None:
        """The result if the search has ended, else None."""
        return None if self.place.chosen is None else self._result(self.place.chosen)

    def _result(self, widths: Sequence[int]) -> SearchResult:
        chosen = tuple(widths)
        best = next(candidate for candidate in reversed(self.candidates) if candidate.widths == chosen)
        total = self.seconds
        training, evaluation = self.place.training_seconds, self.env.evaluation_seconds
        self.curves.close()
        return SearchResult(
            best=self.env.plan(chosen) if self.place.kept is None else ChannelPlan.from_json(self.place.kept),
            widths={group.name: width for group, width in zip(self.env.space.groups, chosen, strict=True)},
            reward=best.reward,
            accuracy=best.accuracy,
            candidates=tuple(self.candidates),
            evaluations=self.evaluations,
            seconds=total,
            training=tuple(self.place.training),
            timing={
                "evaluation": evaluation,
                "training": training,
                "agent": max(0.0, total - training - evaluation),
                "total": total,
            },
        )

    def save(self) -> None:
        """Write the checkpoint."""
        trainer = self.agent.trainer
        self.place.seconds, self._started = self.seconds, time.perf_counter()
        self._checkpoint.save(
            {
                "format": FORMAT,
                "agent": self.agent.name,
                "space": space_fingerprint(self.env),
                "budgets": self._budgets(),
                "episodes": len(self._log),
                "place": vars(self.place).copy(),
                "candidates": [candidate.to_plain() for candidate in self.candidates],
                "env": self.env.state(),
                "trainer": None if trainer is None else trainer.state(),
                "own": self.own(),
            }
        )

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._check(state)
        self.place = Place(**state["place"])
        self.candidates = [Candidate.from_plain(plain) for plain in state["candidates"]]
        if self.agent.trainer is not None:
            self.agent.trainer.restore(state["trainer"])
        self._forget()
        self.env.restore(state["env"])
        self.restored = state["own"] or None  # saved before the method began, as in the warm-up: nothing yet
        if self.place.chosen is not None and not _alike(state["budgets"], self._budgets()):
            self.place.chosen = None
            self.place.round += 1
            self.place.evaluations_before = self.env.evaluations
            self.place.steps.pop("again", None)

    def _budgets(self) -> dict[str, list[float]]:
        """What tells budgets apart: the target, and predictions that a corrected latency table changes."""
        dense, chosen = self.env.bounds.dense, self.place.chosen
        rows = np.stack([dense, self.env.bounds.cheapest if chosen is None else np.array(chosen)])
        return {
            budget.name: [float(budget.target), *np.asarray(budget.predict(rows), dtype=np.float64).tolist()]
            for budget in self.env.budgets
        }

    def _check(self, state: Mapping[str, Any]) -> None:
        path = self._checkpoint.path
        mend = f"Delete {path} to search anew, or go on with what it was written by."
        if state.get("format") != FORMAT:
            raise CompressorError(
                f"The search's state in {path} has format {state.get('format')!r}, expected {FORMAT}.", mend
            )
        if state["agent"] != self.agent.name:
            raise CompressorError(
                f"The search's state in {path} is of the agent {state['agent']}, not of {self.agent.name}.",
                mend,
            )
        if state["space"] != space_fingerprint(self.env):
            raise CompressorError(
                f"The search's state in {path} is of another pruning space, with other groups or widths.",
                mend,
            )
        if (state["trainer"] is None) != (self.agent.trainer is None):
            found, given = ("without", "with") if state["trainer"] is None else ("with", "without")
            raise CompressorError(
                f"The search's state in {path} is of a search {found} training, not {given}.", mend
            )

    def _forget(self) -> None:
        self.evaluator.weights_moved()
        self.env.weights_moved()

    def _record(self, score: Score, phase: str) -> Candidate:
        candidate = Candidate(
            score.widths,
            score.accuracy,
            score.reward,
            dict(score.costs),
            phase,
            self.place.epoch,
            self.place.round,
            score.given_up,
        )
        self.candidates.append(candidate)
        self.curves.add(
            len(self.candidates), {"search/reward": score.reward, "search/accuracy": score.accuracy}
        )
        self._log.append(
            {
                "episode": len(self._log),
                "epoch": self.place.epoch,
                "phase": phase,
                "round": self.place.round,
                "widths": list(score.widths),
                "costs": dict(score.costs),
                "reward": score.reward,
                "accuracy": score.accuracy,
                "seconds": round(score.seconds, 4),
                **({"given_up": True} if score.given_up else {}),
            }
        )
        return candidate


def _alike(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> bool:
    return ours.keys() == theirs.keys() and all(
        np.allclose(ours[name], theirs[name], rtol=1e-9) for name in ours
    )


def space_fingerprint(env: PruningEnv) -> str:
    """A checksum of the groups and their legal widths: where it agrees, widths mean the same."""
    choices = env.bounds.choices
    described = [
        [group.name, int(group.width), len(legal), int(legal[0])]
        for group, legal in zip(env.space.groups, choices, strict=True)
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
