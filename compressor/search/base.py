"""What every agent is: something that decides widths within limits and can be stopped and resumed."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compressor.core.errors import CompressorError
from compressor.search.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from compressor.core.records import Checkpoint, EpisodeLog
    from compressor.pruning.plan import ChannelPlan
    from compressor.search.environment import PruningEnv
    from compressor.search.evaluate import Evaluator
    from compressor.search.published import Published
    from compressor.search.search_run import SearchRun
    from compressor.training.loop import Trainer


IDLE = "idle: "
"""How the effect of a part that did not act begins; the reason follows."""


@dataclass(frozen=True)
class Limits:
    """What a search may cost.

    Attributes:
        max_evaluations: the most candidates scored in each round (the search, and each time that it goes on with
            budgets that have changed), those of the final choice included; None is no limit.
        use_all: use all of `max_evaluations`, as comparisons at equal cost need; otherwise the agent's settings say
            how many it takes, and the limit only cuts them short.
        max_seconds: wall time of all rounds, time before a resume included; None is no limit. After it no candidate
            and no epoch of training is begun, but for the one candidate that a round without any needs for its result;
            what is begun is ended. A run that it cuts short cannot be repeated to the letter.
    """

    max_evaluations: int | None = None
    max_seconds: float | None = None
    use_all: bool = False

    def __post_init__(self) -> None:
        if self.max_evaluations is not None and self.max_evaluations < 1:
            raise CompressorError(f"The limit of evaluations is {self.max_evaluations}, expected 1 or more.")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise CompressorError(
                f"The time limit of the search is {self.max_seconds} s, expected more than 0."
            )

    def planned(self, usual: int) -> int:
        """Evaluations that a search is to plan for: `usual`, as far as there are as many; or all that there are."""
        if self.max_evaluations is None:
            return usual
        return self.max_evaluations if self.use_all else min(self.max_evaluations, usual)


@dataclass(frozen=True)
class Candidate:
    """A plan that was scored.

    Attributes:
        widths: channels that each group keeps, in the space's order.
        accuracy: on the search split, 0..1, with the weights of `epoch`.
        reward: what the agent maximised.
        costs: predicted cost of each budget by name.
        phase: what the agent was doing.
        epoch: epochs that the weights had been trained for in the search.
        round: 0, or how often the budgets had been tightened; each candidate keeps those of its round.
        given_up: whether the evaluation was broken off, because the best could not be reached any more; `accuracy`
            and `reward` are those of the images seen until then.
    """

    widths: tuple[int, ...]
    accuracy: float
    reward: float
    costs: Mapping[str, float]
    phase: str
    epoch: int
    round: int = 0
    given_up: bool = False

    def to_plain(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "widths": list(self.widths), "costs": dict(self.costs)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Candidate:
        return cls(**{**plain, "widths": tuple(int(width) for width in plain["widths"])})


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the chosen plan, by the weights at the end.
        widths: channels that it keeps, by group name.
        reward, accuracy: of the chosen plan, on the search split with the weights at the end.
        candidates: all plans that were scored and the measurements of single groups, in their order. What else was
            scored to learn from it, the dense network and partial plans, counts as evaluations only.
        evaluations: candidates scored that were not known already.
        seconds: wall time of the search, time before resumes included.
        timing: seconds by "evaluation", "training", "agent" (everything else) and "total".
        training: phase, epoch, loss, accuracy, regulariser and seconds of each epoch of training.
        learned: by part of the method, numbers that say what it has learned, where it learns apart from the policy.
    """

    best: ChannelPlan
    widths: Mapping[str, int]
    reward: float
    accuracy: float
    candidates: tuple[Candidate, ...]
    evaluations: int
    seconds: float
    timing: Mapping[str, float]
    training: tuple[Mapping[str, Any], ...] = ()
    learned: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def front(self, cost: str) -> tuple[Candidate, ...]:
        """The candidates that no other one beats in both accuracy and the named cost, from cheap to dear.

        Only those compared alike: on the latest weights and on all images. Dearer ones than the budget allows, which
        show what more would bring, are among them.
        """
        latest = max((each.epoch for each in self.candidates), default=0)
        alike = [each for each in self.candidates if each.epoch == latest and not each.given_up]
        front: list[Candidate] = []
        for candidate in sorted(alike, key=lambda c: (c.costs[cost], -c.accuracy)):
            if not front or candidate.accuracy > front[-1].accuracy:
                front.append(candidate)
        return tuple(front)


