"""Convert any image to 8-bit color or gray, upright and without transparency."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from PIL.Image import Image

BACKGROUND = (255, 255, 255)
"""Color behind transparent pixels: white, as viewers and web pages show them."""
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
_WHITE_IS_ZERO = 0
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


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
        image = image.convert(
            "RGB"
        )  # palettes and inks define colors, so their conversion to gray goes through these
    return image if image.mode == mode else image.convert(mode)


def upright(image: Image) -> Image:
    """Return the image turned and mirrored as its orientation tag says; unchanged without a valid tag."""
    from PIL import Image as pillow

    turns = pillow.Transpose
    methods = {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
        6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90,
    }  # fmt: skip
    try:
        method = methods.get(image.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return image  # damaged metadata beside an intact image
    return image if method is None else image.transpose(method)


def _opaque(image: Image) -> Image:
    from PIL import Image as pillow

    seen = image.convert("RGBA")
    behind = pillow.new("RGBA", seen.size, (*BACKGROUND, 255))
    return pillow.alpha_composite(behind, seen).convert("RGB")


def _scaled(image: Image, name: str) -> Image:
    """Scale gray values of more than 8 bits to 0..255."""
    from PIL import Image as pillow

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
    elif image.mode == "I" and image.format not in (
        "PNG",
        "PPM",
    ):  # these modes have a range of 16 bits
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
