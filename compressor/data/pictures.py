"""Pictures without labels: any tree of them."""

from __future__ import annotations

from pathlib import Path

from compressor.core.errors import CompressorError
from compressor.data.folder import SUFFIXES, bundle, is_image, split_folders, visible_files
from compressor.data.images import ImageFile
from compressor.data.preprocessing import Wanted
from compressor.data.splits import TEST_SEED, DataBundle, Loading, hold_out

SCORED_SHARE = 0.2
"""Share of the pictures on which networks are compared for the report, and of the others for candidates."""

FEWEST = 10


def load_pictures(path: Path, name: str, wanted: Wanted, loading: Loading) -> DataBundle:
    """Load all pictures below a folder, in splits but without labels: every label is 0, and there are no classes.

    If the folder has train/ and test/ (or val/), these are the splits; otherwise they are drawn from all pictures.

    Raises:
        CompressorError: There are too few pictures, too many are unreadable, or its splits have other names.
    """
    notes: list[str] = []
    parts = split_folders(path)
    other = "test" if "test" in parts else "val"
    if "train" in parts and other in parts:
        train, test = _pictures(parts["train"]), _pictures(parts[other])
    else:
        found = _pictures(path)
        _require(len(found), path)
        stays, held = hold_out([0] * len(found), SCORED_SHARE, loading.search_limit, TEST_SEED)
        train, test = ([found[index] for index in part.tolist()] for part in (stays, held))
        notes.append(f"{len(test)} of the {len(found)} pictures in {path} form the test split.")
    _require(len(train), path)
    stays, held = loading.hold_out([0] * len(train), SCORED_SHARE)
    kept, scored = ([train[index] for index in part.tolist()] for part in (stays, held))
    return bundle(name, path, (), (kept, scored, test), wanted.image_size, wanted, notes, loading)


def _pictures(folder: Path) -> list[ImageFile]:
    """Return the image files below a folder, in order; hidden ones are ignored."""
    return [ImageFile(path, 0) for path in visible_files(folder) if is_image(path)]


def _require(count: int, path: Path) -> None:
    if count < FEWEST:
        raise CompressorError(
            f"{path} holds {count} pictures; at least {FEWEST} are needed, better hundreds.",
            f"Pictures are files such as {', '.join(sorted(SUFFIXES)[:4])}, in any folders below it.",
        )
