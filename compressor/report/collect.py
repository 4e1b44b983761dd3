"""Read a report's input from a run's folder, its only source.

A run may be unfinished, or from an older version: every key may be missing or hold an unexpected value. The readers
here convert that to "not known", so that no later step can print a number that was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.core.errors import CompressorError
from compressor.core.files import read_json
from compressor.core.records import MANIFEST, RECIPE

REPORT = "report.html"
EPISODES = Path("search") / "episodes.jsonl"

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Collected:
    """Content of a run's files.

    Attributes:
        damaged: Number of lines of the episode log that are not JSON objects.
        sizes: Bytes of the files that exist in the folder.
    """

    manifest: Manifest
    episodes: tuple[Mapping[str, Any], ...]
    damaged: int
    recipe: str
    sizes: Mapping[str, int]


def collect(run: Path) -> Collected:
    """Read a run's manifest, episodes and recipe.

    Raises:
        CompressorError: The folder has no manifest, or it is not a JSON object.
    """
    if not (run / MANIFEST).is_file():
        raise CompressorError(
            f"{run} holds no {MANIFEST}, so there is nothing to report.",
            "Give the folder of a run: compress report RUN",
        )
    manifest = read_json(run / MANIFEST)
    if not isinstance(manifest, dict):
        raise CompressorError(f"{run / MANIFEST} holds {type(manifest).__name__}, expected an object.")
    episodes, damaged = read_episodes(run / EPISODES)
    recipe = run / RECIPE
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
    return Collected(manifest, episodes, damaged, text, _sizes(run, section(manifest, "files")))


def read_episodes(path: Path) -> tuple[tuple[Mapping[str, Any], ...], int]:
    """Return the episodes of a log and the number of unreadable lines.

    A last line without a newline was not finished by a killed run; it counts as neither.
    """
    if not path.is_file():
        return (), 0
    kept: list[Mapping[str, Any]] = []
    damaged = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            kept.append(record)
        else:
            damaged += 1
    return tuple(kept), damaged


def section(source: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object under `key`, or an empty one."""
    value = source.get(key)
    return value if isinstance(value, dict) else {}


def rows(source: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return the objects in the list under `key`, or none."""
    value = source.get(key)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def text(source: Mapping[str, Any], key: str, default: str = "") -> str:
    """Return the value under `key` as one word or line; `default` if it is missing or null."""
    value = source.get(key)
    return default if value is None or isinstance(value, dict | list) else str(value)


def sentences(source: Mapping[str, Any], key: str) -> list[str]:
    """Return the strings in the list under `key`, or none."""
    value = source.get(key)
    return [line for line in value if isinstance(line, str)] if isinstance(value, list) else []


def inside(name: str) -> bool:
    """Return whether a file name from the manifest stays within the run's folder."""
    path = Path(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _sizes(run: Path, files: Mapping[str, Any]) -> dict[str, int]:
    return {name: (run / name).stat().st_size for name in files if inside(name) and (run / name).is_file()}