class Agent(ABC):
    """Decides the widths of a network.

    Args:
        seed: everything random comes from it.
        trainer: trains the weights that the space refers to, for agents that are to do so; None leaves them
            as they are.
        schedule: how many epochs to train, and when. Agents that do not train jointly train all of them
            first.
        settings: values for the fields of the agent's `Settings`, by name.
        alignment: builds the regulariser that pulls the weights towards a plan (`training.align.Alignment`
            with the space and its form and strength filled in); None trains without. Only the joint agent
            uses it.
        context_size: numbers of the environment model's state; 0 for none. Only the joint agent has one.
        curves: folder for TensorBoard curves; None writes none.

    Attributes:
        context_size: numbers that the environment's observations must have room for, for this agent; 0 where the
            environment model would have nothing to learn from.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    published: ClassVar[tuple[Published, ...]] = ()
    trains_jointly: ClassVar[bool] = False
    Settings: ClassVar[type[Any]]

    def __init__(
        self,
        *,
        seed: int = 0,
        trainer: Trainer | None = None,
        schedule: Schedule | None = None,
        settings: Mapping[str, Any] | None = None,
        alignment: Callable[[ChannelPlan], Callable[[nn.Module], Tensor]] | None = None,
        context_size: int = 0,
        curves: Path | None = None,
    ) -> None:
        self.seed = seed
        self.trainer = trainer
        schedule = schedule or Schedule()
        self.schedule = schedule if self.trains_jointly else schedule.all_before()
        self.settings = _settings(self.name, self.Settings, settings or {})
        self.alignment = alignment
        self.context_size = context_size if self.trains_jointly else 0
        self.curves = curves

    def search(
        self,
        env: PruningEnv,
        evaluator: Evaluator,
        limits: Limits,
        *,
        log: EpisodeLog,
        checkpoint: Checkpoint,
    ) -> SearchResult:
        """Search, or go on from `checkpoint`, and return the best plan that keeps the budgets of `env`.

        Called again with the checkpoint of a finished search and an environment whose budgets are others
        (tightened after a measurement), it searches on from its experience at the cost of few evaluations.

        Raises:
            CompressorError: the checkpoint is of another agent, space or version.
        """
        from compressor.search.search_run import SearchRun

        run = SearchRun(self, env, evaluator, limits, log, checkpoint)
        if (result := run.result()) is not None:
            return result
        try:
            run.train("warmup", self.epochs_before, "Training before the search")
            return self._search(run)
        except BaseException:
            run.keep_function_values()
            raise

    @property
    def epochs_before(self) -> int:
        """Epochs of training before the first candidate."""
        return self.schedule.warmup

    def idle(self) -> dict[str, str]:
        """By their names, the parts of the method that are on and cannot act in this search, with the reason."""
        return {}

    def unread_settings(self) -> dict[str, str]:
        """By their names, the settings that have no effect beside the others as they are, with the reason."""
        return {}

    def effects(self, result: SearchResult) -> dict[str, str]:
        """By their names, what the parts of the method have done in a search, in a clause each.

        Where a part has not acted, the clause begins with `IDLE`.
        """
        return {}

    @abstractmethod
    def _search(self, run: SearchRun) -> SearchResult:
        """The method: act through `run`, and end with `run.choose`.

        `run.place.round` is above 0 where a finished search goes on with other budgets.
        """


@dataclass(frozen=True)
class NoSettings:
    """For agents that have nothing to set."""


def _settings(agent: str, kind: type[Any], values: Mapping[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        names = ", ".join(sorted(known)) or "none"
        raise CompressorError(
            f"The agent {agent} has no setting {unknown[0]!r}.", f"Its settings are: {names}."
        )
    settings = kind(**values)
    check_kinds(settings)
    return settings


def check_kinds(settings: Any) -> None:
    """Refuse a word where a number is meant, and the like; whole numbers will do for any number.

    Args:
        settings: a dataclass whose fields all have defaults.
    """
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", tuple: "a list"}
    for field in dataclasses.fields(settings):
        value, default = getattr(settings, field.name), field.default
        if type(value) not in ((int, float) if isinstance(default, float) else (type(default),)):
            raise CompressorError(
                f"The setting {field.name} is {value!r}, expected {kinds[type(default)]}, such as {default!r}."
            )
