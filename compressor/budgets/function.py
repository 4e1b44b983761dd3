"""A budget on a number that a Python function returns for a network."""

from __future__ import annotations

import statistics
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compressor.budgets.base import Budget, Floats
from compressor.core.errors import CompressorError
from compressor.core.processes import Child, ChildDied, ChildLate, Failed

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

SECONDS = 60.0
"""Default time limit of a function for one network, in seconds."""

_STARTUP_SECONDS = 120.0
"""Additional seconds for the process to start and to trace the network."""

_SIGNATURE_HINT = (
    "It receives the slim network (a torch module in eval mode), or the plan if its argument is named `plan`, and "
    "must return one finite number, 0 or more."
)
_FIX_HINT = "Fix it; a run that had started continues with: compress --resume RUN"


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
            reply = child.ask({"widths": list(widths)}, self.seconds)
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

    def _started(self) -> Child:
        if self._child is None:
            from safetensors.torch import save_file

            from compressor.pruning.artefact import cpu_tensors
            from compressor.pruning.blueprint import blueprint

            child = Child("compressor.budgets.function_child")
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
