"""What a budget is: its class, its registration by name, and its text, such as `5ms`, `50%`, `2G` or `20MB`.

The module imports neither numpy nor torch, so that an invalid budget is refused before anything slow starts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from compressor.core.errors import CompressorError
from compressor.core.plugins import Registry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self

    from compressor.core.manifest import How
    from compressor.latency.table import LatencyTable
    from compressor.pruning.space import PruningSpace

    Floats = npt.NDArray[np.float64]

_Class = TypeVar("_Class", bound="type[Budget]")

BUDGETS: Mapping[str, str] = {
    "latency": "compressor.budgets.costs",
    "macs": "compressor.budgets.costs",
    "params": "compressor.budgets.costs",
    "energy": "compressor.budgets.energy",
    "memory": "compressor.budgets.costs",
}
"""The toolkit's own budgets, each with a flag and a field of the recipe: name -> module."""

_registry: Registry[Budget] = Registry("budget", BUDGETS, "(?!flops$)[A-Za-z][A-Za-z0-9_-]*")
_ALIASES = {"flops": "macs"}
_NUMBER = re.compile(
    r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|[+-]?inf(?:inity)?)\s*(\S*)",
    re.IGNORECASE | re.ASCII,  # digits of other scripts can be misread
)
_LIMIT = re.compile(r"\s*([A-Za-z_][\w.]*:[A-Za-z_]\w*|[A-Za-z][\w-]*)\s*<=\s*(\S.*?)\s*")


@dataclass(frozen=True)
class BudgetSpec:
    """One requested budget, before the dense network's cost is known.

    Attributes:
        name: Name of a registered budget, or `package.module:function`.
        value: The limit in the budget's own unit (ms, MACs, parameters, bytes, mJ), or a share of the dense cost.
        relative: Whether `value` is a share (0.5 for `50%`).
        text: The user's text, for messages.
    """

    name: str
    value: float
    relative: bool
    text: str

    @property
    def is_function(self) -> bool:
        """Whether the cost is a user-defined Python function."""
        return ":" in self.name

    def limit(self, dense: float) -> float:
        """Return the limit in the budget's unit, given the dense network's cost."""
        return self.value * dense if self.relative else self.value

    def share(self, dense: float) -> float:
        """Return the limit as a share of the dense network's cost."""
        return self.value if self.relative else self.value / dense


