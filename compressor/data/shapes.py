"""Generated pictures: circles, squares and triangles on noise, with a mask and boxes each. Nothing is downloaded."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from compressor.core.errors import CompressorError
from compressor.data.preprocessing import Wanted, sides_of
from compressor.data.scenes import Drawn, bundle_of
from compressor.data.splits import TEST_SEED, DataBundle, Loading

SHAPES = ("circle", "square", "triangle")
PICTURES = 480
SIZE = 64
TEST_SHARE = 0.2
SEARCH_SHARE = 0.2
_MOST_TRIES = 12
"""Places tried for a shape; where one would touch another, none is drawn, so that about two shapes are."""
_FEWEST_PICTURES = 20
_MOST_PICTURES = 100_000


def load_shapes(where: str, name: str, wanted: Wanted, loading: Loading, task: str) -> DataBundle:
    """Draw the data set; the pictures are the same for every seed, which only chooses the search split.

    Args:
        where: Number of pictures as text; empty for `PICTURES`.
        name: As in `DataBundle`.
        wanted: Preprocessing; pictures are drawn in the size of an input, `SIZE` if none is given.
        loading: How the search split is chosen.
        task: "segmentation" for masks, "detection" for boxes.

    Raises:
        CompressorError: There is no such task or number.
    """
    if task not in ("segmentation", "detection"):
        raise CompressorError(
            f"shapes has masks and boxes, and --task is {task}.",
            "Give --task segmentation or --task detection.",
        )
    if where and not (
        where.isascii() and where.isdigit() and _FEWEST_PICTURES <= int(where) <= _MOST_PICTURES
    ):
        raise CompressorError(
            f"shapes takes a number of pictures from {_FEWEST_PICTURES} to {_MOST_PICTURES:,}, got {where!r}.",
            "For example: --data shapes:200",
        )
    number, size = int(where or PICTURES), wanted.image_size or SIZE
    scenes = [_picture(index, sides_of(size), task == "segmentation") for index in range(number)]
    tested = round(number * TEST_SHARE)
    return bundle_of(
        name,
        ("background", *SHAPES) if task == "segmentation" else SHAPES,
        scenes[tested:],
        scenes[:tested],
        wanted.at(size),
        loading,
        search_share=SEARCH_SHARE,
        notes=(f"The data is {number} generated pictures of shapes: a demonstration, not a real task.",),
    )


def _picture(index: int, size: tuple[int, int], masked: bool) -> Drawn:
    """Draw one or more shapes that do not touch, in colors unlike that of the background."""
    random = np.random.default_rng((TEST_SEED, index))
    back = random.uniform(40, 215, 3)
    image = np.broadcast_to(back, (*size, 3)).copy()
    mask: npt.NDArray[np.uint8] = np.zeros(size, dtype=np.uint8)
    boxes: list[list[float]] = []
    for _ in range(int(random.integers(1, _MOST_TRIES + 1))):
        kind = int(random.integers(len(SHAPES)))
        inside = _inside(kind, size, random)
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        if mask[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1].any():
            continue
        color = random.uniform(0, 255, 3)
        color += np.where(np.abs(color - back) < 60, np.where(back > 127, -100.0, 100.0), 0.0)
        image[inside], mask[inside] = color, kind + 1
        boxes.append([left, top, right, bottom, kind + 1])
    image = np.clip(image + random.normal(0, 20, image.shape), 0, 255)
    target = torch.from_numpy(mask) if masked else torch.tensor(boxes, dtype=torch.float32)
    return Drawn(torch.from_numpy(image.astype(np.uint8)).permute(2, 0, 1).contiguous(), target)


def _inside(kind: int, size: tuple[int, int], random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Return the pixels of a shape at a random place, bool (H, W)."""
    radius = min(size) * random.uniform(0.12, 0.25)
    y, x = (random.uniform(radius + 1, side - radius - 1) for side in size)
    rows, columns = np.ogrid[: size[0], : size[1]]
    down, across = rows + 0.5 - y, columns + 0.5 - x
    if SHAPES[kind] == "circle":
        return np.asarray(down**2 + across**2 <= radius**2)
    if SHAPES[kind] == "square":
        return np.asarray(np.maximum(np.abs(down), np.abs(across)) <= 0.85 * radius)
    return np.asarray((np.abs(across) <= (down + radius) / 2) & (down <= radius))  # its tip is up
