"""Record which network factories this user has run on this machine.

A run's folder may come from somebody else, and its recipe names the factory of its network. Commands that read a
finished run import a factory only if this user has started a run with the same reference and the same module file
before, according to a list in the cache folder, or names it now.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path

from compressor.core.errors import CompressorError
from compressor.core.files import cache_folder, write_atomic
from compressor.models.names import is_users

_FILE = "factories.json"


def remember_factory(name: str) -> None:
    """Record that the user runs the factory `package.module:factory`; other names need no record."""
    if not is_users(name) or (place := _module_file(name)) is None:
        return
    known = _read()
    if place in known.get(name, []):
        return
    with suppress(CompressorError):  # without a cache the commands require the name
        write_atomic(
            cache_folder() / _FILE, json.dumps({**known, name: [*known.get(name, []), place]}, indent=1)
        )


def allowed_factory(name: str, given: str | None, folder: Path) -> str:
    """Return the factory that builds the network of the run in `folder`.

    Args:
        name: Name in the run's files.
        given: Name that the user gave with the command, if any.
        folder: Folder of the run.

    Raises:
        CompressorError: It is user code that was neither run here before nor named now.
    """
    if given is not None:
        return given
    if not is_users(name) or _module_file(name) in _read().get(name, []):
        return name
    raise CompressorError(
        f"The network of {folder} is built by {name[:200]!r}, Python code that was not run from here before; code that "
        "is named only in a file is not imported.",
        f"If you trust it, name it, in the folder of its module: --factory {name[:200]}",
    )


def _module_file(name: str) -> str | None:
    """Return the file of a reference's outermost package or module, as it would be imported from here; run none."""
    top = name.partition(":")[0].partition(".")[0]
    found = PathFinder.find_spec(top, [os.getcwd(), *sys.path])
    if found is None:
        return None
    places = list(found.submodule_search_locations or [])
    return str(Path(found.origin or places[0]).resolve()) if found.origin or places else None


def _read() -> dict[str, list[str]]:
    try:
        known = json.loads((cache_folder() / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {name: places for name, places in known.items() if isinstance(places, list)}
