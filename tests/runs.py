"""Small runs that several tests make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compressor import Recipe

IMAGE_SIZE = 16  # the digits have 8 x 8 pixels
FAST = {"max_evaluations": 6, "batch_norm_batches": 2}


def recipe(**fields: Any) -> Recipe:
    """A recipe of a tiny network on tiny images; the joint agent hardly learns, unless `search` has its settings, and
    few images compensate, unless `pruning` has their number.
    """
    base: dict[str, Any] = {
        "model": "tests.nets:tiny", "image_size": IMAGE_SIZE, "epochs": 3, "search": FAST,
        "contract": {"repeats": 1, "seconds": 5.0}, "export": {"engine": False}, "training": {"batch_size": 64},
    }  # fmt: skip
    wanted = {**base, **fields}
    wanted["pruning"] = {"compensation_images": 64, **wanted.get("pruning", {})}
    if wanted.get("agent", "joint") == "joint":
        wanted["search"] = {"settings": {"updates_per_episode": 1}, **wanted["search"]}
    return Recipe.model_validate(wanted)


def manifest_of(folder: Path) -> dict[str, Any]:
    """A run's manifest as it lies on the disk."""
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content
