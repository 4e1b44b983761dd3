"""What every agent is: something that decides widths within limits and can be stopped and resumed."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compressor.core.errors import CompressorError
from compressor.search.candidate import Limits, SearchResult
from compressor.search.schedule import Schedule
from compressor.search.session import SearchSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from compressor.core.records import Checkpoint, EpisodeLog
    from compressor.pruning.plan import ChannelPlan
    from compressor.search.environment import PruningEnv
    from compressor.search.evaluate import Evaluator
    from compressor.training.loop import Trainer


IDLE = "idle: "
"""How the effect of a part that did not act begins; the reason follows."""


@dataclass(frozen=True)
class Published:
    """One part of a method, as its publication has it.

    Attributes:
        part: what it is, in words.
        setting: a field of the agent's settings, or a dotted one of the recipe ("search.align"); "" where nothing can
            be set.
        value: what the publication has; where that is a range, its lower end.
        most: the range's upper end; None where it is none.
        mentioned: whether the publication speaks of it; else `value` is how the method works without it.
        why: why this toolkit's default is another.
        here: what is done instead, where nothing can be set.
        default: this toolkit's default, for fields that are filled in by others; None for the field's own.
        named: whether the page names it also where it is as published.
    """

    part: str
    setting: str
    value: Any
    most: Any = None
    mentioned: bool = True
    why: str = ""
    here: str = ""
    default: Any = None
    named: bool = False

    def agrees(self, value: Any) -> bool:
        """Whether a value is the published one."""
        if self.most is not None:
            return bool(self.value <= value <= self.most)
        return bool(value == self.value)


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
        run = SearchSession(self, env, evaluator, limits, log, checkpoint)
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
    def _search(self, run: SearchSession) -> SearchResult:
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
