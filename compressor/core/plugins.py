"""Packages of the user's that register agents and layer rules: each is imported once, by its entry point.

A package declares its module in the group `compressor.plugins`, in its own `pyproject.toml`:

    [project.entry-points."compressor.plugins"]
    mypackage = "mypackage.pruning"

From Python, importing the module before `compress` is called does the same.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from compressor.core.errors import CompressorError
from compressor.core.importing import raised_at

GROUP = "compressor.plugins"
"""The group of entry points; each names a module, which registers what it holds when it is imported."""


@cache
def load_plugins() -> tuple[str, ...]:
    """Import the module of every entry point of the group, once in a process.

    Returns:
        The modules' names.

    Raises:
        CompressorError: a module is missing or raises; the package, the module and what came are named.
    """
    entries = sorted(entry_points(group=GROUP), key=lambda entry: (entry.module, entry.name))
    modules = dict.fromkeys(entry.module for entry in entries)
    for entry in entries:
        _load(entry)
    return tuple(modules)


def _load(entry: EntryPoint) -> None:
    try:
        import_module(entry.module)
    except (Exception, SystemExit) as error:  # the package's code runs now, and may raise anything
        package = entry.dist.name if entry.dist is not None else entry.name
        shown = " ".join(str(error).split())[:300]
        raise CompressorError(
            f"The package {package} names the module {entry.module} in its entry points ({GROUP}), and importing it "
            f"raises {type(error).__name__}: {shown}{raised_at(error)}.",
            f"Fix {entry.module}, or remove the package: pip uninstall {package}",
        ) from error
