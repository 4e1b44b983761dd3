"""One search from start to result: its progress, candidates, time, and checkpoint."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compressor.core import progress
from compressor.core.errors import CompressorError
from compressor.core.records import Checkpoint
from compressor.pruning.plan import ChannelPlan
from compressor.search.bounds import Widths
from compressor.search.environment import PruningEnv, Score
from compressor.search.finalists import finalists
from compressor.search.proposals import fitted_widths
from compressor.search.records import (
    FORMAT,
    MEASUREMENT,
    Candidate,
    Episode,
    Finalist,
    Limits,
    Place,
    Policy,
    SearchResult,
    Transition,
    alike,
    budget_fingerprint,
    check_state,
    check_unfinished,
    space_fingerprint,
)
from compressor.search.schedule import Schedule

if TYPE_CHECKING:
    from compressor.core.records import EpisodeLog
    from compressor.search.evaluate import Evaluator
    from compressor.training.loop import Trainer

_Key = tuple[int, ...]
"""Widths of a plan."""

ANOTHER_TARGET = 0.3
"""Plans for another target, as a share of those of the first."""


class Searcher(Protocol):
    """What a session needs of its agent."""

    seed: int
    trainer: Trainer | None
    schedule: Schedule
    curves: Path | None

    @property
    def name(self) -> str:
        """Name in messages and in the checkpoint."""


class SearchSession:
    """One search of one agent, from start to result.

    The agent acts through `train_epoch`, `episode`, `score` and `choose`, and calls `done` at the end of each step
    of a phase, which saves. `own` returns the agent's own state to save; `restored` holds that state if a checkpoint
    was found, else None.

    Raises:
        CompressorError: The checkpoint is of another agent, space or version.
    """

    def __init__(
        self,
        agent: Searcher,
        env: PruningEnv,
        evaluator: Evaluator,
        limits: Limits,
        log: EpisodeLog,
        checkpoint: Checkpoint,
    ) -> None:
        self.agent, self.env, self.evaluator, self.limits = agent, env, evaluator, limits
        self._log, self._checkpoint = log, checkpoint
        self._weights: Checkpoint | None = None  # the file that holds the current training state
        self.own: Callable[[], dict[str, Any]] = dict
        self.restored: dict[str, Any] | None = None
        self.place = Place()
        self.candidates: list[Candidate] = []
        self._started = time.perf_counter()
        state = checkpoint.load()
        if state is not None:
            check_state(state, checkpoint.path, agent.name, agent.trainer is not None, env)
            self._restore(state)
        log.truncate(0 if state is None else int(state["episodes"]))
        self.curves = Curves(agent.curves)  # only after the state was accepted
        if state is None and self.env.state()["functions"]:
            self.save()  # for `keep_function_values`

    def remaining(self, phase: str, total: int) -> Iterator[int]:
        """Yield the unfinished steps of a phase."""
        yield from range(self.place.steps.get(phase, 0), total)

    def done(self, phase: str) -> None:
        """Save everything after a step of a phase, so that a resume continues after it."""
        self.place.steps[phase] = self.place.steps.get(phase, 0) + 1
        self.save()

    @property
    def evaluations(self) -> int:
        """Number of candidates scored in this round of the search."""
        return self.env.evaluations - self.place.evaluations_before

    @property
    def seconds(self) -> float:
        """Wall time of the search in seconds, including the time before a resume."""
        return self.place.seconds + time.perf_counter() - self._started

    @property
    def another_target(self) -> bool:
        """Whether this round begins the search for another target, with what that of an earlier one has learned."""
        return 0 < self.place.first_round == self.place.round

    def later(self, usual: int) -> int:
        """Return how many plans to plan for in a later round: `usual` after a correction of the budgets.

        For another target it is a share of the first round's plans: groups are measured already, and the model of the
        rewards knows all plans so far.
        """
        if not self.another_target:
            return usual
        first = {(each.epoch, each.widths) for each in self.candidates if each.round == 0}
        return max(usual, round(ANOTHER_TARGET * len(first)))

    def spent(self, reserve: int = 0) -> bool:
        """Return whether a limit is reached, with `reserve` evaluations reserved for later."""
        most = self.limits.max_evaluations
        return self.late or (most is not None and self.evaluations + reserve >= most)

    @property
    def late(self) -> bool:
        """Whether the time limit is reached: nothing is started any more."""
        most = self.limits.max_seconds
        return most is not None and self.seconds >= most

    def train_epoch(self, phase: str, on_step: Callable[[int], None] | None = None) -> None:
        """Train the weights for one epoch, if the agent has a trainer; earlier scores then no longer apply.

        Args:
            phase: Name of the phase, for the records.
            on_step: As for `Trainer.run_epoch`.
        """
        trainer = self.agent.trainer
        if trainer is None:
            return
        started = time.perf_counter()
        stats = trainer.run_epoch(on_step)
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
                "training/regulariser": stats.regulariser,
                **({} if stats.accuracy is None else {"training/accuracy": stats.accuracy}),
            },
        )

    def train(self, phase: str, epochs: int, label: str) -> None:
        """Train for `epochs` in all, saving after each; fewer if the time limit is reached."""
        trainer = self.agent.trainer
        if trainer is None or self.place.steps.get(phase, 0) >= epochs:
            return
        steps = trainer.steps_per_epoch
        with progress.bar(label, total=epochs * steps) as bar:
            bar.advance(self.place.steps.get(phase, 0) * steps)
            for _ in self.remaining(phase, epochs):
                if self.late:
                    return
                self.train_epoch(phase, progress.Steps(bar))
                self.done(phase)

    def episode(self, policy: Policy, phase: str) -> Episode:
        """Go through all groups with `policy`, score the plan and log it."""
        transitions: list[Transition] = []
        observation, _ = self.env.reset()
        last = False
        while not last:
            action = np.array([policy(observation, self.env.legal)], dtype=np.float32)
            following, reward, last, _, info = self.env.step(action)
            clipped, requested = float(info["action"]), float(np.clip(action[0], 0.0, 1.0))
            transitions.append(Transition(observation, clipped, following, reward, last, requested))
            observation = following
        return Episode(tuple(transitions), self._record(info["score"], phase))

    def score(self, widths: Widths | Sequence[int], phase: str, floor: float | None = None) -> Candidate:
        """Score a plan of these widths (G,) and log it; stop early if it cannot earn `floor`."""
        return self._record(self.env.score(widths, reward_floor=floor), phase)

    def score_by(self, widths: Widths | Sequence[int], measure: Callable[[], float], phase: str) -> Candidate:
        """Score a candidate of these widths (G,) with the agent's function, and log it; see `PruningEnv.score_by`."""
        return self._record(self.env.score_by(widths, measure), phase)

    def choose(
        self,
        shortlist: Iterable[Sequence[int]],
        more: Iterable[Iterable[Sequence[int]]] = (),
        *,
        score_all: bool = True,
        plans: Mapping[tuple[int, ...], ChannelPlan] | None = None,
        measure: Callable[[ChannelPlan], float] | None = None,
        expected: Callable[[Widths], NDArray[np.float64]] | None = None,
    ) -> SearchResult:
        """Score the feasible plans of a shortlist on the current weights; the best is the result.

        The first feasible one is scored regardless of the limits, so that there is a result; without `score_all`, it
        is the result. In a later round the best result of the earlier ones follows the shortlist. Scoring stops early
        for a plan that cannot beat the best so far. Of all that were scored in this round and on these weights, the
        best few may then be finalists: the best of them as they would be delivered is the result.

        A plan that is contained in the earlier result at its present size is left out: both keep the most important
        channels, so that the smaller one scores higher on a few hundred images by chance only, and keeping it would
        leave a loosened budget unused.

        Args:
            shortlist: Widths (G,); no more are drawn once a limit is reached.
            more: Further shortlists, each started after all before it are scored.
            score_all: Whether to score more than the first.
            plans: Plans by widths, for those whose channels are not the most important ones.
            measure: Accuracy of a plan, if not the evaluator's; known plans are then scored again.
            expected: What plans (N, G) are expected to earn, on any scale, to order the finalists by; None orders them
                by what they have earned.

        Raises:
            CompressorError: None meets the budgets.
        """
        own = {**self._kept(), **(plans or {})}
        earlier = list(from_earlier_rounds(self))
        lists: Iterable[Iterable[Sequence[int]]] = itertools.chain(
            [itertools.chain(shortlist, (widths.tolist() for widths in earlier))], more
        )
        kept = [widths for widths in earlier if self.env.bounds.feasible(widths[None])[0]]
        wider = np.array(kept, dtype=np.int64).reshape(-1, len(self.env.bounds.dense))
        lists = (_not_contained(each, wider, own) for each in lists)
        scored = _score_shortlists(self, lists, score_all=score_all, plans=own, measure=measure)
        if not scored:
            raise CompressorError("No final candidate keeps the budgets.", "Loosen the budget a little.")
        best = max(scored, key=merit)
        if score_all and measure is None and not own:
            best = self._finalist(best, wider, expected)
        self.place.chosen = list(best.widths)
        chosen = own.get(tuple(self.place.chosen))
        self.place.kept = None if chosen is None else chosen.to_json()
        self.save()
        return self._result(self.place.chosen)

    def _finalist(
        self, best: Candidate, wider: Widths, expected: Callable[[Widths], NDArray[np.float64]] | None
    ) -> Candidate:
        """Return the best of the finalists as they would be delivered; the best candidate if there are none.

        No row of `wider` (N, G) contains a finalist. `expected` as for `choose`.
        """
        place = self.place
        now = [c for c in eligible(self) if (c.epoch, c.round) == (place.epoch, place.round) and not c.given_up]
        own = set(_not_contained([c.widths for c in now], wider, {}))
        now = sorted((c for c in now if c.widths in own), key=merit, reverse=True)
        if expected is not None and now:
            order = np.argsort(-expected(np.array([c.widths for c in now], dtype=np.int64)), kind="stable")
            now = [now[place] for place in order]
        judged = [] if self.late else finalists(self.env, self.evaluator, now, self.evaluations)
        place.finalists = [(list(each.widths), each.accuracy, each.reward) for each in judged]
        if not judged:
            return best
        first = max(judged, key=lambda each: (each.reward, sum(each.widths)))
        return self.score(first.widths, "final")

    def _kept(self) -> dict[tuple[int, ...], ChannelPlan]:
        """Return the last round's result by its widths, if its agent chose the channels as well."""
        if self.place.kept is None:
            return {}
        plan = ChannelPlan.from_json(self.place.kept)
        return {tuple(self.env.space.row(plan).tolist()): plan}

    def result(self) -> SearchResult | None:
        """Return the result if the search has ended, else None."""
        return None if self.place.chosen is None else self._result(self.place.chosen)

    def _result(self, widths: Sequence[int]) -> SearchResult:
        chosen = tuple(widths)
        best = next(candidate for candidate in reversed(self.candidates) if candidate.widths == chosen)
        total = self.seconds
        training, evaluation = self.place.training_seconds, self.env.evaluation_seconds
        self.curves.close()
        return SearchResult(
            best=self.env.plan(chosen) if self.place.kept is None else ChannelPlan.from_json(self.place.kept),
            widths=dict(zip(self.env.bounds.names, chosen, strict=True)),
            reward=best.reward,
            accuracy=best.accuracy,
            candidates=tuple(each for each in self.candidates if each.round >= self.place.first_round),
            evaluations=self.evaluations,
            seconds=total,
            training=tuple(self.place.training),
            learned={name: dict(numbers) for name, numbers in self.place.learned.items()},
            finalists=tuple(
                Finalist(tuple(widths), accuracy, reward) for widths, accuracy, reward in self.place.finalists
            ),
            timing={
                "evaluation": evaluation,
                "training": training,
                "agent": max(0.0, total - training - evaluation),
                "total": total,
            },
        )

    def save(self) -> None:
        """Write the checkpoint. The training state is a file of its own, written once after each epoch.

        The checkpoint names that file, and an older one is only removed once no checkpoint names it: a search that is
        killed at any moment finds both.
        """
        trainer, path = self.agent.trainer, self._checkpoint.path
        weights = path.with_name(f"{path.stem}-weights-{self.place.epoch}.pt")
        if trainer is not None and (self._weights is None or self._weights.path != weights):
            self._weights = Checkpoint(weights)
            self._weights.save(trainer.state())
        self.place.seconds, self._started = self.seconds, time.perf_counter()
        self._checkpoint.save(
            {
                "format": FORMAT,
                "agent": self.agent.name,
                "space": space_fingerprint(self.env),
                "budgets": budget_fingerprint(self.env, self.place.chosen),
                "episodes": len(self._log),
                "place": vars(self.place).copy(),
                "candidates": [candidate.to_plain() for candidate in self.candidates],
                "env": self.env.state(),
                "weights": None if self._weights is None else self._weights.path.name,
                "own": self.own(),
            }
        )
        for old in path.parent.glob(f"{path.stem}-weights-*.pt"):
            if self._weights is None or old != self._weights.path:
                old.unlink()

    def keep_function_values(self) -> None:
        """Add the values of function budgets since the last checkpoint to it, because each is a slow call."""
        functions = self.env.state()["functions"]
        if functions:
            with suppress(CompressorError):  # such as a full disk: it must not hide why the search ended
                state = self._checkpoint.load()
                if state is not None:
                    state["env"]["functions"] = functions
                    self._checkpoint.save(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.place = Place(**state["place"])
        self.candidates = [Candidate.from_plain(plain) for plain in state["candidates"]]
        if self.agent.trainer is not None:
            self._weights = Checkpoint(self._checkpoint.path.with_name(state["weights"]))
            weights = self._weights.load()
            if weights is None:
                raise CompressorError(
                    f"{self._weights.path}, the weights of the search, is missing.",
                    f"Delete {self._checkpoint.path} to search again.",
                )
            self.agent.trainer.restore(weights)
        self._forget()
        self.env.restore(state["env"])
        self.restored = state["own"] or None  # saved before the method began, as in the warm-up: nothing yet
        budgets = budget_fingerprint(self.env, self.place.chosen)
        if self.place.chosen is None:
            check_unfinished(state["budgets"], budgets, self._checkpoint.path)
        elif not alike(state["budgets"], budgets):
            self.place.results.append(self.place.chosen)
            self.place.chosen = None
            self.place.round += 1
            self.place.evaluations_before = self.env.evaluations

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


# ---------------------------------------------------------------- the best plans so far
def best_of_round(run: SearchSession) -> Candidate | None:
    """Return the best plan of this round of the search, on any weights."""
    return _highest(c for c in eligible(run) if c.round == run.place.round)


def best_on_weights(run: SearchSession) -> Candidate | None:
    """Return the best plan of this round that was scored on the current weights."""
    place = run.place
    return _highest(c for c in eligible(run) if (c.epoch, c.round) == (place.epoch, place.round))


def best_known(run: SearchSession, number: int) -> list[tuple[int, ...]]:
    """Return widths of the best plans of this round and of earlier results, those on the latest weights first."""
    latest = max((c.epoch for c in run.candidates), default=0)
    known = [c for c in eligible(run) if c.round == run.place.round or c.phase == "final"]
    known.sort(key=lambda c: (c.epoch == latest, *merit(c)), reverse=True)
    return list(dict.fromkeys(candidate.widths for candidate in known))[:number]


def from_earlier_rounds(run: SearchSession) -> Iterator[Widths]:
    """Yield, in a later round, widths (G,) of the last round's result and of the best of all rounds.

    Each is scaled to the current budgets, and also unchanged. In the first round there are none.
    """
    results = [c for c in eligible(run) if c.round < run.place.round and c.phase == "final"]
    latest = max((c.epoch for c in results), default=0)
    last = [c for c in results if c.round == run.place.round - 1 and list(c.widths) == run.place.results[-1]]
    for among in (last, results):
        best = _highest(c for c in among if c.epoch == latest)
        if best is not None:
            widths = np.array(best.widths, dtype=np.int64)
            yield fitted_widths(run.env, widths / run.env.bounds.dense)
            yield widths


def merit(candidate: Candidate) -> tuple[float, int]:
    """Return the key for comparing plans: the reward, then the kept channels, which are free within the budget."""
    return candidate.reward, sum(candidate.widths)


def eligible(run: SearchSession) -> list[Candidate]:
    """Return what a search may choose from: measurements of single groups only if they meet the budgets."""
    measured = [candidate.widths for candidate in run.candidates if candidate.phase == MEASUREMENT]
    if not measured:
        return list(run.candidates)
    kept = dict(zip(measured, run.env.bounds.feasible(np.array(measured, dtype=np.int64)), strict=True))
    return [c for c in run.candidates if c.phase != MEASUREMENT or kept[c.widths]]


def _highest(candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the candidate of the greatest merit, the first of equal ones; None if there is none."""
    return max(candidates, key=merit, default=None)


# ---------------------------------------------------------------- the final scoring
def _score_shortlists(
    run: SearchSession,
    shortlists: Iterable[Iterable[Sequence[int]]],
    *,
    score_all: bool,
    plans: Mapping[_Key, ChannelPlan],
    measure: Callable[[ChannelPlan], float] | None,
) -> list[Candidate]:
    """Score the feasible plans of one list after another until a limit is reached; the first one in any case.

    Scoring stops early for plans that cannot beat the best so far. Several workers score the following plans with the
    current floor; if it has risen when their turn comes, the plans that it affects are scored again. So the result does
    not depend on the number of workers. A list is started after the one before it has been scored.

    Args:
        run, shortlists, score_all, plans, measure: As for `SearchSession.choose`.
    """
    scored: list[Candidate] = []
    seen: set[_Key] = set()
    workers = run.env.workers if measure is None else 1
    for shortlist in shortlists:
        coming, waiting = _feasible(run, shortlist, seen), deque[_Key]()
        while not (scored and (not score_all or run.spent())):
            side_by_side = bool(scored) and workers > 1
            waiting.extend(islice(coming, (2 * workers if side_by_side else 1) - len(waiting)))
            if not waiting:
                break
            floor = max((candidate.reward for candidate in scored), default=None)
            if side_by_side:
                run.env.ahead([each for each in waiting if each not in plans], floor)
            widths = waiting.popleft()
            if widths not in plans and measure is None:
                scored.append(run.score(widths, "final", floor))
            else:
                judged = partial(measure or run.evaluator, plans.get(widths) or run.env.plan(widths))
                scored.append(run.score_by(widths, judged, "final"))
    return scored


def _feasible(run: SearchSession, plans: Iterable[Sequence[int]], seen: set[_Key]) -> Iterator[_Key]:
    """Yield the plans that meet the budgets and were not seen yet."""
    for each in plans:
        widths = tuple(int(width) for width in each)
        if widths not in seen and run.env.bounds.feasible(np.array(widths, dtype=np.int64))[0]:
            seen.add(widths)
            yield widths


def _not_contained(
    plans: Iterable[Sequence[int]], wider: Widths, own: Mapping[_Key, ChannelPlan]
) -> Iterator[Sequence[int]]:
    """Yield the plans that no row of `wider` (N, G) contains, and those with channels of their own (`own`)."""
    for each in plans:
        widths = np.asarray(each, dtype=np.int64)
        contained = (wider >= widths).all(axis=1) & (wider > widths).any(axis=1)
        if tuple(widths.tolist()) in own or not contained.any():
            yield each


class Curves:
    """Writes scalars for TensorBoard; without a folder it does nothing, and TensorBoard is not imported.

    Args:
        folder: Folder of the event files; None writes none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add one point of each curve at `step`."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
