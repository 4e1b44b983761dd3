"""Random crops of whole pictures, and the processes that read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compressor.data import FileSplit, MemorySplit, load_data
from compressor.data.augment import Augmentation, augmentation_for
from compressor.data.images import whole_picture
from compressor.data.preprocessing import Preprocessing
from compressor.data.reader import keys_of

SIZE = 100
BLUE = 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of pictures of 240x120 pixels: gray where the centre crop is, blue left and right of it."""
    for part, count in (("train", 12), ("test", 2)):
        for name, gray in (("a", 80), ("b", 120)):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((120, 240, 3), gray + number, dtype=np.uint8)
                pixels[:, :60] = pixels[:, 180:] = (0, 0, 255)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number:02}.png")
    return tmp_path


def epoch(split: FileSplit, seed: int = 3, skip: int = 0) -> list[torch.Tensor]:
    return [images for images, _ in split.batches(4, shuffle_seed=seed, augment=True, skip=skip)]


def train_split(folder: Path, workers: int = 0) -> FileSplit:
    split = load_data(f"folder:{folder}", seed=0, image_size=SIZE, workers=workers).train
    assert isinstance(split, FileSplit)
    return split


def test_crops_come_out_of_the_whole_picture(folder: Path) -> None:
    """What is scored is cut out of the middle, which has no blue pixel; most of what is trained on has some."""
    split = train_split(folder)
    assert isinstance(split.in_memory(), MemorySplit)
    middle = torch.cat([images for images, _ in split.batches(4)])
    blue = (255 / 255 - 0.406) / 0.225
    assert middle[:, BLUE].max() < blue - 1
    crops = torch.cat([images for seed in range(4) for images in epoch(split, seed)])
    assert crops.shape[1:] == (3, SIZE, SIZE)
    with_blue = (crops[:, BLUE].flatten(1).max(1).values > blue - 0.01).float().mean()
    assert 0.5 < with_blue <= 1


def test_a_crop_has_the_share_and_the_shape_that_are_asked_for() -> None:
    """Of a picture whose red tells the column and whose green tells the row; scaled with the preprocessing's filter."""
    columns, rows = np.meshgrid(np.arange(200), np.arange(100))
    picture = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))
    change = Augmentation(smallest_crop=0.08)
    shares, ratios = [], []
    for seed in range(200):
        crop = change.crop(picture, (64, 64), seed).float()
        wide, high = (float(crop[channel].max() - crop[channel].min()) + 1 for channel in (0, 1))
        shares.append(wide * high / 20_000)
        ratios.append(wide / high)
    assert 0.06 < min(shares) < 0.12
    assert 0.6 < max(shares) < 0.7  # 4:3 in a picture of 2:1
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.4
    nearest = Augmentation(smallest_crop=0.08, interpolation="nearest")
    values = nearest.crop(Image.fromarray(np.eye(64, dtype=np.uint8) * 255), (32, 32), 0)
    assert set(values.unique().tolist()) <= {0, 255}


def test_large_photographs_are_cropped_as_timm_and_torchvision_do() -> None:
    change = augmentation_for(Preprocessing(interpolation="bicubic"))
    assert (change.smallest_crop, change.flip, change.interpolation, change.shift) == (0.08, True, "bicubic", 0)
    assert augmentation_for(Preprocessing(size=32)) == Augmentation(shift=4, flip=True)


def test_a_large_jpeg_is_decoded_as_far_as_the_smallest_crop_needs(tmp_path: Path) -> None:
    change = Augmentation(smallest_crop=0.48)
    assert change.largest_needed(30) == 100  # the crop's shortest side is then 60
    Image.new("RGB", (400, 800)).save(tmp_path / "large.jpg")
    picture = whole_picture(str(tmp_path / "large.jpg"), Preprocessing(size=30), change.largest_needed(30))
    assert picture is not None
    assert picture.size == (100, 200)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_follow_from_the_seed_whoever_reads_them(folder: Path, workers: int) -> None:
    expected, split = epoch(train_split(folder)), train_split(folder, workers)
    random = torch.get_rng_state()
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(epoch(split), expected, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    rest = epoch(split, skip=2)
    assert all(torch.equal(one, other) for one, other in zip(rest, expected[2:], strict=True))
    assert not torch.equal(epoch(split, seed=4)[0], expected[0])


def test_processes_stay_from_one_epoch_to_the_next(folder: Path) -> None:
    import multiprocessing

    split = train_split(folder, workers=2)
    before = set(multiprocessing.active_children())
    next(iter(split.batches(4, shuffle_seed=1, augment=True)))  # an epoch that is left early
    workers = {each.pid for each in set(multiprocessing.active_children()) - before}
    assert len(workers) == 2
    assert len(epoch(split, seed=2)) == 6
    assert {each.pid for each in set(multiprocessing.active_children()) - before} == workers
    del split
    import gc

    gc.collect()
    assert not workers & {each.pid for each in multiprocessing.active_children()}


def test_skipped_batches_of_images_in_memory_change_nothing() -> None:
    train = load_data("digits", seed=0, image_size=16).train.sample(192)
    train.augmentation = Augmentation(shift=1, flip=True, random_erasing=0.5, rand_augment=9)
    whole = [images for images, _ in train.batches(32, shuffle_seed=1, augment=True)]
    rest = [images for images, _ in train.batches(32, shuffle_seed=1, augment=True, skip=3)]
    assert len(whole) == len(rest) + 3 == 6
    assert all(torch.equal(one, other) for one, other in zip(whole[3:], rest, strict=True))


def test_the_keys_of_an_epoch() -> None:
    order = torch.tensor([4, 2, 0, 1, 3])
    assert list(keys_of(order, 2, None)) == [[(4, None), (2, None)], [(0, None), (1, None)], [(3, None)]]
    assert list(keys_of(order, 2, 1, skip=1)) == [[(0, 1_000_005), (1, 1_000_006)], [(3, 1_000_007)]]


def test_erased_rectangles_have_the_mean_color() -> None:
    """Between 2 and 33 % of the area, in about the given share of the images."""
    split = MemorySplit(
        torch.full((400, 3, 32, 32), 255, dtype=torch.uint8),
        torch.zeros(400, dtype=torch.int64),
        Preprocessing(size=32),
        Augmentation(random_erasing=0.25),
    )
    ((images, _),) = split.batches(400, shuffle_seed=0, augment=True)
    erased = (images == 0).all(1).flatten(1).float().mean(1)
    assert 0.17 < (erased > 0).float().mean() < 0.33
    assert erased.max() < 0.36
    assert erased[erased > 0].min() > 0.01
    ((plain, _),) = split.batches(400)
    assert (plain != 0).all()


def test_rand_augment_changes_images_by_its_magnitude() -> None:
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def distance(magnitude: int) -> float:
        changed = Augmentation(rand_augment=magnitude).varied(images, 0)
        assert changed.dtype == torch.uint8
        return float((changed.float() - images.float()).abs().mean())

    assert 0 == distance(0) < distance(2) < distance(25)