class CachedValues(ABC):
    """Cached values that are expensive to evaluate, one for each network.

    Args:
        name: Name of the budget.

    Attributes:
        known: Values by widths. Each network is evaluated once, so that a noisy function has one value.
        calls: Number of evaluations.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: dict[tuple[int, ...], float] = {}
        self.calls = 0

    def value(self, widths: tuple[int, ...]) -> float:
        """Return the value for widths (G,), cached after the first call.

        Raises:
            CompressorError: There is no value.
        """
        if widths not in self.known:
            self.known[widths] = self.measure(widths)
        return self.known[widths]

    @abstractmethod
    def measure(self, widths: tuple[int, ...]) -> float:
        """Evaluate widths (G,) without the cache; `known` is not changed."""


@dataclass(frozen=True)
class CostSources:
    """What the costs of a space's networks are computed from.

    Attributes:
        space: Counts of the dense network and of every candidate.
        table: Latency table of the device; None without a latency budget.
        precision: Precision of the device.
        cached: Values of functions and of energy that are known already, by name of the budget.
    """

    space: PruningSpace
    table: LatencyTable | None = None
    precision: str = "fp32"
    cached: Mapping[str, CachedValues] = field(default_factory=dict)


class Budget(ABC):
    """A cost and its limit; subclasses are frozen dataclasses, so that `dataclasses.replace` can tighten one.

    Attributes:
        name: Name by which it is registered, or `package.module:function`.
        unit: Unit of `target`, `dense` and every prediction; empty if there is none.
        target: Largest allowed cost.
        dense: Cost of the dense network.
        how: How the cost of the finished network is found, for the report: "measured" on the device or by calling a
            function, "counted" in the built network, or "computed" by `predict`.
        units: Units of a limit's text, in which case is ignored -> their size in `unit`; the key "" allows a plain
            number.
        example: Texts of limits, for messages.
    """

    name: str
    unit: str
    target: float
    dense: float
    how: ClassVar[How] = "computed"
    units: ClassVar[Mapping[str, float]] = {"": 1.0}
    example: ClassVar[str] = "3.5 or 50%"

    @classmethod
    def create(cls, spec: BudgetSpec, sources: CostSources) -> Self:
        """Return the budget with an absolute limit; for classes with the fields `space`, `target` and `dense`.

        Raises:
            CompressorError: The cost is not available.
        """
        space: Any = sources.space
        unlimited: Any = cls(space=space, target=math.inf, dense=math.nan)  # type: ignore[call-arg]
        dense = float(unlimited.predict(space.dense_widths[None])[0])
        return dataclasses.replace(unlimited, target=spec.limit(dense), dense=dense)  # type: ignore[no-any-return]

    @abstractmethod
    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Return the cost of each candidate, (N,) from widths (N, G)."""

    @property
    def title(self) -> str:
        """What messages call the cost."""
        return self.name

    def kept(self, widths: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return whether each candidate is within the limit, (N,) from (N, G)."""
        return self.predict(widths) <= self.target

    @classmethod
    def format(cls, value: float) -> str:
        """Format a cost for display, such as `4.32 ms`."""
        return f"{value:.4g} {getattr(cls, 'unit', '')}".rstrip()

    def __str__(self) -> str:
        share = self.target / self.dense if self.dense else float("nan")
        return f"{self.title} <= {self.format(self.target)} ({share:.0%} of {self.format(self.dense)})"


def register_budget(kind: _Class) -> _Class:
    """Register a subclass of `Budget` under its `name`; a class decorator.

    A class that is defined anew in its own module (in a notebook, by a reload) replaces the older one.

    Raises:
        CompressorError: It is not a frozen dataclass derived from `Budget` with the fields `target` and `dense` and a
            method `predict`, its `name` is unusable, two of its `units` differ in case only, or another class has the
            name.
    """
    called = getattr(kind, "__qualname__", repr(kind))
    if not (isinstance(kind, type) and issubclass(kind, Budget) and dataclasses.is_dataclass(kind)):
        raise CompressorError(
            f"{called} is not a dataclass derived from Budget.",
            "Write @register_budget above @dataclass(frozen=True), and derive it from compressor.budgets.base.Budget.",
        )
    _require_complete(kind, called)
    _registry.add(kind, getattr(kind, "name", None))
    return kind


def _require_complete(kind: type[Budget], called: str) -> None:
    """Raise an error for a class whose budgets could not be created, tightened or read."""
    if not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise CompressorError(f"The budget {called} is not frozen.", "Write @dataclass(frozen=True) above the class.")
    fields = {each.name for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if missing := [name for name in ("target", "dense") if name not in fields]:
        raise CompressorError(
            f"The budget {called} has no field {' and no field '.join(map(repr, missing))}.",
            "Write `target: float` and `dense: float` in the class, for the limit and the dense network's cost.",
        )
    if kind.__abstractmethods__:
        raise CompressorError(
            f"The budget {called} has no method {' and no method '.join(map(repr, sorted(kind.__abstractmethods__)))}.",
            "Write `def predict(self, widths)`, which returns the costs (N,) of widths (N, G).",
        )
    if len({unit.lower() for unit in kind.units}) < len(kind.units):
        raise CompressorError(
            f"The `units` of the budget {called} differ in case only: {', '.join(map(repr, kind.units))}.",
            "Case is ignored in a limit's unit: remove one of the two.",
        )


def budget_class(name: str) -> type[Budget]:
    """Return the class of the budget called `name`.

    Raises:
        CompressorError: There is none; the message gives the known names.
    """
    name = _ALIASES.get(name, name)
    found = _registry.find(name)
    if found is None:
        known = ", ".join(["flops", *_registry.names()])
        raise CompressorError(
            f"{name!r} is not a budget.", f"Budgets are {known}, or package.module:function."
        )
    return found


def parse_budget(name: str, text: str | float) -> BudgetSpec:
    """Parse the limit of a registered budget.

    Args:
        name: `latency`, `flops` (counted as fvcore does: one multiply-add is one; the same as `macs`), `params`,
            `memory`, `energy`, or a name that another package registers.
        text: The limit with its unit, or a share of the dense network's cost.

    Raises:
        CompressorError: The name or the text is invalid; the message gives the accepted forms.

    >>> parse_budget("latency", "800us")
    BudgetSpec(name='latency', value=0.8, relative=False, text='800us')
    >>> parse_budget("flops", "50%").value
    0.5
    """
    kind = budget_class(name)
    flag = "flops" if kind.name == "macs" else kind.name
    value, relative = _read(str(text), kind.units, f"--{flag} {text}", f"Write {kind.example}.")
    return BudgetSpec(kind.name, value, relative, str(text).strip())


def parse_named_budget(text: str) -> BudgetSpec:
    """Parse `package.module:function<=VALUE`, or `NAME<=VALUE` for a budget that another package registers.

    The VALUE of a function is a plain number or a share (`50%`) of the dense value.

    Raises:
        CompressorError: The text has another form, or VALUE is invalid.
    """
    expected = "Write package.module:function<=VALUE, such as mycosts:energy<=3.5 or mycosts:energy<=50%."
    match = _LIMIT.fullmatch(text)
    if match is None or match[1] in (*BUDGETS, *_ALIASES):  # the toolkit's own budgets have flags
        raise CompressorError(f"--budget {text} is not understood.", expected)
    name, limit = match.groups()
    kind = Budget if ":" in name else budget_class(name)
    expected = expected if kind is Budget else f"Write {name}<=VALUE with a value such as {kind.example}."
    value, relative = _read(limit, kind.units, f"--budget {text}", expected)
    return BudgetSpec(name, value, relative, text.strip())


def _read(text: str, units: Mapping[str, float], given: str, expected: str) -> tuple[float, bool]:
    """Return the number in the budget's own unit, and whether it is a share of the dense cost."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise CompressorError(f"{given} is not understood.", expected)
    number, unit = float(match[1]), match[2].lower()
    units = {name.lower(): size for name, size in units.items()}
    if not math.isfinite(number):
        raise CompressorError(f"{given} is not a finite number.", expected)
    if unit not in (*units, "%", "x"):
        problem = "has no unit" if not unit else f"has the unit {match[2]!r}, which is not known here"
        raise CompressorError(f"{given} {problem}.", expected)
    if number <= 0:
        raise CompressorError(f"{given} is not above zero.", expected)
    if unit in units:
        return number * units[unit], False
    share = number / 100 if unit == "%" else number
    if share > 1:
        raise CompressorError(f"{given} asks for more than the dense network costs.", "Shares end at 100%.")
    return share, True
