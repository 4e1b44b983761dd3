"""How images are prepared: what weights and users say of it, and where it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compressor import CompressorError, Recipe
from compressor.cli.flags import overrides, recipe_of, with_settings
from compressor.data import FileSplit, MemorySplit, Preprocessing, Wanted, load_data
from compressor.data.augment import Augmentation, augmentation_for
from compressor.data.images import ImageFile, decode
from compressor.models import create_model, published
from compressor.recipe import load_recipe
from compressor.run.load import described, load

MINIMAL = "timm:tf_mobilenetv3_small_minimal_100"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Two classes of 6 training and 2 test images of 80x70."""
    for part, count in (("train", 6), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (80, 70), (index, 90, 200)).save(
                    tmp_path / "data" / part / name / f"{index}.png"
                )
    return f"folder:{tmp_path / 'data'}"


@pytest.mark.parametrize(
    ("name", "size", "resized", "mean", "interpolation", "accuracy"),
    [
        ("timm:tf_efficientnet_lite0", 224, 256, 0.5, "bicubic", None),
        ("timm:resnet50.a1_in1k", 224, 235, 0.485, "bicubic", None),
        ("resnet50", 224, 232, 0.485, "bilinear", 0.80858),
        ("efficientnet_b1", 240, 255, 0.485, "bilinear", 0.79838),
        ("inception_v3", 299, 342, 0.485, "bilinear", 0.77294),
        ("squeezenet1_1", 224, 256, 0.485, "bilinear", 0.58178),
    ],
)
def test_what_libraries_publish(
    name: str, size: int, resized: int, mean: float, interpolation: str, accuracy: float | None
) -> None:
    known = published(name)
    assert known is not None
    mine = Preprocessing(**known.preprocessing)
    assert (mine.size, mine.resize_size, mine.mean[0], mine.interpolation) == (
        size,
        resized,
        mean,
        interpolation,
    )
    assert known.accuracy == (None if accuracy is None else pytest.approx(accuracy))


def test_our_networks_and_the_users_have_none() -> None:
    assert published("cifar_resnet20") is None
    assert published("tests.nets:tiny") is None


def test_a_file_of_weights_is_fed_as_its_architecture_was(folder: str, tmp_path: Path) -> None:
    torch.save(create_model(MINIMAL, 2).state_dict(), tmp_path / "net.pt")
    fields = {"model": MINIMAL, "weights": str(tmp_path / "net.pt"), "data": folder, "image_size": 128}
    loaded = load(Recipe.model_validate(fields).resolved())
    data = loaded.recipe.data
    assert data.mean == data.std == (0.5, 0.5, 0.5)
    assert (data.interpolation, data.crop_share, data.channel_order) == ("bilinear", 0.875, "rgb")
    assert any("net.pt does not say" in note and "mean 0.5, 0.5, 0.5" in note for note in loaded.notes)
    images, _ = next(iter(loaded.task.search.batches(1)))
    assert images[0, 2].mean() == pytest.approx((200 / 255 - 0.5) / 0.5, abs=1e-5)
    assert described(loaded.recipe, loaded.task.preprocessing)["origin"].startswith("timm's pretrained_cfg")
    (tmp_path / "recipe.yaml").write_text(loaded.recipe.to_yaml())
    again = load(load_recipe(tmp_path / "recipe.yaml"))
    assert (again.recipe, again.notes) == (loaded.recipe, loaded.notes)


def test_the_user_has_the_last_word(folder: str, tmp_path: Path) -> None:
    torch.save(create_model(MINIMAL, 2).state_dict(), tmp_path / "net.pt")
    flags: dict[str, Any] = {"model": MINIMAL, "weights": str(tmp_path / "net.pt"), "image_size": 128}
    given = overrides({**flags, "data": {"source": folder, "mean": "0.4,0.5,0.6", "std": None}})
    settings = ["data.std=0.25", "data.interpolation=bicubic", "data.crop_share=1", "data.channel_order=bgr"]
    loaded = load(recipe_of(None, with_settings(given, settings)).resolved())
    mine = loaded.task.preprocessing
    assert (mine.mean, mine.std, mine.resize_size) == ((0.4, 0.5, 0.6), (0.25, 0.25, 0.25), 128)
    assert not loaded.notes
    images, _ = next(iter(loaded.task.test.batches(1)))
    assert images[0, 0].mean() == pytest.approx((200 / 255 - 0.4) / 0.25, abs=1e-5)  # blue comes first
    origin = described(loaded.recipe, mine)["origin"]
    assert "mean, std, crop_share, interpolation" in origin
    assert "set by the recipe" in origin


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.mean=123.7,116.3,103.5", "data.range=255"),
        ("data.std=0,1,1", "above 0"),
        ("data.mean=a,b,c", "valid number"),
        ("data.interpolation=cubic", "bicubic"),
        ("data.crop_share=1.5", "less than or equal to 1"),
        ("data.mena=0.5", "did you mean mean"),
    ],
)
def test_what_is_no_preprocessing(setting: str, words: str) -> None:
    with pytest.raises(CompressorError, match=words):
        recipe_of(None, with_settings({"model": "resnet18"}, [setting]))


