"""What a report is made of, read from a run's folder and from nowhere else.

A run may be unfinished, or from an older version: every key may be missing or hold something unexpected. The
readers here turn that into "not known", so that no later step can print a number that nobody measured.
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
    """A run as its files tell it.

    `damaged` counts lines of the episode log that are no JSON objects; `sizes` has the bytes of those
    files that lie in the folder.
    """

    manifest: Manifest
    episodes: tuple[Mapping[str, Any], ...]
    damaged: int
    recipe: str
    sizes: Mapping[str, int]


def collect(run: Path) -> Collected:
    """Read a run's manifest, episodes and recipe.

    Raises:
        CompressorError: the folder has no manifest, or it is no JSON object.
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
    """The episodes of a log and the number of lines that could not be read.

    A last line without its newline is one that a killed run had not finished writing; it counts as neither.
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
    """The object under `key`, or an empty one."""
    value = source.get(key)
    return value if isinstance(value, dict) else {}


def rows(source: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The objects in the list under `key`, or none."""
    value = source.get(key)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def text(source: Mapping[str, Any], key: str, default: str = "") -> str:
    """The value under `key` as one word or line; `default` where it is missing or null."""
    value = source.get(key)
    return default if value is None or isinstance(value, dict | list) else str(value)


def sentences(source: Mapping[str, Any], key: str) -> list[str]:
    """The strings in the list under `key`, or none."""
    value = source.get(key)
    return [line for line in value if isinstance(line, str)] if isinstance(value, list) else []


def inside(name: str) -> bool:
    """Whether a file's name from the manifest stays within the run's folder."""
    path = Path(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _sizes(run: Path, files: Mapping[str, Any]) -> dict[str, int]:
    return {name: (run / name).stat().st_size for name in files if inside(name) and (run / name).is_file()}
