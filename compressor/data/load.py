"""Load the splits of `--data`: the embedded digits, CIFAR, ImageNet and any folder of images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from compressor.core.errors import CompressorError
from compressor.data.builtin import load_cifar, load_digits
from compressor.data.bundle import DataBundle
from compressor.data.folder import load_folder, load_imagenet
from compressor.data.preprocessing import Wanted

KINDS = ("digits", "cifar10", "cifar100", "folder", "imagenet")
SEARCH_LIMIT = 5000
"""Maximum number of images of the search split: its standard error is then below 0.7 % at any accuracy."""


def load_data(
    spec: str,
    *,
    seed: int,
    image_size: int | None = None,
    wanted: Wanted | None = None,
    search_fraction: float = 0.1,
    search_limit: int = SEARCH_LIMIT,
    workers: int | None = None,
) -> DataBundle:
    """Load a data set as disjoint train, search and test splits.

    Args:
        spec: "digits", "cifar10[:PATH]", "cifar100[:PATH]", "folder:PATH" or "imagenet:PATH".
        seed: Seed that chooses the search split's images from the training images; the test split is fixed.
        image_size: Height and width in pixels; None for 32 (digits, CIFAR), the weights' usual one (ImageNet) and,
            for a folder, the images' own if they are small and of equal size, else the weights' usual one.
        wanted: Preprocessing; None for the usual one. `image_size` has precedence over its own.
        search_fraction: Share of the training images held out, equal in every class.
        search_limit: Maximum number of images held out.
        workers: Threads or processes that decode files; None for a number that suits the machine.

    Raises:
        CompressorError: The name is unknown, or the data is missing, damaged or not a classification problem.
    """
    kind, _, where = spec.partition(":")
    if kind not in KINDS:
        from difflib import get_close_matches

        near = get_close_matches(kind, KINDS, n=2, cutoff=0.4)
        raise CompressorError(
            f"There is no data set called {spec!r}.",
            f"{'Did you mean ' + ' or '.join(near) + '? ' if near else ''}"
            "Choose digits, cifar10[:PATH], cifar100[:PATH], folder:PATH or imagenet:PATH.",
        )
    if not 0 < search_fraction < 1:
        raise CompressorError(f"The search split's share must lie between 0 and 1, got {search_fraction}.")
    if image_size is not None and image_size < 8:
        raise CompressorError(f"Images need at least 8 pixels a side, got {image_size}.")
    wanted = replace(wanted or Wanted(), image_size=image_size or (wanted.image_size if wanted else None))
    if kind == "digits":
        if where:
            raise CompressorError(f"digits takes no path, got {where!r}.", "It ships with scikit-learn.")
        return load_digits(seed, wanted, search_fraction, search_limit)
    path = Path(where).expanduser() if where else None
    if kind in ("cifar10", "cifar100"):
        return load_cifar(kind, path, seed, wanted.at(wanted.image_size or 32), search_fraction, search_limit)
    if path is None:
        raise CompressorError(f"{kind} needs a folder, as in {kind}:/data/images.")
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise CompressorError(f"The folder of images {path} {what}.", f"Write --data {kind}:PATH.")
    load = load_folder if kind == "folder" else load_imagenet
    return load(path, spec, seed, wanted, search_fraction, search_limit, workers)
