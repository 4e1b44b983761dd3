"""A budget on any number that a Python function gives for a network."""

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
from compressor.core.child import Child, ChildDied, ChildLate, Failed
from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

SECONDS = 60.0
"""How long a function may take for one network unless the recipe says otherwise."""

_STARTING = 120.0
"""Seconds that are added for the process to start and to trace the network."""

_EXPECTED = (
    "It is given the slim network (a torch module in eval mode), or the plan where its argument is called `plan`, and "
    "must return one finite number, 0 or more."
)
_RESUME = "Mend it; a run that had begun goes on with: compress --resume RUN"


class Prices(ABC):
    """Values that cost time to ask for, one for each network.

    Args:
        name: of the budget.

    Attributes:
        known: values by widths. Each network is asked for once, so that a noisy one gives one answer.
        calls: how often was asked.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: dict[tuple[int, ...], float] = {}
        self.calls = 0

    def value(self, widths: tuple[int, ...]) -> float:
        """The value for widths (G,), remembered.

        Raises:
            CompressorError: there is none.
        """
        if widths not in self.known:
            self.known[widths] = self.measure(widths)
        return self.known[widths]

    @abstractmethod
    def measure(self, widths: tuple[int, ...]) -> float:
        """The value for widths (G,), asked for anew; `known` keeps what it has."""


class FunctionCaller(Prices):
    """Calls a function of the user's on networks of a space, in a process of its own that can be ended.

    Args:
        name: `package.module:function`.
        space: builds the networks, with the weights that it has at the first call.
        seconds: how long one call may take.
        repeats: calls for each network, of which the median counts; for functions that measure.
    """

    def __init__(self, name: str, space: PruningSpace, seconds: float = SECONDS, repeats: int = 1) -> None:
        super().__init__(name)
        self.space, self.seconds, self.repeats = space, seconds, repeats
        self._child: Child | None = None

    def measure(self, widths: tuple[int, ...]) -> float:
        """The function's value for widths (G,), asked for anew.

        Raises:
            CompressorError: the function is not there, raised, took too long, or gave no finite number from 0 on.
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
            raise CompressorError(f"--budget {self.name} raised on {networks}: {failed}.", _RESUME) from None
        except ChildLate:
            self._child = None
            raise CompressorError(
                f"--budget {self.name} did not return within {self.seconds:g} s on {networks}; it was stopped.",
                f"{_RESUME}. A new run may give it longer: --set budgets.function_seconds=SECONDS",
            ) from None
        except ChildDied as died:
            self._child = None
            raise CompressorError(
                f"--budget {self.name} ended its process on {networks}: {died}.", _RESUME
            ) from None
        if not isinstance(reply["value"], float):
            raise CompressorError(f"--budget {self.name} gave {reply['shown']} for {networks}.", _EXPECTED)
        return reply["value"]

    def _started(self) -> Child:
        if self._child is None:
            from safetensors.torch import save_file

            from compressor.pruning.blueprint import blueprint, weights

            child = Child("compressor.budgets.function_child")
            try:
                with tempfile.TemporaryDirectory(prefix="compressor-function-") as folder:
                    path = str(Path(folder) / "weights.safetensors")
                    save_file(weights(self.space.model), path)
                    groups = [group.name for group in self.space.groups]
                    begin = {"function": self.name, "network": blueprint(self.space), "groups": groups}
                    child.ask({**begin, "weights": path}, self.seconds + _STARTING)
            except (ChildLate, ChildDied, Failed, CompressorError) as error:
                child.close()
                if isinstance(error, CompressorError):
                    raise
                what = f"its module did not load within {self.seconds + _STARTING:g} s"
                raise CompressorError(
                    f"--budget {self.name} cannot be loaded: {what if isinstance(error, ChildLate) else error}.",
                    "The module is imported in a process of its own.",
                ) from None
            self._child = child
        return self._child


@dataclass(frozen=True)
class FunctionBudget(Budget):
    """The value of `function(module)` or `function(plan)`, called once for each distinct candidate.

    It is only ever evaluated: it may be slow, noisy, not differentiable, not monotone. Building takes some 10 ms a
    candidate besides. The function should depend on the network's shape and not on its weights: values are
    remembered by widths.
    """

    caller: Prices = field(repr=False, compare=False)
    target: float
    dense: float
    name: str
    unit: str = ""

    @property
    def known(self) -> dict[tuple[int, ...], float]:
        """Values by widths."""
        return self.caller.known

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """The function's values.

        Raises:
            CompressorError: the function raised, took too long, or gave no finite number from 0 on.
        """
        rows = [tuple(int(width) for width in row) for row in np.atleast_2d(widths)]
        return np.asarray([self.caller.value(row) for row in rows], dtype=np.float64)
