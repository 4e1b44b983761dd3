"""Decoded images in memory, kept between runs: a resume, or the next run, need not decode the same files again.

The images of a set of files are one safetensors file in the cache. Its name is a digest of all that the pixels follow
from: the files' names below their common folder, sizes and times of change, the scaling and cropping, and the versions
of what decodes. So a picture that changes, or another size, is another name. The time of change (`ctime`) belongs to
it because no program can set it: an unpacked archive or a copy may bring another picture with the old size and date.

What is read back is compared with its checksum, and decoded again if anything differs. A cache that cannot be written
costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from compressor.core.errors import CompressorError
from compressor.core.files import cache_folder, replacing, sha256_file
from compressor.core.progress import say
from compressor.data import images as decoding
from compressor.data.images import ImageFile, decode, decode_all, refuse_unreadable
from compressor.data.preprocessing import Preprocessing
from compressor.data.splits import MEMORY_LIMIT
from export.files import open_regular, remove_temporaries

LIMIT_BYTES = 2 * MEMORY_LIMIT
"""Most bytes that are kept; what was used the longest ago goes first."""
FREE_BYTES = 10**9
"""Bytes of the disk that are left for other things."""
_CODECS = ("libjpeg_turbo", "jpg", "jpg_2000", "zlib", "libtiff", "webp")
_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


class Decoded(NamedTuple):
    """Images that were read: uint8 (N, channels, height, width), int64 (N,), and the paths that could not be."""

    images: torch.Tensor
    labels: torch.Tensor
    unreadable: tuple[str, ...]


def load_files(
    parts: Sequence[Sequence[ImageFile]], preprocessing: Preprocessing, label: str, workers: int | None = None
) -> list[Decoded]:
    """Return the images of several lists of files, which are kept as one set: another division of it is no other set.

    Args:
        parts: The lists.
        preprocessing: Size, crop, interpolation and channels.
        label: Name of the progress bar.
        workers: Threads that decode; None for a number that suits the machine.

    Raises:
        CompressorError: Too many of a list are unreadable, see `refuse_unreadable`; or one has values of unknown range.
    """
    paths = sorted({file.path for files in parts for file in files})
    images, fine = _images(paths, preprocessing, label, workers)
    rows = {path: row for row, path in enumerate(paths)}
    found = []
    for files in parts:
        chosen = torch.tensor([rows[file.path] for file in files], dtype=torch.int64)
        good, labels = fine[chosen], torch.tensor([file.label for file in files], dtype=torch.int64)
        unreadable = tuple(file.path for file, read in zip(files, good.tolist(), strict=True) if not read)
        refuse_unreadable(unreadable, len(files))
        found.append(Decoded(images[chosen[good]], labels[good], unreadable))
    return found


def kept() -> dict[Path, int]:
    """Return the bytes of the files of decoded images in the cache, the one that was used the longest ago first."""
    found = []
    for path in decoded_folder().glob("*.safetensors"):
        with suppress(OSError):  # another process may remove it
            facts = path.stat(follow_symlinks=False)
            if _NAME.fullmatch(path.name) and stat.S_ISREG(facts.st_mode):
                found.append((facts.st_mtime_ns, path, facts.st_size))
    return {path: size for _, path, size in sorted(found)}


def decoded_folder() -> Path:
    """Return the folder of decoded images."""
    return cache_folder() / "decoded"


def _images(
    paths: Sequence[str], preprocessing: Preprocessing, label: str, workers: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images of sorted paths and which could be read, from the cache or decoded; see `decode_all`."""
    place = decoded_folder() / f"{_fingerprint(paths, preprocessing)}.safetensors"
    found = _read(place, (len(paths), *preprocessing.input_shape))
    if found is None:
        images, fine = decode_all(paths, preprocessing, label, workers)
        _keep(place, images, fine)
        return images, fine
    images, fine = found
    for row in torch.nonzero(~fine).flatten().tolist():  # it may have been the disk's fault, or the memory's
        if (image := decode(paths[row], preprocessing)) is not None:
            images[row], fine[row] = image, True
    return images, fine


def _fingerprint(paths: Sequence[str], preprocessing: Preprocessing) -> str:
    """Return a digest of all that the pixels of sorted paths follow from."""
    import PIL
    from PIL import features

    heading = {
        "sides": preprocessing.sides,
        "covered": preprocessing.covered,
        "resize": preprocessing.resize,
        "interpolation": preprocessing.interpolation,
        "channels": preprocessing.channels,
        "code": sha256_file(Path(decoding.__file__)),
        "pillow": PIL.__version__,
        "torchvision": version("torchvision"),
        **{name: features.version(name) for name in _CODECS},
    }
    digest = hashlib.sha256(json.dumps(heading, sort_keys=True).encode())
    common = len(os.path.commonpath([paths[0], paths[-1]])) if paths else 0  # of all, because they are sorted
    for path in paths:
        try:
            facts = os.stat(path)
            known = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
        except OSError:
            known = "missing"
        digest.update(b"%s\0%s\n" % (os.fsencode(path[common:]), known.encode()))
    return digest.hexdigest()[:32]


def _read(place: Path, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return memory-mapped images and which could be read; None if there are none, or others than were written."""
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(place).close()  # a FIFO would block
        with safe_open(place, framework="pt") as file:
            known, names = file.metadata() or {}, set(file.keys())
            if names != {"images", "fine"} or known.get("key") != place.stem:
                return None
            images, fine = (file.get_tensor(name) for name in ("images", "fine"))
    except (OSError, SafetensorError):
        return None
    kinds = images.dtype == torch.uint8 and fine.dtype == torch.bool
    if not kinds or images.shape != shape or fine.shape != shape[:1] or known.get("sha256") != _checksum(images, fine):
        return None
    with suppress(OSError):  # of a cache that cannot be written
        os.utime(place)
    return images, fine


def _keep(place: Path, images: torch.Tensor, fine: torch.Tensor) -> None:
    """Write images into the cache, if there is room for them."""
    from filelock import FileLock, Timeout
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    facts = {"key": place.stem, "sha256": _checksum(images, fine)}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / "writing.lock", timeout=0):
            remove_temporaries(place.parent)
            _make_room(place, images.nbytes)
            with replacing(place) as temporary:
                save_file({"images": images, "fine": fine}, temporary, metadata=facts)
    except Timeout:  # another process is writing, most likely the same
        return
    except (OSError, NotImplementedError, SafetensorError, CompressorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        say(f"The decoded images are not kept for the next run: {reason.rstrip('.')}.")


def _make_room(place: Path, wanted_bytes: int) -> None:
    """Remove what was used the longest ago until an image set of this size fits within `LIMIT_BYTES`.

    Raises:
        CompressorError: It would fill the disk.
    """
    others = {path: size for path, size in kept().items() if path != place}
    for path in list(others):
        if sum(others.values()) + wanted_bytes <= LIMIT_BYTES:
            break
        path.unlink(missing_ok=True)
        del others[path]
    if shutil.disk_usage(place.parent).free < wanted_bytes + FREE_BYTES:
        raise CompressorError(f"they would leave less than {FREE_BYTES / 1e9:g} GB of the disk at {place.parent}")


def _checksum(images: torch.Tensor, fine: torch.Tensor) -> str:
    """Return the SHA-256 of images and of which could be read."""
    digest = hashlib.sha256(images.reshape(-1).numpy().data)
    digest.update(fine.numpy().data)
    return digest.hexdigest()
