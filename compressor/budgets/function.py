"""A budget on any number that a Python function gives for a network."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compressor.budgets.base import Budget, Floats
from compressor.errors import CompressorError

if TYPE_CHECKING:
    from torch import nn

    from compressor.pruning.space import PruningSpace

Cost = Callable[["nn.Module"], float]


@dataclass(frozen=True)
class FunctionBudget(Budget):
    """The value of `function(module)`, called once for each distinct candidate with the slim network, built.

    Building takes some 10 ms a candidate, so searches with such a budget are slower than with the others. The
    function should depend on the network's shape and not on its weights: values are remembered by widths.
    """

    space: PruningSpace
    function: Cost
    target: float
    dense: float
    name: str
    unit: str = ""
    known: dict[tuple[int, ...], float] = field(default_factory=dict, compare=False, repr=False)

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """The function's values.

        Raises:
            CompressorError: the function raised, or gave no finite number.
        """
        rows = [tuple(int(width) for width in row) for row in np.atleast_2d(widths)]
        for row in rows:
            if row not in self.known:
                module = self.space.apply(self.space.plan(row))
                self.known[row] = evaluate(self.name, self.function, module)
        return np.asarray([self.known[row] for row in rows], dtype=np.float64)


def load_function(name: str) -> Cost:
    """Import `package.module:function`.

    Raises:
        CompressorError: the module cannot be imported or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    hint = (
        "It is imported from the current folder or an installed package; check the spelling and PYTHONPATH."
    )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise CompressorError(
            f"--budget {name}: the module {module_name} cannot be imported: {error}.", hint
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise CompressorError(f"--budget {name}: {module_name} has no function {attribute!r}.", hint)
    return function  # type: ignore[no-any-return]


def evaluate(name: str, function: Cost, module: nn.Module) -> float:
    """Call the function on a network.

    Raises:
        CompressorError: it raised, or gave no finite number.
    """
    try:
        value = float(function(module))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CompressorError(
            f"--budget {name} failed on a network: {type(error).__name__}: {error}.",
            "The function gets one torch module and returns one number.",
        ) from error
    if not math.isfinite(value):
        raise CompressorError(f"--budget {name} gave {value}, a finite number was expected.")
    return value
