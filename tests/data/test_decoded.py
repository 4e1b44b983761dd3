"""Decoded images that are kept between runs: never other pixels than those of the files."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file

from compressor.core.errors import CompressorError
from compressor.data import Preprocessing, decoded
from compressor.data.images import ImageFile, decode, decode_all
from compressor.data.masks import read_mask
from tests.data.test_boxes import coco as write_coco
from tests.data.test_image_folders import write_image
from tests.data.test_scenes import masks as write_masks

SMALL = Preprocessing(16, crop_share=1.0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of decoded images, empty."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded, "FREE_BYTES", 0)
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many files were decoded at each time."""
    found: list[int] = []

    def counted(paths: list[str], *more: object) -> tuple[torch.Tensor, torch.Tensor]:
        found.append(len(paths))
        return decode_all(paths, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(decoded, "decode_all", counted)
    return found


@pytest.fixture
def files(tmp_path: Path) -> list[ImageFile]:
    """Twelve pictures in two classes."""
    for place in range(12):
        write_image(tmp_path / "photos" / "ab"[place % 2] / f"{place:02}.bmp", place)
    return [ImageFile(str(path), ord(path.parent.name)) for path in sorted((tmp_path / "photos").rglob("*.bmp"))]


def loaded(*parts: list[ImageFile], how: Preprocessing = SMALL) -> list[decoded.Decoded]:
    return decoded.load_files(parts, how, "Reading images")


def check(found: decoded.Decoded, files: list[ImageFile], how: Preprocessing = SMALL) -> None:
    """The images are those of the files, bit by bit."""
    assert found.labels.tolist() == [file.label for file in files]
    assert len(found.images) == len(files)
    for image, file in zip(found.images, files, strict=True):
        expected = decode(file.path, how)
        assert expected is not None
        assert torch.equal(image, expected)


@pytest.mark.usefixtures("cache")
def test_images_are_decoded_once_however_they_are_divided(files: list[ImageFile], calls: list[int]) -> None:
    (whole,) = loaded(files)
    check(whole, files)
    some, others = loaded(files[3:], files[:3])
    check(some, files[3:])
    check(others, files[:3])
    (backwards,) = loaded(files[::-1])
    check(backwards, files[::-1])
    some.images.zero_()  # what a run does with its images stays there
    check(loaded(files)[0], files)
    assert calls == [12]
    assert [path.parent for path in decoded.kept()] == [decoded.decoded_folder()]


@pytest.mark.usefixtures("cache")
def test_a_picture_that_changes_is_decoded_again(files: list[ImageFile], calls: list[int]) -> None:
    loaded(files)
    path, before = files[4].path, os.stat(files[4].path)
    write_image(Path(path), 77)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as an archive would bring it
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    check(loaded(files)[0], files)
    check(loaded(files[1:])[0], files[1:])
    assert calls == [12, 12, 11]


@pytest.mark.usefixtures("cache")
def test_a_folder_that_is_moved_is_the_same(files: list[ImageFile], calls: list[int], tmp_path: Path) -> None:
    loaded(files)
    os.rename(tmp_path / "photos", tmp_path / "pictures")
    moved = [file._replace(path=file.path.replace("photos", "pictures")) for file in files]
    check(loaded(moved)[0], moved)
    assert calls == [12]
    os.rename(tmp_path / "pictures/a", tmp_path / "pictures/c")
    renamed = [file._replace(path=file.path.replace("/a/", "/c/")) for file in moved]
    check(loaded(renamed)[0], renamed)
    assert calls == [12, 12]


@pytest.mark.usefixtures("cache")
def test_only_what_changes_the_pixels_matters(
    files: list[ImageFile], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(files)
    loaded(files, how=replace(SMALL, mean=(0.5,) * 3, std=(0.5,) * 3))
    loaded(files, how=SMALL.ordered("bgr"))
    loaded(files, how=SMALL.scaled(255))
    assert calls == [12]
    others = [
        replace(SMALL, size=8), replace(SMALL, size=8, width=16), replace(SMALL, crop_share=0.5),
        replace(SMALL, interpolation="bicubic"), replace(SMALL, resize="squash"), SMALL.ordered("grey"),
    ]  # fmt: skip
    for place, how in enumerate(others, start=2):
        check(loaded(files, how=how)[0], files, how)
        check(loaded(files, how=how)[0], files, how)
        assert len(calls) == place
    monkeypatch.setattr("PIL.__version__", "0.0.1")
    loaded(files)
    monkeypatch.setattr("PIL.features.version", lambda name: "9")
    loaded(files)
    assert len(calls) == len(others) + 3
    assert len(decoded.kept()) == len(calls)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def _say_that_it_is_whole(path: Path) -> None:
    content = load_file(path)
    content["fine"][:] = False
    save_file(content, path, metadata={"key": path.stem})


def _other_shape(path: Path) -> None:
    found = {"images": torch.zeros(12, 3, 8, 8, dtype=torch.uint8), "fine": torch.ones(12, dtype=torch.bool)}
    save_file(found, path, metadata={"key": path.stem, "sha256": decoded._checksum(found)})


def _of_another(path: Path) -> None:
    found = {"images": torch.zeros(12, 3, 16, 16, dtype=torch.uint8), "fine": torch.ones(12, dtype=torch.bool)}
    save_file(found, path, metadata={"key": "0" * 32, "sha256": decoded._checksum(found)})


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "spoil",
    [
        _truncate, _flip, _say_that_it_is_whole, _other_shape, _of_another, _fifo,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 1000),
        lambda path: save_file({"weight": torch.zeros(3)}, path),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("cache")
def test_what_was_not_written_so_is_not_used(files: list[ImageFile], calls: list[int], spoil: object) -> None:
    loaded(files)
    (path,) = decoded.kept()
    spoil(path)  # type: ignore[operator]
    check(loaded(files)[0], files)
    check(loaded(files)[0], files)
    assert calls == [12, 12]  # the file was replaced


def test_what_was_used_the_longest_ago_goes_first(
    cache: Path, files: list[ImageFile], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_of = 3 * 16 * 16
    monkeypatch.setattr(decoded, "LIMIT_BYTES", 2 * 12 * bytes_of + 4000)  # of two sets with their headings
    (cache / "notes.txt").parent.mkdir(parents=True)
    (cache / "notes.txt").write_text("not ours")
    left = cache / f".{'0' * 32}.safetensors.abcdefgh.safetensors"  # of a killed process
    left.write_bytes(b"\0" * 100)
    hows = [replace(SMALL, interpolation=name) for name in ("bilinear", "bicubic", "nearest")]
    for how in hows[:2]:
        loaded(files, how=how)
    old = list(decoded.kept())
    for path in old:
        os.utime(path, ns=(10**18, 10**18 + old.index(path)))
    loaded(files, how=hows[0])  # used again, so that the other one is the oldest
    loaded(files, how=hows[2])
    assert calls == [12] * 3
    loaded(files, how=hows[0])
    assert calls == [12] * 3
    check(loaded(files, how=hows[1])[0], files, hows[1])
    assert calls == [12] * 4
    assert sum(decoded.kept().values()) <= decoded.LIMIT_BYTES
    assert sorted(path.name for path in cache.iterdir() if path not in decoded.kept()) == ["notes.txt", "writing.lock"]


def test_a_cache_that_cannot_be_written_is_a_note(
    cache: Path, files: list[ImageFile], calls: list[int], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file in place of the folder")
    check(loaded(files)[0], files)
    assert said == ["The decoded images are not kept for the next run: File exists."]
    cache.unlink()
    monkeypatch.setattr(decoded, "FREE_BYTES", 10**18)
    check(loaded(files)[0], files)
    assert "they would leave less than 1e+09 GB of the disk" in said[1]
    monkeypatch.setattr(decoded, "FREE_BYTES", 0)
    with FileLock(cache / "writing.lock"):  # of another process, which keeps the same images
        check(loaded(files)[0], files)
    assert (decoded.kept(), len(said)) == ({}, 2)
    check(loaded(files)[0], files)
    assert calls == [12] * 4
    assert len(decoded.kept()) == 1


def test_a_full_disk_is_a_note(
    tmp_path: Path, files: list[ImageFile], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.export.tiny_disk import tiny_disk

    with tiny_disk(tmp_path / "disk", 8) as disk:
        monkeypatch.setenv("COMPRESSOR_CACHE", str(disk))
        monkeypatch.setattr(decoded, "FREE_BYTES", -(10**9))  # it fills up while the images are written
        check(loaded(files)[0], files)
        assert len(said) == 1
        assert "not kept" in said[0]
        assert decoded.kept() == {}
        assert [path.name for path in (disk / "decoded").iterdir()] == ["writing.lock"]


@pytest.mark.usefixtures("cache")
def test_a_file_that_could_not_be_read_is_tried_again(
    files: list[ImageFile], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = files[5].path
    with monkeypatch.context() as patch:
        patch.setattr("compressor.data.images.decode", lambda path, how: None if path == broken else decode(path, how))
        (first,) = loaded(files)
    assert first.unreadable == (broken,)
    assert len(first.images) == len(first.labels) == 11
    (again,) = loaded(files)
    assert again.unreadable == ()
    check(again, files)
    assert calls == [12]


@pytest.mark.usefixtures("cache")
def test_damaged_pictures_are_counted_from_the_cache_too(files: list[ImageFile], calls: list[int]) -> None:
    for file in files[:3]:
        Path(file.path).write_bytes(b"no picture")
    for _ in range(2):
        (found,) = loaded(files)
        assert found.unreadable == tuple(file.path for file in files[:3])
        check(found, files[3:])
    for file in files[:4]:
        Path(file.path).write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(CompressorError, match="4 of 12 images cannot be read"):
            loaded(files)
    assert calls == [12, 12]


def test_a_data_set_is_read_from_the_cache(cache: Path, cifar_jpegs: Path, calls: list[int], tmp_path: Path) -> None:
    from compressor.data import MemorySplit, load_data

    found = [load_data(f"folder:{cifar_jpegs}", seed=seed) for seed in (0, 0, 1)]
    assert calls == [2400]
    shutil.rmtree(cache)
    fresh = load_data(f"folder:{cifar_jpegs}", seed=0)
    for part in ("train", "search", "test"):
        one, other = getattr(found[1], part), getattr(fresh, part)
        assert isinstance(one, MemorySplit)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert not torch.equal(found[2].search.labels, torch.zeros(40))


def scenes(spec: str, folder: Path, task: str) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The pictures and targets of each split."""
    from compressor.data import load_data
    from compressor.data.preprocessing import Wanted
    from compressor.data.scenes import SceneSplit

    data = load_data(f"{spec}:{folder}", seed=0, wanted=Wanted(image_size=16, crop_share=1.0), task=task)
    found = {}
    for part in ("train", "search", "test"):
        split = getattr(data, part)
        assert isinstance(split, SceneSplit)
        found[part] = [scene.read(split.preprocessing) for scene in split.scenes]
    return found


def same(one: object, other: object) -> bool:
    return all(
        torch.equal(left, right)
        for part in ("train", "search", "test")
        for pair, match in zip(one[part], other[part], strict=True)  # type: ignore[index]
        for left, right in zip(pair, match, strict=True)
    )


def test_masks_are_read_once(
    cache: Path, calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor.data import masks as module

    read: list[str] = []

    def counted(path: str) -> npt.NDArray[np.uint8]:
        read.append(Path(path).name)
        return read_mask(path)

    monkeypatch.setattr(module, "read_mask", counted)
    folder = write_masks(tmp_path / "photos")
    first = scenes("masks", folder, "segmentation")
    assert (calls, len(read)) == ([5], 10)  # for their classes, and scaled
    assert same(scenes("masks", folder, "segmentation"), first)
    assert (calls, len(read)) == ([5], 10)
    shutil.rmtree(cache)
    assert same(scenes("masks", folder, "segmentation"), first)
    assert (calls, len(read)) == ([5, 5], 20)
    path = folder / "test/masks/0.png"
    before = path.stat()
    Image.fromarray(np.zeros((20, 30), dtype=np.uint8)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert scenes("masks", folder, "segmentation")["test"][0][1].tolist() == [[0] * 16] * 16
    assert (calls, len(read)) == ([5, 5], 30)  # the pictures are the same
    (folder / "classes.txt").write_text("one\n")
    with pytest.raises(CompressorError, match=r"\d\.png holds the class 1, but \S+classes\.txt names 1: 0 to 0"):
        scenes("masks", folder, "segmentation")
    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(path)
    for _ in range(2):  # a refusal is not kept
        with pytest.raises(CompressorError, match=r"0\.png has 9x9 pixels, its picture 30x20"):
            scenes("masks", folder, "segmentation")


@pytest.mark.usefixtures("cache")
def test_pictures_with_boxes_are_decoded_once(calls: list[int], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    folder = write_coco(tmp_path / "photos", {})
    first = scenes("coco", folder, "detection")
    assert same(scenes("coco", folder, "detection"), first)
    assert len(calls) == 1
    annotations = folder / "annotations/instances_val2017.json"
    assert len(first["test"][0][1]) == 1
    content = json.loads(annotations.read_text())
    content["annotations"] = []
    annotations.write_text(json.dumps(content))
    assert len(scenes("coco", folder, "detection")["test"][0][1]) == 0  # boxes are no pixels
    assert len(calls) == 1
    picture = next((folder / "val2017").iterdir())
    picture.write_bytes(picture.read_bytes()[:-200])  # the header is whole
    for _ in range(2):
        with pytest.raises(CompressorError, match=f"{picture} cannot be read"):
            scenes("coco", folder, "detection")
