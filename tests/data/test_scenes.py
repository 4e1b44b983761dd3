"""Pictures with masks: files, generated shapes, and what happens to both in training."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from compressor import CompressorError
from compressor.data import load_data
from compressor.data.masks import read_mask
from compressor.data.preprocessing import Wanted
from compressor.data.scenes import augmented
from compressor.data.splits import DataBundle


def pixels(height: int = 20, width: int = 30) -> npt.NDArray[np.uint8]:
    """A gray picture."""
    return np.full((height, width, 3), 128, dtype=np.uint8)


def masks(folder: Path, mask: Any = None, names: str | None = None) -> Path:
    """Four pictures to train on and one to test on, with classes 0, 1 and 255 side by side; `mask` is the last."""
    usual = np.repeat(np.array([0, 1, 255], dtype=np.uint8), 10)[None].repeat(20, axis=0)
    for part, count in (("train", 4), ("test", 1)):
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(pixels()).save(folder / part / "images" / f"{number}.jpg")
            Image.fromarray(usual).save(folder / part / "masks" / f"{number}.png")
    if mask is not None:
        Image.fromarray(mask).save(folder / "test/masks/0.png")
    if names is not None:
        (folder / "classes.txt").write_text(names)
    return folder


def loaded(folder: Path) -> DataBundle:
    wanted = Wanted(image_size=15, crop_share=1.0)
    return load_data(f"masks:{folder}", seed=0, wanted=wanted, task="segmentation")


def test_masks_are_scaled_to_the_nearest_class(tmp_path: Path) -> None:
    from compressor.data.preprocessing import Preprocessing

    wanted = Wanted(usual=Preprocessing(resize="squash", crop_share=1.0), image_size=15)
    data = load_data(f"masks:{masks(tmp_path)}", seed=0, wanted=wanted, task="segmentation")
    assert (data.classes, len(data.train), len(data.search), len(data.test)) == (("0", "1"), 3, 1, 1)
    assert {name: each.images for name, each in data.files.items()} == {"train": 3, "search": 1, "test": 1}
    images, target = next(iter(data.test.batches(4)))
    assert images.shape == (1, 3, 15, 15)
    assert target[0].tolist() == [[0] * 5 + [1] * 5 + [255] * 5] * 15


def test_palettes_and_names_of_classes(tmp_path: Path) -> None:
    palette = Image.fromarray(np.full((20, 30), 2, dtype=np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 90, 0, 0, 0, 90, 0])
    folder = masks(tmp_path, names="sky\nroad\ncar\n\n \n")
    palette.save(folder / "test/masks/0.png")
    data = loaded(folder)
    assert data.classes == ("sky", "road", "car")
    assert next(iter(data.test.batches(1)))[1].unique().tolist() == [2]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("colors", ["gray", "palette"])
def test_masks_of_few_bits_hold_their_classes(tmp_path: Path, bits: int, colors: str) -> None:
    """A PNG of one row, written by hand: Pillow writes no gray of 2 or 4 bits."""
    row = (np.arange(8) % 2**bits).astype(np.uint8)
    packed = np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :]).tobytes()
    header = struct.pack(">IIBBBBB", 8, 1, bits, 3 if colors == "palette" else 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + packed)), (b"IEND", b"")]
    if colors == "palette":
        parts.insert(1, (b"PLTE", bytes(range(3 * 2**min(bits, 4)))))
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
              for kind, data in parts]  # fmt: skip
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert read_mask(str(tmp_path / "mask.png")).tolist() == [row.tolist()]


@pytest.mark.parametrize(
    ("mask", "names", "message"),
    [
        (np.zeros((10, 30), dtype=np.uint8), None, "has 30x10 pixels, its picture 30x20"),
        (np.full((20, 30), 7, dtype=np.uint8), "a\nb\n", "holds the class 7, but .* names 2: 0 to 1"),
        (np.full((20, 30), 300, dtype=np.uint16), None, "holds the class 300; the largest possible is 254"),
        (None, "sky\n\nroad\n", "classes.txt has no name in line 2, which is that of class 1"),
        (pixels(), None, "has 3 channels, expected the number of a class"),
    ],
)
def test_a_wrong_mask_is_refused(tmp_path: Path, mask: Any, names: str | None, message: str) -> None:
    with pytest.raises(CompressorError, match=message):
        loaded(masks(tmp_path, mask, names))


def test_a_picture_without_a_mask_is_refused(tmp_path: Path) -> None:
    (masks(tmp_path) / "train/masks/2.png").unlink()
    with pytest.raises(CompressorError, match="masks has no mask of 2"):
        loaded(tmp_path)


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    (masks(tmp_path) / "train/images/2.jpg").unlink()
    with pytest.raises(CompressorError, match="has 3 pictures to train on and 1 to test on; 4 and one are needed"):
        loaded(tmp_path)


def test_a_mask_without_a_picture_is_noted(tmp_path: Path) -> None:
    masks(tmp_path)
    shutil.copy(tmp_path / "train/masks/2.png", tmp_path / "train/masks/7.png")
    assert "masks without a picture, which are not used: 7" in loaded(tmp_path).notes[0]


def test_files_on_disk_and_in_memory_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = masks(tmp_path)
    memory = loaded(folder)
    monkeypatch.setattr("compressor.data.scenes.MEMORY_LIMIT", 0)
    disk = load_data(
        f"masks:{folder}", seed=0, wanted=Wanted(image_size=15, crop_share=1.0), workers=1, task="segmentation"
    )
    for mine, theirs in zip(memory.train.batches(2), disk.train.batches(2), strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


def test_shapes_are_the_same_for_every_seed_but_the_search_split() -> None:
    first, other = (load_data("shapes:40", seed=seed, task="segmentation") for seed in (0, 1))
    assert [len(first.train), len(first.search), len(first.test)] == [26, 6, 8]
    for mine, theirs in zip(first.test.batches(8), other.test.batches(8), strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
    search = [next(iter(data.search.batches(6)))[0] for data in (first, other)]
    assert not torch.equal(*search)


def test_shapes_that_are_not_square() -> None:
    data = load_data("shapes:20", seed=0, image_size="32x48", task="segmentation")
    images, target = next(iter(data.test.batches(4)))
    assert (images.shape, target.shape) == ((4, 3, 32, 48), (4, 32, 48))
    assert target.amax() > 0


@pytest.mark.parametrize("where", ["5", "x", "-40", "10000000"])
def test_a_wrong_number_of_shapes_is_refused(where: str) -> None:
    with pytest.raises(CompressorError, match="takes a number of pictures from 20"):
        load_data(f"shapes:{where}", seed=0, task="segmentation")


def test_a_mask_moves_with_its_picture() -> None:
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    mask[8:20, 4:16] = 1
    image = (mask * 200)[None].expand(3, -1, -1)
    found = [augmented(image, mask, seed) for seed in range(8)]
    for changed, moved in found:
        assert ((changed[0] > 100) == (moved == 1)).float().mean() > 0.95
    assert len({tuple(moved.flatten().tolist()) for _, moved in found}) == 8
    again = augmented(image, mask, 3)
    assert all(torch.equal(*pair) for pair in zip(again, found[3], strict=True))
