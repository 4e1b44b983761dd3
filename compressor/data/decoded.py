"""Decoded images in memory, kept between runs: a resume, or the next run, need not decode the same files again.

The images of a set of files are one safetensors file in the cache, and so are their masks. Its name is a digest of all
that the pixels follow from: the files' names below their common folder, sizes and times of change, the scaling and
cropping, and the versions of what decodes. So a picture that changes, or another size, is another name. The time of
change (`ctime`) belongs to it because no program can set it: an unpacked archive or a copy may bring another picture
with the old size and date.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

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
Tensors = Mapping[str, torch.Tensor]
Form = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each tensor."""


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
    images, fine, rows = pictures(
        [file.path for files in parts for file in files], preprocessing, label, workers
    )
    found = []
    for files in parts:
        chosen = torch.tensor([rows[file.path] for file in files], dtype=torch.int64)
        good, labels = fine[chosen], torch.tensor([file.label for file in files], dtype=torch.int64)
        unreadable = tuple(file.path for file, read in zip(files, good.tolist(), strict=True) if not read)
        refuse_unreadable(unreadable, len(files))
        found.append(Decoded(images[chosen[good]], labels[good], unreadable))
    return found


def pictures(
    paths: Sequence[str], preprocessing: Preprocessing, label: str, workers: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """Return the images of files, from the cache or decoded, which of them could be read, and the row of each path.

    Args:
        paths: The files, in any order.
        preprocessing, label, workers: As in `load_files`.

    Raises:
        CompressorError: One has values of unknown range.
    """
    files = sorted(set(paths))
    place = _place(files, geometry(preprocessing))
    form: Form = {
        "images": (torch.uint8, (len(files), *preprocessing.input_shape)),
        "fine": (torch.bool, (len(files),)),
    }
    if found := _read(place, form):
        images, fine = found["images"], found["fine"]
        for row in torch.nonzero(~fine).flatten().tolist():  # it may have been the disk's fault, or the memory's
            if (image := decode(files[row], preprocessing)) is not None:
                images[row], fine[row] = image, True
    else:
        images, fine = decode_all(files, preprocessing, label, workers)
        _keep(place, {"images": images, "fine": fine})
    return images, fine, {path: row for row, path in enumerate(files)}


def remembered(
    paths: Sequence[str], follows_from: Mapping[str, Any], form: Form, compute: Callable[[], Tensors]
) -> Tensors:
    """Return tensors that follow from files: from the cache, or computed and kept there.

    Args:
        paths: The files, sorted.
        follows_from: What else the tensors follow from, and what they are; plain data.
        form: Type and shape of each.
        compute: Computes them.
    """
    place = _place(paths, follows_from)
    found = _read(place, form)
    if found is None:
        found = compute()
        _keep(place, found)
    return found


def geometry(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the part of a preprocessing that pixels follow from before they are normalized."""
    return {
        "sides": preprocessing.sides,
        "covered": preprocessing.covered,
        "resize": preprocessing.resize,
        "interpolation": preprocessing.interpolation,
        "channels": preprocessing.channels,
    }


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


def _place(paths: Sequence[str], follows_from: Mapping[str, Any]) -> Path:
    """Return the file of what follows from sorted paths; its name is a digest of all of it."""
    import PIL
    from PIL import features

    heading = {
        **follows_from,
        "decoding": sha256_file(Path(decoding.__file__)),
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
    return decoded_folder() / f"{digest.hexdigest()[:32]}.safetensors"


def _read(place: Path, form: Form) -> Tensors | None:
    """Return memory-mapped tensors of this form; None if there are none, or others than were written."""
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(place).close()  # a FIFO would block
        with safe_open(place, framework="pt") as file:
            known, names = file.metadata() or {}, set(file.keys())
            if names != set(form) or known.get("key") != place.stem:
                return None
            found = {name: file.get_tensor(name) for name in form}
    except (OSError, SafetensorError):
        return None
    if any((found[name].dtype, tuple(found[name].shape)) != form[name] for name in form):
        return None
    if known.get("sha256") != _checksum(found):
        return None
    with suppress(OSError):  # of a cache that cannot be written
        os.utime(place)
    return found


def _keep(place: Path, tensors: Tensors) -> None:
    """Write tensors into the cache, if there is room for them."""
    from filelock import FileLock, Timeout
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    facts = {"key": place.stem, "sha256": _checksum(tensors)}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / "writing.lock", timeout=0):
            remove_temporaries(place.parent)
            _make_room(place, sum(tensor.nbytes for tensor in tensors.values()))
            with replacing(place) as temporary:
                save_file(dict(tensors), temporary, metadata=facts)
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


def _checksum(tensors: Tensors) -> str:
    """Return the SHA-256 of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).numpy().data)
    return digest.hexdigest()
