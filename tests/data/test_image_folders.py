"""Folders of images, good and bad, in memory and on the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compressor.core.errors import CompressorError
from compressor.data import FileSplit, MemorySplit, load_data
from tests.archives import SAFELY
from tests.data.decoding import images_of


def write_image(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 20 training and 5 test images of 16x16."""
    for split, count in (("train", 20), ("test", 5)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                write_image(
                    tmp_path / split / name / f"{index:02}.png",
                    1000 * label + index + 500 * (split == "test"),
                )
    return tmp_path


def test_batches_are_normalised(folder: Path) -> None:
    data = load_data(f"folder:{folder}", seed=0)
    assert isinstance(data.test, MemorySplit)
    images, labels = next(iter(data.test.batches(4)))
    assert images.shape == (4, 3, 16, 16)
    assert labels.tolist() == [0, 0, 0, 0]
    pixel = data.test.images[0, :, 3, 5].tolist()
    expected = [
        (pixel[0] / 255 - 0.485) / 0.229,
        (pixel[1] / 255 - 0.456) / 0.224,
        (pixel[2] / 255 - 0.406) / 0.225,
    ]
    assert images[0, :, 3, 5].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_folder_with_splits(folder: Path) -> None:
    data = load_data(f"folder:{folder}", seed=0)
    assert data.classes == ("cat", "dog")
    assert data.input_shape == (3, 16, 16)
    assert [len(split) for split in (data.train, data.search, data.test)] == [36, 4, 10]
    assert data.search.labels.tolist() == [0, 0, 1, 1]
    train, search, test = images_of(data)
    assert train.isdisjoint(search | test)
    assert search.isdisjoint(test)
    os.rename(folder / "test", folder / "val")
    assert images_of(load_data(f"folder:{folder}", seed=0))[2] == test
    shutil.copytree(folder / "val", folder / "test")
    assert any("val/ is not used" in note for note in load_data(f"folder:{folder}", seed=0).notes)


def test_a_folder_without_splits(folder: Path) -> None:
    data = load_data(f"folder:{folder / 'train'}", seed=3)
    assert [len(split) for split in (data.train, data.search, data.test)] == [28, 4, 8]
    assert data.test.labels.tolist() == [0] * 4 + [1] * 4
    assert "8 of its images form the test split" in data.notes[0]


def test_linked_folders_are_followed_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Links to pictures elsewhere, to their own folder, to one above it, and to one beside it."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for index in range(10):
        write_image(elsewhere / f"deep/{index}.png", 2000 + index)
    cats = folder / "train/cat"
    (cats / "more").symlink_to(elsewhere)
    (cats / "again").symlink_to(cats)
    (cats / "above").symlink_to(folder)
    (cats / "same").symlink_to(cats / "more")
    write_image(cats / ".ipynb_checkpoints/00.png", 0)
    for kind, before in (("folder", 40), ("images", 40)):
        data = load_data(f"{kind}:{folder}", seed=0, decode_files=False)
        assert len(data.train) + len(data.search) == before + 10, kind
    assert isinstance(data.train, FileSplit)
    assert sum("/cat/more/deep/" in file.path for file in (*data.train.files, *data.search.files)) == 10


def test_images_of_other_sizes_are_scaled_and_cut(tmp_path: Path) -> None:
    """A picture of 200x100 whose left and right quarters are white: scaled to 64x32, the middle 32x32 is
    black."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            for index in range(4):
                picture = np.zeros((100, 200, 3), dtype=np.uint8)
                picture[:, :40] = picture[:, 160:] = 255
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(tmp_path / split / name / f"{index}.png")
    data = load_data(f"folder:{tmp_path}", seed=0, image_size=32)
    assert isinstance(data.test, MemorySplit)
    assert data.test.images.shape == (8, 3, 32, 32)
    assert data.test.images.max() == 0
    assert load_data(f"folder:{tmp_path}", seed=0).input_shape == (3, 224, 224)


def test_a_few_bad_images_are_skipped_and_counted(folder: Path) -> None:
    whole = (folder / "train/cat/00.png").read_bytes()
    (folder / "train/cat/00.png").write_bytes(whole[: len(whole) // 2])
    (folder / "train/dog/01.png").write_bytes(b"")
    (folder / "train/dog/notes.txt").write_text("no image, and not counted")
    data = load_data(f"folder:{folder}", seed=0)
    assert len(data.train) + len(data.search) == 38
    counts = [int(note.split()[0]) for note in data.notes]
    assert sum(counts) == 2
    assert "cannot be read and are skipped" in data.notes[0]


def _empty(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.unlink()


def _spoil_many(folder: Path) -> None:
    for path in sorted(folder.glob("train/*/*.png"))[:10]:
        path.write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_empty, ["no images in folders by class", "PATH/train/CLASS"]),
        (lambda f: shutil.rmtree(f / "train/dog"), ["images of one class only, 'cat'"]),
        (lambda f: shutil.rmtree(f / "test/dog"), ["images of one class only"]),
        (lambda f: shutil.rmtree(f / "test"), ["neither test/ nor val/"]),
        (lambda f: shutil.rmtree(f / "train"), ["no train/"]),
        (lambda f: os.rename(f / "test/dog", f / "test/wolf"), ["classes differ", "dog", "not in"]),
        (_spoil_many, ["images cannot be read", "5%"]),
    ],
)
def test_folders_that_are_refused(folder: Path, spoil: Any, words: list[str]) -> None:
    spoil(folder)
    with pytest.raises(CompressorError) as caught:
        load_data(f"folder:{folder}", seed=0)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "images"])
@pytest.mark.parametrize(
    ("train", "test", "hint"),
    [
        ("Training", "Testing", "Rename Testing/ to test/ and Training/ to train/."),
        ("Train", "Val", "Rename Train/ to train/ and Val/ to val/."),
        ("training_set", "test_set", "Rename test_set/ to test/ and training_set/ to train/."),
        ("train", "valid", "Rename valid/ to val/."),
    ],
)
def test_splits_of_other_names_are_refused(folder: Path, kind: str, train: str, test: str, hint: str) -> None:
    os.rename(folder / "test", folder / test)
    os.rename(folder / "train", folder / train)
    with pytest.raises(CompressorError, match=rf"{train}/.*only train/ and test/ \(or val/\) are read") as caught:
        load_data(f"{kind}:{folder}", seed=0)
    assert hint in str(caught.value)


@pytest.mark.parametrize("names", [("Bus", "Train"), ("invalid", "valid"), ("test_tube", "training_shoe")])
def test_classes_named_like_one_split_are_classes(folder: Path, names: tuple[str, str]) -> None:
    for old, new in zip(("cat", "dog"), names, strict=True):
        os.rename(folder / "train" / old, folder / "train" / new)
    assert load_data(f"folder:{folder / 'train'}", seed=0).classes == names


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("digts", "digits"),
        ("cifar", "cifar10"),
        ("folder", "folder:/data/images"),
        ("folder:/no/such/place", "does not exist"),
        ("digits:/data", "takes no path"),
        ("imagenet:{tmp}", "no train/ folder"),
        ("imagenet:{folder}", "no val/ folder"),
    ],
)
def test_data_that_is_not_there(spec: str, word: str, folder: Path) -> None:
    text = spec.format(tmp=folder / "train/cat", folder=folder)
    with pytest.raises(CompressorError, match=word):
        load_data(text, seed=0)


def test_large_folders_stay_on_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = load_data(f"folder:{folder}", seed=0)
    monkeypatch.setattr("compressor.data.folder.MEMORY_LIMIT", 1000)
    on_disk = load_data(f"folder:{folder}", seed=0, workers=0)
    assert isinstance(on_disk.train, FileSplit)
    for memory, disk in zip(in_memory.test.batches(4), on_disk.test.batches(4), strict=True):
        assert torch.equal(memory[0], disk[0])
        assert torch.equal(memory[1], disk[1])
    assert images_of(in_memory) == images_of(on_disk)
    assert len(on_disk.train.sample(7)) == 7
    epochs = [list(on_disk.train.batches(8, shuffle_seed=4, augment=True)) for _ in range(2)]
    assert all(torch.equal(one[0], other[0]) for one, other in zip(*epochs, strict=True))


def test_workers_change_nothing_and_late_damage_is_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.data.folder.MEMORY_LIMIT", 1000)
    epochs = []
    for workers in (0, 2):
        split = load_data(f"folder:{folder}", seed=0, workers=workers).train
        epochs.append(list(split.batches(8, shuffle_seed=4, augment=True)))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(*epochs, strict=True))
    split = load_data(f"folder:{folder}", seed=0, workers=0).test
    assert isinstance(split, FileSplit)
    (folder / "test/cat/00.png").write_bytes(b"damaged after loading")
    assert [len(labels) for _, labels in split.batches(4)] == [3, 4, 2]
    assert split.unreadable == 1


def test_imagenet_orders_classes_by_wordnet_id(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("n02119789", "n01440764"):
            for index in range(4):
                write_image(tmp_path / split / name / f"{index}.jpg", index, (60, 50))
    data = load_data(f"imagenet:{tmp_path}", seed=0, image_size=32)
    assert data.classes == ("n01440764", "n02119789")
    assert [len(split) for split in (data.train, data.search, data.test)] == [6, 2, 8]
    os.rename(tmp_path / "train/n01440764", tmp_path / "train/tench")
    os.rename(tmp_path / "val/n01440764", tmp_path / "val/tench")
    with pytest.raises(CompressorError, match="no WordNet ids, such as 'tench'"):
        load_data(f"imagenet:{tmp_path}", seed=0)


def test_classes_that_only_the_test_has_are_noted(tmp_path: Path) -> None:
    """A few photographs are enough to compensate on, and they need not be of every class."""
    for split, names in (("train", ("n01440764", "n02119789")), ("val", ("n01440764", "n02119789", "n03000000"))):
        for name in names:
            for index in range(4):
                write_image(tmp_path / split / name / f"{index}.jpg", index, (60, 50))
    (tmp_path / "train/n03000000").mkdir()
    data = load_data(f"imagenet:{tmp_path}", seed=0, image_size=32)
    assert data.test.labels.unique().tolist() == [0, 1, 2]
    assert any("train has no images of 1 classes that" in note for note in data.notes)


def test_photographs(shared_data: Path, tmp_path: Path) -> None:
    """Real photographs of many shapes and one image a class, as they come out of an archive."""
    import tarfile

    with tarfile.open(shared_data / "imagenet-1k-sample160.tar") as archive:
        members = archive.getmembers()
        archive.extractall(tmp_path, members=[m for m in members if m.isfile()][:60], **SAFELY)
    data = load_data(f"folder:{tmp_path}", seed=0, image_size=128)
    assert data.num_classes == 60
    assert [len(split) for split in (data.train, data.search, data.test)] == [43, 5, 12]
    assert any("single image" in note for note in data.notes)
    images, _ = next(iter(data.train.batches(16, shuffle_seed=0, augment=True)))
    assert -2.2 < images.mean() < 2.2
    assert 0.5 < images.std() < 2


def test_small_jpegs_are_read_at_their_own_size(cifar_jpegs: Path) -> None:
    data = load_data(f"folder:{cifar_jpegs}", seed=0)
    assert data.input_shape == (3, 32, 32)
    assert [len(split) for split in (data.train, data.search, data.test)] == [360, 40, 2000]
    assert data.classes[:3] == ("airplane", "automobile", "bird")
