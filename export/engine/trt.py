"""The installed TensorRT and the features of its version.

TensorRT 8.5 to 11 and TensorRT-RTX share one Python API, of which each version has a part. This module lists the
features by product and version; the builder uses this list and does not probe.
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
"""The supported modules, in order of preference."""

OLDEST = (8, 5)

HOW_TO_GET_ONE = (
    "Install TensorRT-RTX with: pip install 'compressor[rtx]' (for RTX GPUs; builds need no GPU), or "
    "TensorRT with: pip install 'compressor[tensorrt]' (for the GPU of this machine). "
    "On a Jetson, JetPack includes TensorRT."
)


@dataclass(frozen=True)
class Flavour:
    """A TensorRT product, its version and its features.

    Attributes:
        module: Name of the Python module.
        version: Its version string.
        release: The major and minor version.
    """

    module: str
    version: str
    release: tuple[int, int]

    @property
    def rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which builds for given compute capabilities without a GPU."""
        return self.module == RTX

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"{'TensorRT-RTX' if self.rtx else 'TensorRT'} {self.version}"

    @property
    def strongly_typed(self) -> str:
        """How strong typing is enabled: "flag", "always", or "" where it does not exist."""
        if self.rtx:
            return "flag"
        return "always" if self.release >= (11, 0) else "flag" if self.release >= (10, 0) else ""

    @property
    def explicit_batch_flag(self) -> bool:
        """Whether a network must be created with the flag EXPLICIT_BATCH."""
        return not self.rtx and self.release < (10, 0)

    @property
    def precision_flags(self) -> bool:
        """Whether FP16 and INT8 also need flags of the builder."""
        return not self.strongly_typed

    @property
    def optimisation_level(self) -> bool:
        """Whether the builder supports optimisation levels."""
        return not self.rtx and self.release >= (8, 6)

    @property
    def compatibility_modes(self) -> bool:
        """Whether version- and hardware-compatible engines are supported."""
        return not self.rtx and self.release >= (8, 6)

    @property
    def timing_cache(self) -> bool:
        """Whether the builder supports a timing cache."""
        return not self.rtx

    @property
    def dla(self) -> bool:
        """Whether deep-learning accelerators are supported; the builder knows their number."""
        return not self.rtx

    @property
    def parser_stops_early(self) -> bool:
        """Whether the parser reports only the first unsupported operator."""
        return not self.rtx and self.release < (10, 0)

    @property
    def opsets(self) -> range:
        """The ONNX opsets that the parser supports; it does not report newer ones."""
        if self.rtx or self.release >= (10, 0):
            return range(9, 21)
        return range(9, 18)


def available() -> str | None:
    """The first module that can be imported, or None."""
    return next((name for name in MODULES if _import(name)[0] is not None), None)


def why_not() -> str:
    """The reason why each module cannot be used, and how to install one."""
    reasons = [f"{name}: {_import(name)[1]}" for name in MODULES]
    return f"No TensorRT is installed ({'; '.join(reasons)}). {HOW_TO_GET_ONE}"


def load(name: str | None = None) -> tuple[ModuleType, Flavour]:
    """Import a module; return it with its features.

    Args:
        name: One of `MODULES`; None is the first that is installed.

    Raises:
        ExportError: the module is unknown, not installed or too old.
    """
    chosen = name or available()
    if chosen is None:
        raise ExportError(why_not())
    if chosen not in MODULES:
        raise ExportError(f"{chosen} is not a TensorRT module: expected one of {', '.join(MODULES)}.")
    module, reason = _import(chosen)
    if module is None:
        raise ExportError(f"{chosen} cannot be used: {reason}.", HOW_TO_GET_ONE)
    return module, flavour_of(module, chosen)


def flavour_of(module: Any, name: str) -> Flavour:
    """The features of a module, from its name and version.

    Raises:
        ExportError: the version cannot be read or is too old.
    """
    version = str(getattr(module, "__version__", ""))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        raise ExportError(f"{name} has no readable version: {version!r}.")
    release = (int(numbers[1]), int(numbers[2]))
    if name == TENSORRT and release < OLDEST:
        raise ExportError(
            f"TensorRT {version} is too old: 8.5 or newer is needed.",
            "On JetPack 4, use a bundle, whose script builds with trtexec.",
        )
    return Flavour(module=name, version=version, release=release)


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and the reason."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        return None, "not installed" if error.name == name else f"it needs {error.name}, which is missing"
    except (ImportError, OSError, RuntimeError) as error:  # versions load their libraries in different ways
        lines = str(error).strip().splitlines()
        return None, f"it cannot be loaded ({lines[0] if lines else type(error).__name__})"


class Messages:
    """Messages of a logger. TensorRT keeps the first logger of a process, so each module has only one."""

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
        """Errors since this object was created, without those about a missing GPU."""
        wrong = [text.strip() for severity, text in self._kept if severity <= self._error]
        others = [text for text in wrong if "cudaError 35" not in text]
        return others or wrong

    def last_error(self) -> str:
        """The last error, on one line."""
        errors = self.errors()
        return " ".join(errors[-1].split()).rstrip(".") if errors else "no reason was given"
