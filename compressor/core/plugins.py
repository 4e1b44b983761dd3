"""Import the user's Python code: objects named `package.module:attribute`, and modules that packages declare.

A package whose module registers agents, budgets or layer rules declares it in the group `compressor.plugins`, in its
own `pyproject.toml`:

    [project.entry-points."compressor.plugins"]
    mypackage = "mypackage.pruning"

From Python, importing the module before `compress` is called does the same.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from compressor.core.errors import CompressorError

WHERE = "It is imported from the folder of the call or from an installed package."
GROUP = "compressor.plugins"
"""The group of entry points; each names a module, which registers what it holds when it is imported."""


def is_reference(name: str) -> bool:
    """Return whether a text has the form `package.module:attribute`."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def import_object(name: str, what: str, form: str = "package.module:function") -> Any:
    """Import the object `package.module:attribute`. Only for names that the user gave, never for names from a file.

    Args:
        name: Reference to the object.
        what: Name in messages, such as "The model 'nets:tiny'".
        form: Form of such a reference in messages.

    Raises:
        CompressorError: The text has another form, the module is missing or raises, or it has no such attribute (the
            nearest names are given).
    """
    if not is_reference(name):
        raise CompressorError(f"{what} is no reference to Python code.", f"Write it as {form}. {WHERE}")
    module_name, _, attribute = name.partition(":")
    found: Any = _import(module_name, what, form)
    for part in attribute.split("."):
        if not hasattr(found, part):
            own = [key for key, value in vars(found).items() if callable(value) and key[0] != "_"]
            near = get_close_matches(part, own, n=3, cutoff=0.4)
            where = getattr(found, "__file__", None) or module_name
            raise CompressorError(
                f"{what}: {where} has no {part!r}.", f"The nearest: {', '.join(near)}." if near else WHERE
            )
        found = getattr(found, part)
    return found


def _import(name: str, what: str, form: str) -> ModuleType:
    """Import a module, from the current folder first.

    The folder is at the front of `sys.path` only while the module is imported, and stays at its end for later imports
    of that module: a `queue.py` of the user's must not replace Python's own.
    """
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()  # the file may be newer than Python's cached listing of the folder
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the user's code runs here, and may raise anything
        raise _import_error(name, what, form, error, here) from error
    finally:
        with suppress(ValueError):  # the module's code may have changed the path
            sys.path.remove(here)
        if here not in sys.path and "" not in sys.path:
            sys.path.append(here)


def _import_error(name: str, what: str, form: str, error: BaseException, here: str) -> CompressorError:
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and (name == error.name or name.startswith(f"{error.name}."))
    ):
        return CompressorError(
            f"{what} cannot be imported: there is no module {error.name!r} in {here}, and none is installed.",
            f"Write it as {form}, and call it from the folder in which the module lies or install its package.",
        )
    shown = " ".join(str(error).split())[:300]
    return CompressorError(
        f"{what} cannot be imported: {name} raises {type(error).__name__}: {shown}{raised_at(error)}.",
        f"Import it in Python to see the whole error: import {name}",
    )


def raised_at(error: BaseException) -> str:
    """Return the location of the innermost Python line that raised: " (FILE, line N)", or ""."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    own = [f for f in frames if f.filename not in (__file__, importlib.__file__)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


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
        importlib.import_module(entry.module)
    except (Exception, SystemExit) as error:  # the package's code runs now, and may raise anything
        package = entry.dist.name if entry.dist is not None else entry.name
        shown = " ".join(str(error).split())[:300]
        raise CompressorError(
            f"The package {package} names the module {entry.module} in its entry points ({GROUP}), and importing it "
            f"raises {type(error).__name__}: {shown}{raised_at(error)}.",
            f"Fix {entry.module}, or remove the package: pip uninstall {package}",
        ) from error
