"""Parses budgets from the command line and from recipes: `5ms`, `50%`, `0.5x`, `2G`, `8M`, `20MB`.

Only the text is parsed here; `compressor.budgets.resolve` relates shares to the dense network. The module imports
neither numpy nor torch, so that an invalid budget is refused before anything slow starts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from compressor.core.errors import CompressorError

_COUNT_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_UNITS: dict[str, dict[str, float]] = {
    "latency": {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3},
    "macs": _COUNT_UNITS,
    "params": _COUNT_UNITS,
    "energy": {"uj": 1e-3, "µj": 1e-3, "mj": 1.0, "j": 1e3},
    "memory": {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30},
}
_EXAMPLES = {
    "latency": "5ms, 800us, 50% or 0.5x",
    "macs": "2G, 300M, 50% or 0.5x",
    "params": "8M, 500K, 30% or 0.3x",
    "memory": "20MB, 512KB, 16MiB, 50% or 0.5x",
    "energy": "5mJ, 0.02J, 50% or 0.5x",
}
_ALIASES = {"flops": "macs"}
_NUMBER = re.compile(
    r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|[+-]?inf(?:inity)?)\s*(\S*)",
    re.IGNORECASE | re.ASCII,  # digits of other scripts can be misread
)
_FUNCTION = re.compile(r"\s*([A-Za-z_][\w.]*):([A-Za-z_]\w*)\s*<=\s*(\S.*?)\s*")


@dataclass(frozen=True)
class BudgetSpec:
    """One requested budget, before the dense network's cost is known.

    Attributes:
        name: `latency`, `macs`, `params`, `memory`, `energy`, or `package.module:function`.
        value: The limit in the budget's base unit (ms, MACs, parameters, bytes, mJ), or a share of the dense cost.
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


def parse_budget(name: str, text: str | float) -> BudgetSpec:
    """Parse one budget.

    Args:
        name: `latency`, `flops` (counted as fvcore does: one multiply-add is one; the same as `macs`), `params`,
            `memory` or `energy`.
        text: The limit with its unit, or a share of the dense network's cost.

    Raises:
        CompressorError: The name or the text is invalid; the message gives the accepted forms.

    >>> parse_budget("latency", "800us")
    BudgetSpec(name='latency', value=0.8, relative=False, text='800us')
    >>> parse_budget("flops", "50%").value
    0.5
    """
    name = _ALIASES.get(name, name)
    if name not in _UNITS:
        known = ", ".join(["flops", *_UNITS])
        raise CompressorError(
            f"{name!r} is not a budget.", f"Budgets are {known}, or package.module:function."
        )
    value, relative = _read(str(text), _UNITS[name], f"--{_flag(name)} {text}", f"Write {_EXAMPLES[name]}.")
    return BudgetSpec(name, value, relative, str(text).strip())


def parse_function_budget(text: str) -> BudgetSpec:
    """Parse `package.module:function<=VALUE`; VALUE is a plain number or a share (`50%`) of the dense value.

    Raises:
        CompressorError: The text has another form, or VALUE is not a positive number.
    """
    expected = "Write package.module:function<=VALUE, such as mycosts:energy<=3.5 or mycosts:energy<=50%."
    match = _FUNCTION.fullmatch(text)
    if match is None:
        raise CompressorError(f"--budget {text} is not understood.", expected)
    module, function, limit = match.groups()
    value, relative = _read(limit, {"": 1.0}, f"--budget {text}", expected)
    return BudgetSpec(f"{module}:{function}", value, relative, text.strip())


def format_value(name: str, value: float) -> str:
    """Format a value in the budget's base unit for display: `4.32 ms`, `1.3 GMACs`, `23.5 M`, `20 MB`."""
    if name == "latency":
        return f"{value:.3g} ms" if value < 1e3 else f"{value / 1e3:.3g} s"
    if name == "energy":
        return f"{value:.3g} mJ" if value < 1e3 else f"{value / 1e3:.3g} J"
    if name not in _UNITS:
        return f"{value:.4g}"
    suffix = {"macs": "MACs", "params": "", "memory": "B"}[name]
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {letter}{suffix}".rstrip()
    return f"{value:.0f} {suffix}".rstrip()


def _flag(name: str) -> str:
    return "flops" if name == "macs" else name


def _read(text: str, units: dict[str, float], given: str, expected: str) -> tuple[float, bool]:
    """Return the number in the base unit, and whether it is a share of the dense cost."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise CompressorError(f"{given} is not understood.", expected)
    number, unit = float(match[1]), match[2].lower()
    if not math.isfinite(number):
        raise CompressorError(f"{given} is not a finite number.", expected)
    for ending in ("macs", "flops", "params"):
        if "k" in units and unit.endswith(ending):
            unit = unit[: -len(ending)]
            units = units if unit else {"": 1.0}
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
