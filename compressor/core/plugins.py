"""The user's Python code: objects named `package.module:attribute`, modules that packages declare, registered classes.

A package whose module registers agents, budgets or layer rules declares it in the group `compressor.plugins`, in its
own `pyproject.toml`:

    [project.entry-points."compressor.plugins"]
    mypackage = "mypackage.pruning"

From Python, importing the module before `compress` is called does the same.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Generic, TypeVar

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
    return CompressorError(
        f"{what} cannot be imported: {name} raises {shown(error)}{raised_at(error)}.",
        f"Import it in Python to see the whole error: import {name}",
    )


def shown(error: BaseException) -> str:
    """Return an error of the user's code for a message: "TYPE: text", in one line of at most 300 characters of text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


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
        raise CompressorError(
            f"The package {package} names the module {entry.module} in its entry points ({GROUP}), and importing it "
            f"raises {shown(error)}{raised_at(error)}.",
            f"Fix {entry.module}, or remove the package: pip uninstall {package}",
        ) from error


_Kind = TypeVar("_Kind")


class Registry(Generic[_Kind]):
    """Classes of one kind by name: the toolkit's own, and those that plugins and imported modules register.

    Args:
        what: The kind in messages, such as "agent".
        own: Name -> module of the toolkit's own classes. A module is imported when its class is used; listing the names
            costs nothing.
        names: Pattern of allowed names.

    Attributes:
        classes: The classes that are registered so far, by name.
    """

    def __init__(self, what: str, own: Mapping[str, str], names: str = "[A-Za-z][A-Za-z0-9_.-]*") -> None:
        self.what, self.own, self._allowed = what, own, re.compile(names)
        self.classes: dict[str, type[_Kind]] = {}

    def names(self) -> list[str]:
        """Return all names: the toolkit's own, then the others in order."""
        load_plugins()
        return list(dict.fromkeys([*self.own, *sorted(self.classes)]))

    def find(self, name: str) -> type[_Kind] | None:
        """Return the class of a name; None if there is none."""
        if name in self.own:
            importlib.import_module(self.own[name])
        elif name not in self.classes:
            load_plugins()
        return self.classes.get(name)

    def add(self, kind: type[_Kind], name: object) -> None:
        """Register a class.

        A class that is defined anew in its own module (in a notebook, by a reload) replaces the earlier one.

        Raises:
            CompressorError: The name is unusable, or another class has it.
        """
        if not isinstance(name, str) or not self._allowed.fullmatch(name):
            raise CompressorError(
                f"The {self.what} {_place(kind)} has the name {name!r}.",
                "Give the class an attribute `name`, such as \"mine\": a letter, then letters, digits, _ and -.",
            )
        if name in self.own and kind.__module__ != self.own[name]:
            importlib.import_module(self.own[name])  # so that the message can name its class
        other = self.classes.get(name)
        if other is not None and _place(other) != _place(kind):
            raise CompressorError(
                f"The {self.what} name {name!r} of {_place(kind)} is taken by {_place(other)}.",
                f"Give the attribute `name` of {kind.__qualname__} another value.",
            )
        self.classes[name] = kind


def _place(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
