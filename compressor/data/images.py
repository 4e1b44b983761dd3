"""Image files: decoding to 8 bits, upright and without transparency; scaling; and those that cannot be read."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as pillow

from compressor.core import progress
from compressor.core.errors import CompressorError
from compressor.data.preprocessing import Preprocessing, Wanted
from export.files import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

_TOLERATED_SHARE = 0.05
_TOLERATED_COUNT = 3
_CHUNK = 256
_MOST_PIXELS = 1 << 26
"""Of an image after it is scaled."""
BACKGROUND = (255, 255, 255)
"""Color behind transparent pixels: white, as viewers and web pages show them."""
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
_WHITE_IS_ZERO = 0
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class ImageFile(NamedTuple):
    """One image of a folder."""

    path: str
    label: int


def image_size(path: str) -> tuple[int, int] | None:
    """Return (width, height) of an image from its header, or None if that cannot be read."""
    try:
        with open_regular(path) as file, pillow.open(file) as image:
            width, height = image.size
            return int(width), int(height)
    except _unreadable():
        return None


def _unreadable() -> tuple[type[Exception], ...]:
    """Return the exceptions that Pillow raises for damaged, truncated or extremely large images."""
    damaged = (IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, struct.error, zlib.error)
    return OSError, SyntaxError, ValueError, EOFError, pillow.DecompressionBombError, *damaged


def decode(path: str, wanted: Preprocessing | int) -> torch.Tensor | None:
    """Decode one image before normalization: uint8 (channels, height, width), or None if the file cannot be read.

    Args:
        path: Image file.
        wanted: Size, crop, interpolation and channels; a number is a size, with the usual values for the rest.

    Raises:
        CompressorError: It has values of unknown range; see `eight_bit`.
    """
    preprocessing = Wanted().at(wanted) if isinstance(wanted, int) else wanted
    picture = whole_picture(path, preprocessing, 2 * max(preprocessing.covered))  # twice what is needed loses nothing
    return None if picture is None else fitted(picture, preprocessing)


def whole_picture(path: str, preprocessing: Preprocessing, needed: int) -> Image | None:
    """Read a whole picture, upright and in 8 bits (see `eight_bit`), or None if the file cannot be read.

    Args:
        path: Image file.
        preprocessing: Says the channels, and how large the picture becomes if all of it is scaled.
        needed: Pixels of its sides that are enough: a larger JPEG decodes to a half, a quarter or an eighth at once.
    """
    covered = max(preprocessing.covered)
    try:
        with open_regular(path) as file, pillow.open(file) as image:
            short, long = sorted(image.size)
            if long * covered**2 > short * _MOST_PIXELS:
                return None  # a line of pixels would become gigabytes when its short side is scaled
            image.draft("RGB", (needed, needed))
            return eight_bit(image, preprocessing.channels, path)
    except _unreadable():
        return None


def fitted(image: Image, preprocessing: Preprocessing) -> torch.Tensor:
    """Scale and crop as torchvision and timm do, so that published accuracies hold: uint8 (channels, height, width)."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import center_crop, resize

    high, wide = preprocessing.covered
    sides = preprocessing.sides
    if (high, wide) != sides or image.size != sides[::-1]:
        scaled = [high, wide]
        if preprocessing.resize != "squash":  # the aspect ratio is kept
            by_height = high * image.width >= wide * image.height
            side, own = (high, image.height) if by_height else (wide, image.width)
            whole = int if high == wide else round  # torchvision cuts off, timm rounds where the sides differ
            scaled = [whole(side * each / own) for each in image.size[::-1]]
        image = center_crop(resize(image, scaled, InterpolationMode(preprocessing.interpolation)), list(sides))
    return pixels(image)


def pixels(image: Image) -> torch.Tensor:
    """Return an image as uint8 (channels, height, width)."""
    values = np.array(image)
    return torch.from_numpy(values if values.ndim == 3 else values[:, :, None]).permute(2, 0, 1).contiguous()


