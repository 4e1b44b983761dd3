"""Splits: disjoint, seeded, balanced; batches and their augmentation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.core.errors import CompressorError
from compressor.data import MemorySplit, load_data
from compressor.data.augment import Augmentation
from compressor.data.images import ImageFile
from compressor.data.splits import SPLITS, hold_out, split_files
from tests.data.decoding import images_of


def test_digits_are_split_into_three_disjoint_parts() -> None:
    data = load_data("digits", seed=0)
    sizes = [len(split) for split in (data.train, data.search, data.test)]
    assert sizes == [1295, 143, 359]
    assert sum(sizes) == 1797
    train, search, test = images_of(data)
    assert (len(train), len(search), len(test)) == (1295, 143, 359)
    assert train.isdisjoint(search | test)
    assert search.isdisjoint(test)
    assert data.input_shape == (3, 32, 32)
    assert data.classes == tuple("0123456789")
    assert data.search.labels.bincount().tolist() == [14, 15, 14, 15, 14, 15, 14, 14, 14, 14]
    assert any("digits" in note for note in data.notes)


def test_the_seed_moves_the_search_split_and_never_the_test_split() -> None:
    one, again, other = (images_of(load_data("digits", seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert one[1] != other[1]
    assert one[2] == other[2]


def test_digits_look_like_digits() -> None:
    """scikit-learn's first image is a zero whose grey values run from 0 to 15 of 16."""
    data = load_data("digits", seed=0, image_size=8)
    split = data.test
    assert isinstance(split, MemorySplit)
    assert split.images.shape[1:] == (3, 8, 8)
    assert torch.equal(split.images[:, 0], split.images[:, 2])
    assert split.images.max() == 255
    assert int(split.images[0, 0, 0, 0]) == 0


def test_hold_out_is_stratified_and_bounded() -> None:
    labels = [0] * 50 + [1] * 30 + [2] * 20 + [3] * 2
    kept, held = hold_out(labels, 0.1, None, seed=0)
    assert np.bincount(np.array(labels)[held]).tolist() == [5, 3, 2, 1]
    assert sorted([*kept, *held]) == list(range(102))
    _, few = hold_out([0] * 500 + [1] * 500, 0.5, 100, seed=0)
    assert len(few) == 100


def test_splits_are_known_by_the_names_and_labels_of_their_files(tmp_path: Path) -> None:
    """The digest of two files, by hand; the place of the folder does not count."""
    for folder in (tmp_path / "here", tmp_path / "there"):
        train = [ImageFile(f"{folder}/a/0.png", 0), ImageFile(f"{folder}/b/0.png", 1)]
        found = split_files((train, [], train[:1]), folder)
        assert [found[name].images for name in SPLITS] == [2, 0, 1]
        assert found["train"].sha256 == hashlib.sha256(b"a/0.png\0000\000b/0.png\0001\000").hexdigest()
        assert found["test"].sha256 == hashlib.sha256(b"a/0.png\0000\000").hexdigest()


def test_order_and_augmentation_follow_from_the_seed() -> None:
    data = load_data("digits", seed=0)

    def epoch(seed: int | None, augment: bool = True) -> torch.Tensor:
        return torch.cat([images for images, _ in data.train.batches(64, shuffle_seed=seed, augment=augment)])

    torch.manual_seed(0)
    one = epoch(5)
    torch.manual_seed(1)
    assert torch.equal(one, epoch(5))
    assert not torch.equal(one, epoch(6))
    assert not torch.equal(one, epoch(5, augment=False))
    assert len(one) == 1295
    with pytest.raises(ValueError, match="shuffle_seed"):
        epoch(None)


def test_batches_leave_no_rest_where_asked_and_share_out_among_processes() -> None:
    data = load_data("digits", seed=0)
    sizes = [len(labels) for _, labels in data.train.batches(64, shuffle_seed=1, drop_last=True)]
    assert sizes == [64] * 20
    whole = [labels for _, labels in data.train.batches(64, shuffle_seed=1, drop_last=True)]
    parts = [
        [labels for _, labels in data.train.batches(64, shuffle_seed=1, drop_last=True, shard=(rank, 2))]
        for rank in range(2)
    ]
    assert [len(part) for part in parts] == [20, 20]
    for common, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([first, second]).sort().values, common.sort().values)


def test_shifts_move_images_by_whole_pixels() -> None:
    images = torch.zeros(200, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 255
    moved = Augmentation(shift=2).moved(images, torch.Generator().manual_seed(0))
    assert (moved.flatten(1).sum(1) == 255).all()
    places = {divmod(int(place), 9) for place in moved.flatten(1).argmax(1)}
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}
    assert int(images[0, 0, 4, 4]) == 255


def test_flips_mirror_about_half() -> None:
    images = torch.arange(4, dtype=torch.uint8).repeat(1000, 1, 1, 1)
    flipped = Augmentation(flip=True).moved(images, torch.Generator().manual_seed(0))
    mirrored = (flipped[:, 0, 0, 0] == 3).sum().item()
    assert 440 < mirrored < 560
    assert torch.equal(
        flipped[flipped[:, 0, 0, 0] == 3][0, 0, 0], torch.tensor([3, 2, 1, 0], dtype=torch.uint8)
    )


def test_crops_keep_constant_images_and_enlarge_others() -> None:
    constant = torch.full((8, 3, 100, 100), 77, dtype=torch.uint8)
    crop = Augmentation(smallest_crop=0.35)
    assert torch.equal(crop.cropped(constant, 0), constant)
    ramp = torch.linspace(0, 250, 100).to(torch.uint8).expand(32, 1, 100, 100)
    crops = crop.cropped(ramp, 0).float()
    spans = crops.amax(dim=(1, 2, 3)) - crops.amin(dim=(1, 2, 3))
    assert 100 < spans.min() < spans.max() < 251


def test_cifar_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from urllib.error import URLError

    def offline(*args: Any, **kwargs: Any) -> Any:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for folder in (tmp_path, tmp_path / "no" / "such"):
        with pytest.raises(CompressorError, match="cannot be downloaded") as caught:
            load_data(f"cifar10:{folder}", seed=0)
        assert "cifar-10-python.tar.gz" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_cifar_from_its_own_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Stub:
        base_folder, filename = "stub", "stub.tar.gz"

        def __init__(self, root: str, train: bool, download: bool) -> None:
            count = 200 if train else 40
            self.data = np.random.default_rng(train).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            self.targets = [index % 10 for index in range(count)]
            self.classes = [f"class {index}" for index in range(10)]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Stub)
    data = load_data(f"cifar10:{tmp_path}", seed=0)
    assert [len(split) for split in (data.train, data.search, data.test)] == [180, 20, 40]
    assert load_data(f"cifar10:{tmp_path}", seed=0, image_size=64).input_shape == (3, 64, 64)