def test_a_number_for_each_channel() -> None:
    with pytest.raises(CompressorError, match=r"data\.mean has 2 numbers, but the network takes images of 3"):
        Wanted(mean=(0.5, 0.5)).at(32)


def test_ranges_and_orders_say_the_same_in_other_numbers() -> None:
    images = torch.arange(3 * 4, dtype=torch.uint8).view(1, 3, 2, 2) * 20
    usual = Preprocessing(size=2)
    torch.testing.assert_close(usual.scaled(255).normalised(images), usual.normalised(images))
    torch.testing.assert_close(usual.ordered("bgr").normalised(images), usual.normalised(images).flip(1))
    assert Preprocessing.from_dict(usual.to_dict()) == usual


def test_digits_keep_what_they_have() -> None:
    loaded = load(Recipe.model_validate({"model": "tests.nets:tiny"}).resolved())
    assert loaded.task.preprocessing == Preprocessing(size=32, crop_share=1.0)
    assert not any("does not say" in note for note in loaded.notes)
    with pytest.raises(CompressorError, match="not cropped"):
        load(Recipe.model_validate({"model": "tests.nets:tiny", "data": {"crop_share": 0.5}}).resolved())


def test_random_crops_are_scaled_as_for_scoring() -> None:
    crops = augmentation_for(Preprocessing(size=224, interpolation="bicubic"))
    assert (crops.interpolation, crops.smallest_crop) == ("bicubic", 0.08)
    sharp = (torch.rand(4, 3, 100, 100, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    one, other = (
        Augmentation(smallest_crop=0.35, interpolation=name).cropped(sharp, 0).float()
        for name in ("bicubic", "bilinear")
    )
    assert one.std() > other.std()


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_sample_is_spread_over_the_classes_from_its_beginning(on_disk: bool) -> None:
    labels = torch.arange(10).repeat_interleave(100)  # stored class by class, as folders are
    split: MemorySplit | FileSplit
    if on_disk:
        split = FileSplit([ImageFile(str(i), int(label)) for i, label in enumerate(labels)], Preprocessing())
    else:
        split = MemorySplit(torch.zeros(1000, 1, 1, 1, dtype=torch.uint8), labels, Preprocessing())
    drawn = split.sample(256, seed=3).labels
    assert set(drawn.bincount(minlength=10).tolist()) == {25, 26}
    for length in (10, 32, 64):
        counts = drawn[:length].bincount(minlength=10)
        assert counts.min() >= length // 10 - 1
        assert counts.max() <= length // 10 + 1
    assert torch.equal(split.sample(256, seed=3).labels, drawn)
    assert not torch.equal(split.sample(256, seed=4).labels, drawn)
    assert len(split.sample(5000)) == 1000


def test_a_sample_keeps_the_shares_of_classes_and_draws_each_image_once() -> None:
    labels = torch.tensor([0] * 900 + [1] * 100)
    images = torch.from_numpy(np.arange(1000) % 256).to(torch.uint8).view(-1, 1, 1, 1)
    split = MemorySplit(images, labels, Preprocessing())
    assert split.sample(100).labels.bincount().tolist() == [90, 10]
    assert split.sample(1000).images.flatten().bincount().equal(images.flatten().bincount())


def test_inputs_that_are_not_square(tmp_path: Path) -> None:
    prepared = Wanted().at("96x128")
    assert (prepared.input_shape, prepared.image_size) == ((3, 96, 128), "96x128")
    assert Preprocessing.from_dict(prepared.to_dict()) == prepared
    assert "cover 109x146 pixels (bilinear) and cut to 96x128" in prepared.describe()
    Image.linear_gradient("L").resize((400, 200)).save(tmp_path / "wide.png")  # dark above, bright below
    wide = decode(str(tmp_path / "wide.png"), prepared)
    assert wide is not None
    assert wide.shape == (3, 96, 128)
    assert int(wide[0, 0].float().mean()) == pytest.approx(255 * (1 - 96 / 109) / 2, abs=4)  # what is cut above
    Image.linear_gradient("L").resize((100, 300)).save(tmp_path / "high.png")
    high = decode(str(tmp_path / "high.png"), prepared)
    assert high is not None
    assert high.shape == (3, 96, 128)
    assert "width" not in Wanted().at(96).to_dict()
    assert load_data("digits", seed=0, image_size="16x24").input_shape == (3, 16, 24)


@pytest.mark.parametrize(("text", "size"), [("96x128", "96x128"), ("96", 96)])
def test_the_size_as_a_flag(text: str, size: int | str) -> None:
    assert recipe_of(None, overrides({"model": "resnet18", "image_size": text})).image_size == size
    with pytest.raises(CompressorError, match="image_size"):
        recipe_of(None, overrides({"model": "resnet18", "image_size": "96x"}))
