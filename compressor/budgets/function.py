"""A budget on a number that a Python function returns for a network.

The function is called in a process of its own, where it may raise, hang or crash. Run as a program, this module is that
process: it answers the requests of its parent (`compressor.core.processes`).
"""

from __future__ import annotations

import inspect
import math
import numbers
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.budgets.base import Budget, BudgetSpec, CachedValues, CostSources
from compressor.core.errors import CompressorError
from compressor.core.plugins import import_object
from compressor.core.processes import Child, ChildDied, ChildLate, Failed, serve

if TYPE_CHECKING:
    import numpy.typing as npt

    from compressor.budgets.base import Floats
    from compressor.pruning.space import PruningSpace

Function = Callable[[Any], Any]

SECONDS = 60.0
"""Default time limit of a function for one network, in seconds."""

_STARTUP_SECONDS = 120.0
"""Additional seconds for the process to start and to trace the network."""

_SIGNATURE_HINT = (
    "It receives the slim network (a torch module in eval mode), or the plan if its argument is named `plan`, and "
    "must return one finite number, 0 or more."
)
_MAX_SHOWN = 60
"""Number of characters of a wrong return value that a message quotes."""

_FIX_HINT = "Fix it; a run that had started continues with: compress --resume RUN"


class FunctionCaller(CachedValues):
    """Calls a user-defined function on networks of a space, in a separate process that can be killed.

    Args:
        name: `package.module:function`.
        space: Builds the networks, with its weights at the first call.
        seconds: Time limit of one call.
        repeats: Calls per network, of which the median counts; for functions that measure.
    """

    def __init__(self, name: str, space: PruningSpace, seconds: float = SECONDS, repeats: int = 1) -> None:
        super().__init__(name)
        self.space, self.seconds, self.repeats = space, seconds, repeats
        self._child: Child | None = None

    def measure(self, widths: tuple[int, ...]) -> float:
        """Call the function for widths (G,) without the cache.

        Raises:
            CompressorError: The function does not exist, raised, took too long, or did not return a finite number of
                at least 0.
        """
        return statistics.median(self._call(widths) for _ in range(self.repeats))

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _call(self, widths: tuple[int, ...]) -> float:
        networks = f"the network of widths {list(widths)}"
        try:
            child = self._started()
            self.calls += 1
            reply = child.ask(self._request(widths), self.seconds)
        except Failed as failed:
            raise CompressorError(f"--budget {self.name} raised on {networks}: {failed}.", _FIX_HINT) from None
        except ChildLate:
            self._child = None
            raise CompressorError(
                f"--budget {self.name} did not return within {self.seconds:g} s on {networks}; it was stopped.",
                f"{_FIX_HINT}. A new run can allow more time: --set budgets.function_seconds=SECONDS",
            ) from None
        except ChildDied as died:
            self._child = None
            raise CompressorError(
                f"--budget {self.name} ended its process on {networks}: {died}.", _FIX_HINT
            ) from None
        if not isinstance(reply["value"], float):
            raise CompressorError(f"--budget {self.name} gave {reply['shown']} for {networks}.", _SIGNATURE_HINT)
        return reply["value"]

    def _request(self, widths: tuple[int, ...]) -> dict[str, Any]:
        """Return the widths of the groups and the names of the removed blocks of a row."""
        groups = len(self.space.groups)
        blocks = zip(self.space.blocks, widths[groups:], strict=True) if len(widths) > groups else ()
        return {"widths": list(widths[:groups]), "removed": [block.name for block, present in blocks if not present]}

    def _started(self) -> Child:
        if self._child is None:
            from safetensors.torch import save_file

            from compressor.pruning.artefact import cpu_tensors
            from compressor.pruning.blueprint import blueprint

            child = Child("compressor.budgets.function")
            try:
                with tempfile.TemporaryDirectory(prefix="compressor-function-") as folder:
                    path = str(Path(folder) / "weights.safetensors")
                    save_file(cpu_tensors(self.space.model), path)
                    groups = [group.name for group in self.space.groups]
                    begin = {"function": self.name, "network": blueprint(self.space), "groups": groups}
                    child.ask({**begin, "weights": path}, self.seconds + _STARTUP_SECONDS)
            except (ChildLate, ChildDied, Failed, CompressorError) as error:
                child.close()
                if isinstance(error, CompressorError):
                    raise
                what = f"its module did not load within {self.seconds + _STARTUP_SECONDS:g} s"
                raise CompressorError(
                    f"--budget {self.name} cannot be loaded: {what if isinstance(error, ChildLate) else error}.",
                    "The module is imported in a separate process.",
                ) from None
            self._child = child
        return self._child


@dataclass(frozen=True)
class FunctionBudget(Budget):
    """The value of `function(module)` or `function(plan)`, called once for each distinct candidate.

    The function may be slow, noisy, non-differentiable and non-monotone. Building a candidate takes another 10 ms or
    so. The function should depend on the network's shape and not on its weights: values are cached by widths.
    """

    caller: CachedValues = field(repr=False, compare=False)
    target: float
    dense: float
    name: str
    unit: str = ""
    how = "measured"

    @classmethod
    def create(cls, spec: BudgetSpec, sources: CostSources) -> FunctionBudget:
        """Return the budget; the function is called for the dense network unless its value is known.

        Raises:
            CompressorError: The function fails, or its value for the dense network is 0 and the limit a share of it.
        """
        caller = sources.cached.get(spec.name) or FunctionCaller(spec.name, sources.space)
        dense = caller.value(tuple(sources.space.dense_row.tolist()))
        target = spec.limit(dense)
        if target <= 0:
            raise CompressorError(
                f"--budget {spec.text}: the dense network's value is {dense:g}, so that a share of it is not a limit.",
                f"Write an absolute limit: {spec.name}<=VALUE.",
            )
        return cls(caller, target, dense, spec.name)

    @property
    def known(self) -> dict[tuple[int, ...], float]:
        """Values by widths."""
        return self.caller.known

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Return the function's values, (N,) from widths (N, G).

        Raises:
            CompressorError: The function raised, took too long, or did not return a finite number of at least 0.
        """
        rows = [tuple(int(width) for width in row) for row in np.atleast_2d(widths)]
        return np.asarray([self.caller.value(row) for row in rows], dtype=np.float64)


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
    import torch

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
        plan = self.space.plan(widths, importance=self.ranking, removed=request["removed"])
        return checked(self.function(plan if self.wants_plan else self.space.apply(plan).eval()))


def main() -> None:
    caller: list[_Caller] = []

    def answer(request: dict[str, Any]) -> Any:
        if not caller:
            caller.append(_Caller(request))
            return None
        return caller[0](request)

    serve(answer)


if __name__ == "__main__":
    main()
