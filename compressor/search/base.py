"""Base class of the agents, which choose widths within limits and can be stopped and resumed."""

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
"""Prefix of the effect of a part that did not act; the reason follows."""


@dataclass(frozen=True)
class Published:
    """One part of a method, as published.

    Attributes:
        part: Description of the part.
        setting: Field of the agent's settings, or dotted field of the recipe ("search.align"); "" if there is none.
        value: Published value; for a range, its lower end.
        most: Upper end of a range; None otherwise.
        mentioned: Whether the publication mentions it; otherwise `value` is how the method works without it.
        why: Reason for a different default in this toolkit.
        here: What this toolkit does instead, if there is no setting.
        default: This toolkit's default, for fields that others fill in; None for the field's own.
        named: Whether the report also lists it if it is as published.
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
        """Return whether a value is the published one."""
        if self.most is not None:
            return bool(self.value <= value <= self.most)
        return bool(value == self.value)


class Agent(ABC):
    """Chooses the widths of a network.

    Args:
        seed: Seed of all random numbers.
        trainer: Trains the space's weights, for agents that train; None leaves them unchanged.
        schedule: Numbers of epochs in each phase. Agents that do not train jointly train all of them first.
        settings: Values for the fields of the agent's `Settings`, by name.
        alignment: Builds the regularizer that pulls the weights towards a plan (`training.losses.Alignment`
            with the space and its form and strength filled in); None trains without. Only the joint agent
            uses it.
        context_size: Size of the environment model's state; 0 for none. Only the joint agent has one.
        curves: Folder for TensorBoard curves; None writes none.

    Attributes:
        context_size: Number of context values that this agent needs in the environment's observations; 0 if the
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
        """Search, or continue from `checkpoint`, and return the best plan that meets the budgets of `env`.

        If the checkpoint is of a finished search and the budgets of the environment have changed (tightened after a
        measurement), the search continues from its experience with few evaluations.

        Raises:
            CompressorError: The checkpoint is of another agent, space or version.
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
        """Number of training epochs before the first candidate."""
        return self.schedule.warmup

    def idle(self) -> dict[str, str]:
        """Return the enabled parts of the method that cannot act in this search: name -> reason."""
        return {}

    def unread_settings(self) -> dict[str, str]:
        """Return the settings without effect in combination with the others: name -> reason."""
        return {}

    def effects(self, result: SearchResult) -> dict[str, str]:
        """Return what the parts of the method have done in a search: name -> clause.

        If a part has not acted, the clause begins with `IDLE`.
        """
        return {}

    @abstractmethod
    def _search(self, run: SearchSession) -> SearchResult:
        """Run the method: act through `run`, and end with `run.choose`.

        `run.place.round` is above 0 if a finished search continues with other budgets.
        """


@dataclass(frozen=True)
class NoSettings:
    """Settings of agents without any."""


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
    """Raise an error for a field with a value of the wrong type; an integer is accepted for any number.

    Args:
        settings: Dataclass whose fields all have defaults.
    """
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", tuple: "a list"}
    for field in dataclasses.fields(settings):
        value, default = getattr(settings, field.name), field.default
        if type(value) not in ((int, float) if isinstance(default, float) else (type(default),)):
            raise CompressorError(
                f"The setting {field.name} is {value!r}, expected {kinds[type(default)]}, such as {default!r}."
            )
