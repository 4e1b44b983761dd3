"""The child process in which a budget's function is called, where it may raise, hang or crash.

Run as a program it answers the requests of its parent process (`compressor.core.processes`).
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compressor.core.errors import CompressorError
from compressor.core.plugins import import_object

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

Function = Callable[[Any], Any]

_MAX_SHOWN = 60
"""Number of characters of a wrong return value that a message quotes."""


def load_function(name: str) -> Function:
    """Import `package.module:function`.

    Raises:
        CompressorError: The module cannot be imported, has no such function (the message gives the nearest names), or
            the function cannot be called with one argument.
    """
    function = import_object(name, f"--budget {name}")
    if not callable(function):
        raise CompressorError(
            f"--budget {name}: expected a function, got {type(function).__name__}, which cannot be called."
        )
    try:
        inspect.signature(function).bind(None)
    except ValueError:  # a builtin without a signature
        pass
    except TypeError as error:
        raise CompressorError(
            f"--budget {name}: it cannot be called with one argument: {error}.",
            "It receives the slim network, or the plan if its argument is named `plan`.",
        ) from error
    return function  # type: ignore[no-any-return]


def wants_plan(function: Function) -> bool:
    """Whether the function takes the plan: its first argument is named `plan`, or annotated as a ChannelPlan."""
    try:
        first = next(iter(inspect.signature(function).parameters.values()), None)
    except (TypeError, ValueError):
        return False
    if first is None:
        return False
    annotation = first.annotation
    kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return first.name == "plan" or kind.rpartition(".")[2] == "ChannelPlan"


def checked(value: Any) -> dict[str, Any]:
    """Return a function's value as a float, or None with a description of the invalid value."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor) and math.prod(value.shape) == 1:
        value = value.item()
    try:
        shown = repr(value)
    except Exception:  # an error of its __repr__, or an integer with more digits than Python prints
        shown = "a value that cannot be displayed"
    shown = shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + "..."
    if value is None or isinstance(value, bool) or not isinstance(value, numbers.Real):
        return {"value": None, "shown": f"{shown} ({type(value).__name__}), no number,"}
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of floats
        number = math.inf
    if not math.isfinite(number):
        return {"value": None, "shown": f"{shown}, which is not finite,"}
    if number < 0:
        return {"value": None, "shown": f"{shown}, which is negative,"}
    return {"value": number, "shown": shown}


class _Caller:
    def __init__(self, request: dict[str, Any]) -> None:
        from compressor.pruning.blueprint import read_tensors, rebuild, reweigh

        tensors = read_tensors(request["weights"])
        self.function = load_function(request["function"])
        self.wants_plan = wants_plan(self.function)
        self.space: PruningSpace = rebuild(request["network"], tensors)
        reweigh(self.space, tensors, False)
        self.groups: list[str] = request["groups"]
        self.ranking = self.space.rank("l1")

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        widths = dict(zip(self.groups, request["widths"], strict=True))
        plan = self.space.plan(widths, importance=self.ranking)
        return checked(self.function(plan if self.wants_plan else self.space.apply(plan).eval()))


def main() -> None:
    from compressor.core.processes import serve

    caller: list[_Caller] = []

    def answer(request: dict[str, Any]) -> Any:
        if not caller:
            caller.append(_Caller(request))
            return None
        return caller[0](request)

    serve(answer)


if __name__ == "__main__":
    main()
