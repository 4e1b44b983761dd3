"""Base class of the agents, which choose widths within limits and can be stopped and resumed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field

from compressor.core.agents import agent_class, registry
from compressor.core.errors import CompressorError
from compressor.recipe.parts import AgentSettings
from compressor.search.records import Limits, SearchResult
from compressor.search.schedule import Schedule
from compressor.search.session import SearchSession

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from compressor.budgets.base import Budget
    from compressor.core.records import Checkpoint, EpisodeLog
    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.space import PruningSpace
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
        here: What this toolkit does, if there is no setting.
        default: This toolkit's default, for fields that others fill in; None for the field's own.
        named: Whether the report also lists it if it is as published.
    """

    part: str
    setting: str
    value: Any
    most: Any = None
    mentioned: bool = True
    why: str = ""
    here: Any = ""
    default: Any = None
    named: bool = False

    def agrees(self, value: Any) -> bool:
        """Return whether a value is the published one."""
        if self.most is not None:
            return bool(self.value <= value <= self.most)
        return bool(value == self.value)


class LearningSettings(AgentSettings):
    """Settings that the learning agents share."""

    hidden: int = Field(300, ge=1, description="Width of the two hidden layers of each network.")
    batch: int = Field(64, ge=1, description="Transitions in an update.")
    gamma: float = Field(1.0, ge=0, le=1, description="Discount; 1 suits a reward that comes once, at the end.")
    near_share: float = Field(
        0.75, ge=0, le=1, description="Share of the plans that vary the best one instead of following the policy."
    )
    near_spread: float = Field(0.3, gt=0, description="Their distance: the deviation of the logarithm of ratios.")
    proposals: int = Field(
        256,
        ge=1,
        description="Plans drawn for each of these: a model of the reward, learned from all scored plans, picks "
        "it. 1 picks at random.",
    )


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
    Settings: ClassVar[type[AgentSettings]]

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
        self.settings: Any = self.Settings(**(settings or {}))
        self.alignment = alignment
        self.context_size = context_size if self.trains_jointly else 0
        self.curves = curves

    def check(self, space: PruningSpace, budgets: Sequence[Budget]) -> None:  # noqa: B027 (most agents take all)
        """Refuse a space that this agent does not take, and budgets that none of its plans meets, before the search.

        Raises:
            CompressorError: Says how to go on.
        """

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
            run.train("warmup", self.schedule.warmup, "Training before the search")
            return self._search(run)
        except BaseException:
            run.keep_function_values()
            raise

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


_Class = TypeVar("_Class", bound=type[Agent])


def register_agent(kind: _Class) -> _Class:
    """Register a subclass of `Agent` under its `name`; a class decorator.

    A class that is defined anew in its own module (in a notebook, by a reload) replaces the earlier one.

    Raises:
        CompressorError: It is no subclass of `Agent`, its `name` or `Settings` is missing or unusable, or another class
            has the name.
    """
    shown = getattr(kind, "__qualname__", repr(kind))
    if not (isinstance(kind, type) and issubclass(kind, Agent)):
        raise CompressorError(f"{shown} is no subclass of Agent.", "Derive it from compressor.search.base.Agent.")
    settings = getattr(kind, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, AgentSettings)):
        raise CompressorError(
            f"The agent {shown} has no settings.",
            "Give the class an attribute `Settings`: a subclass of compressor.recipe.AgentSettings, or `NoSettings`.",
        )
    if missing := [field for field, info in settings.model_fields.items() if info.is_required()]:
        raise CompressorError(
            f"The setting {missing[0]} of the agent {shown} has no default.", "Give every field of `Settings` one."
        )
    registry.add(kind, getattr(kind, "name", None))
    return kind


def create_agent(name: str, **options: Any) -> Agent:
    """Return the agent of this name, with the arguments of `Agent`.

    Raises:
        CompressorError: There is no such agent, or a setting is unknown or invalid.
    """
    agent: Agent = agent_class(name)(**options)
    return agent
