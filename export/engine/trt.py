"""Which TensorRT is here, and what that one can do.

TensorRT 8.5 to 11 and TensorRT-RTX have one Python interface with holes in it. What a version has is
written down here once, by product and version; the builder asks these facts and never tries things out.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from export.errors import ExportError

TENSORRT, RTX = "tensorrt", "tensorrt_rtx_bindings"
MODULES = (TENSORRT, RTX)
"""The modules that the builder knows, in the order in which it prefers them."""

OLDEST = (8, 5)

HOW_TO_GET_ONE = (
    "Install TensorRT-RTX with: pip install 'compressor[rtx]' (for RTX GPUs; it builds without a GPU), or "
    "TensorRT with: pip install 'compressor[tensorrt]' (for the GPU of this machine). "
    "A Jetson has TensorRT from its JetPack."
)


@dataclass(frozen=True)
class Flavour:
    """One product in one version, and its facts.

    Attributes:
        module: Name of the Python module.
        version: Its version as it says it.
        release: The first two numbers of the version.
    """

    module: str
    version: str
    release: tuple[int, int]

    @property
    def rtx(self) -> bool:
        """TensorRT-RTX: builds for named compute capabilities, without a GPU."""
        return self.module == RTX

    @property
    def title(self) -> str:
        """How messages name it."""
        return f"{'TensorRT-RTX' if self.rtx else 'TensorRT'} {self.version}"

    @property
    def strongly_typed(self) -> str:
        """How it is had: "flag" where it is asked for by a flag, "always", or "" where it does not exist."""
        if self.rtx:
            return "flag"
        return "always" if self.release >= (11, 0) else "flag" if self.release >= (10, 0) else ""

    @property
    def explicit_batch_flag(self) -> bool:
        """Whether a network must be created with the flag EXPLICIT_BATCH."""
        return not self.rtx and self.release < (10, 0)

    @property
    def precision_flags(self) -> bool:
        """Whether FP16 and INT8 are also asked for by flags of the builder."""
        return not self.strongly_typed

    @property
    def optimisation_level(self) -> bool:
        """Whether the builder's optimisation level exists and is heeded."""
        return not self.rtx and self.release >= (8, 6)

    @property
    def compatibility_modes(self) -> bool:
        """Whether version- and hardware-compatible engines can be asked for."""
        return not self.rtx and self.release >= (8, 6)

    @property
    def timing_cache(self) -> bool:
        """Whether timings of kernels are kept from build to build."""
        return not self.rtx

    @property
    def dla(self) -> bool:
        """Whether there can be deep-learning accelerators; the builder says how many."""
        return not self.rtx

    @property
    def parser_stops_early(self) -> bool:
        """Whether the parser names only the first operator that it does not support."""
        return not self.rtx and self.release < (10, 0)

    @property
    def opsets(self) -> range:
        """The ONNX opsets that the parser was made for; it reads newer ones without a word."""
        if self.rtx or self.release >= (10, 0):
            return range(9, 21)
        return range(9, 18)


def available() -> str | None:
    """The module that engines can be built with here, or None."""
    return next((name for name in MODULES if _import(name)[0] is not None), None)


def why_not() -> str:
    """Why no module is available, in one sentence for each, and how to get one."""
    reasons = [f"{name}: {_import(name)[1]}" for name in MODULES]
    return f"No TensorRT is installed ({'; '.join(reasons)}). {HOW_TO_GET_ONE}"


def load(name: str | None = None) -> tuple[ModuleType, Flavour]:
    """The module and its facts.

    Args:
        name: One of `MODULES`; None takes the first that is there.

    Raises:
        ExportError: it is unknown, not installed or too old.
    """
    chosen = name or available()
    if chosen is None:
        raise ExportError(why_not())
    if chosen not in MODULES:
        raise ExportError(f"{chosen} is no module that builds engines: expected one of {', '.join(MODULES)}.")
    module, reason = _import(chosen)
    if module is None:
        raise ExportError(f"{chosen} cannot be used: {reason}.", HOW_TO_GET_ONE)
    return module, flavour_of(module, chosen)


def flavour_of(module: Any, name: str) -> Flavour:
    """The facts of a module, from its name and version.

    Raises:
        ExportError: the version is not readable or too old.
    """
    version = str(getattr(module, "__version__", ""))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        raise ExportError(f"{name} states no version that can be read: {version!r}.")
    release = (int(numbers[1]), int(numbers[2]))
    if name == TENSORRT and release < OLDEST:
        raise ExportError(
            f"TensorRT {version} is too old for this builder: 8.5 is the oldest it knows.",
            "On JetPack 4, use the bundle's script, which builds with trtexec.",
        )
    return Flavour(module=name, version=version, release=release)


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        return None, "not installed" if error.name == name else f"it needs {error.name}, which is missing"
    except (ImportError, OSError, RuntimeError) as error:  # each version loads its libraries in its own way
        lines = str(error).strip().splitlines()
        return None, f"it cannot be loaded ({lines[0] if lines else type(error).__name__})"


class Messages:
    """A logger's messages. A process's first logger serves all its builders, so each module has just one."""

    _loggers: dict[str, tuple[Any, list[tuple[int, str]]]] = {}  # noqa: RUF012  # shared by design

    def __init__(self, module: Any, name: str) -> None:
        if name not in self._loggers:
            kept: list[tuple[int, str]] = []

            class Keeper(module.ILogger):  # type: ignore[misc]  # the base class comes from the chosen module
                def __init__(self) -> None:
                    module.ILogger.__init__(self)

                def log(self, severity: Any, message: str) -> None:
                    kept.append((int(severity), message))

            self._loggers[name] = (Keeper(), kept)
        self.logger, self._kept = self._loggers[name]
        self._error = int(module.ILogger.Severity.ERROR)
        self._kept.clear()

    def errors(self) -> list[str]:
        """What went wrong since this object was made, without the noise of a machine that has no GPU."""
        wrong = [text.strip() for severity, text in self._kept if severity <= self._error]
        told = [text for text in wrong if "cudaError 35" not in text]
        return told or wrong

    def last_error(self) -> str:
        """The last thing that went wrong, on one line."""
        errors = self.errors()
        return " ".join(errors[-1].split()).rstrip(".") if errors else "no reason was given"