def eight_bit(image: Image, channels: int, name: str) -> Image:
    """Return the image in mode "RGB", or "L" if `channels` is 1, as a viewer would show it.

    The camera's orientation tag is applied, transparent pixels are laid over `BACKGROUND`, and gray values of
    16 bits or of floats from 0 to 1 are scaled to 0..255. `name` is the image's name in messages.

    Raises:
        CompressorError: The range of the values is unknown: floats beyond 0..1, 32-bit integers.
        OSError and other exceptions that Pillow raises for damaged files.
    """
    image.load()  # here, where damage is expected
    image = upright(image)
    if image.mode in _DEEP:
        image = _scaled(image, name)
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = _opaque(image)
    mode = "L" if channels == 1 else "RGB"
    if image.mode not in ("L", "RGB", mode):
        image = image.convert("RGB")  # palettes and inks define colors, so that gray is computed from these
    return image if image.mode == mode else image.convert(mode)


def upright(image: Image) -> Image:
    """Return the image turned and mirrored as its orientation tag says; unchanged without a valid tag."""
    turns = pillow.Transpose
    methods = {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
        6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90,
    }  # fmt: skip
    method = methods.get(_orientation(image))
    return image if method is None else image.transpose(method)


def turned(image: Image) -> bool:
    """Return whether the orientation tag exchanges width and height."""
    return _orientation(image) in (5, 6, 7, 8)


def _orientation(image: Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
        return found if isinstance(found, int) else 1
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1  # damaged metadata beside an intact image


def _opaque(image: Image) -> Image:
    seen = image.convert("RGBA")
    behind = pillow.new("RGBA", seen.size, (*BACKGROUND, 255))
    return pillow.alpha_composite(behind, seen).convert("RGB")


def _scaled(image: Image, name: str) -> Image:
    """Scale gray values of more than 8 bits to 0..255."""
    values: npt.NDArray[Any] = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        limit = 1.0
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            found = f"{np.nanmin(values):g} to {np.nanmax(values):g}"
            raise CompressorError(
                f"{name} holds floats from {found}; floats are read as grey values from 0 to 1.",
                "Divide them by their maximum possible value, or save the images with 8 or 16 bits.",
            )
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # in these formats the range is 16 bits
        raise CompressorError(
            f"{name} holds signed or 32-bit integers ({values.min()} to {values.max()}), "
            "whose white level is unknown.",
            "Save the images with 8 or unsigned 16 bits.",
        )
    else:
        bits = tags.get(_BITS_PER_SAMPLE, (16,))
        limit = 2.0 ** (bits[0] if isinstance(bits, tuple) else bits)
    # The upper 8 bits, like torchvision's `to_dtype(scale=True)`: every gray level has equally many values.
    scaled = np.clip(values.astype(np.float64) * (256 / limit), 0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        scaled = 255 - scaled
    return pillow.fromarray(scaled)


def decode_all(
    paths: Sequence[str], preprocessing: Preprocessing, label: str, workers: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode many files with a few threads (Pillow releases the GIL while it decodes).

    Returns:
        uint8 (N, channels, height, width), and whether each file could be read, bool (N,).

    Raises:
        CompressorError: One has values of unknown range.
    """
    images = torch.zeros(len(paths), *preprocessing.input_shape, dtype=torch.uint8)
    fine = torch.zeros(len(paths), dtype=torch.bool)

    def read(start: int) -> int:
        chunk = range(start, min(start + _CHUNK, len(paths)))
        for index in chunk:
            if (image := decode(paths[index], preprocessing)) is not None:
                images[index] = image
                fine[index] = True
        return len(chunk)

    threads = workers or min(8, 2 * (os.cpu_count() or 1))
    with progress.bar(label, total=len(paths)) as bar, ThreadPoolExecutor(threads) as pool:
        try:
            for done in pool.map(read, range(0, len(paths), _CHUNK)):
                bar.advance(done)
        except KeyboardInterrupt:  # otherwise leaving the pool would wait until every file is read
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return images, fine


def refuse_unreadable(unreadable: Sequence[str], total: int) -> None:
    """Accept a few damaged images (up to 3, or 5 % if that is more) and raise an error for more.

    Raises:
        CompressorError: Names the first of them.
    """
    if len(unreadable) > max(_TOLERATED_COUNT, _TOLERATED_SHARE * total) or len(unreadable) == total > 0:
        first = ", ".join(unreadable[:3])
        raise CompressorError(
            f"{len(unreadable)} of {total} images cannot be read, such as {first}.",
            "They may be truncated or not images: copy them again, or delete them. "
            f"Up to {_TOLERATED_SHARE:.0%} are skipped.",
        )
