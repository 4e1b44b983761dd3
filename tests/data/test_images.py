"""What image files hold besides 8-bit colour: more bits, floats, orientation, transparency, inks; and grey networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from compressor import CompressorError, Recipe
from compressor.data import load_data
from compressor.data.images import decode
from compressor.data.masks import picture_size
from compressor.data.preprocessing import Preprocessing
from compressor.models import create_model, input_channels
from compressor.run.load import load

RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)


def decoded(path: Path, wanted: Any = 32) -> torch.Tensor:
    image = decode(str(path), wanted)
    assert image is not None
    return image


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("g16.png", RAMP.astype(np.uint16)),
        ("g16.tif", RAMP.astype(np.uint16)),
        ("big.tif", RAMP.astype(">u2")),
        ("g16.pgm", RAMP.astype(np.int32)),
        ("f32.tif", (RAMP / 65535).astype(np.float32)),
    ],
)
def test_more_than_8_bits_are_scaled_to_8(name: str, values: Any, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / name)
    image = decoded(tmp_path / name)
    expected = torch.from_numpy((RAMP / 257).round())
    assert image.shape == (3, 32, 32)
    assert (image.double() - expected).abs().max() <= 1
    assert (image == 255).float().mean() == pytest.approx(4 / 1024)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (RAMP.astype(np.float32), "floats from 0 to 65535"),
        (np.full((32, 32), np.nan, dtype=np.float32), "floats"),
        ((RAMP * 1000).astype(np.int32), "32-bit integers"),
    ],
)
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_values_of_no_known_range_are_refused(values: Any, words: str, tmp_path: Path) -> None:
    for part in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / part).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(values).save(tmp_path / part / f"{index}.tif")
    with pytest.raises(CompressorError, match=words) as caught:
        load_data(f"folder:{tmp_path}", seed=0)
    assert "0.tif" in caught.value.message
    assert "8" in caught.value.hint


def test_cameras_orientation_is_applied_before_anything_is_cut(tmp_path: Path) -> None:
    """Stored lying, as a phone does: the top of the scene is the left of the stored picture."""
    stored = np.zeros((32, 64, 3), dtype=np.uint8)
    stored[:, :32] = 255
    picture = Image.fromarray(stored)
    exif = picture.getexif()
    exif[274] = 6  # turn it a quarter clockwise to see it
    picture.save(tmp_path / "phone.png", exif=exif)
    upright = decoded(tmp_path / "phone.png")  # 32 of 64 rows from the middle: white above, black below
    assert upright[:, :16].float().mean() == 255
    assert upright[:, 16:].float().mean() == 0


@pytest.mark.parametrize("suffix", ["tif", "png", "jpg"])
def test_the_size_of_a_turned_picture(suffix: str, tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((32, 64, 3), dtype=np.uint8))
    for orientation, size in ((1, (64, 32)), (3, (64, 32)), (6, (32, 64))):
        exif = Image.Exif()
        exif[274] = orientation
        picture.save(tmp_path / f"phone.{suffix}", exif=exif)
        assert picture_size(str(tmp_path / f"phone.{suffix}")) == size


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    red = np.zeros((32, 32, 4), dtype=np.uint8)
    red[..., 0], red[:16, :, 3] = 255, 255
    Image.fromarray(red).save(tmp_path / "rgba.png")
    grey = np.zeros((32, 32, 2), dtype=np.uint8)
    grey[:16, :, 1] = 255
    Image.fromarray(grey, "LA").save(tmp_path / "la.png")
    palette = Image.fromarray((np.arange(32 * 32).reshape(32, 32) >= 512).astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "palette.png", transparency=1)
    for name, above in (("rgba.png", [255, 0, 0]), ("la.png", [0, 0, 0]), ("palette.png", [0, 0, 0])):
        image = decoded(tmp_path / name)
        assert image[:, 5, 5].tolist() == above, name
        assert image[:, 20, 5].tolist() == [255, 255, 255], name


def test_inks_and_single_bits_keep_their_colours(tmp_path: Path) -> None:
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "ink.tif")
    assert decoded(tmp_path / "ink.tif")[:, 3, 3].tolist() == [255, 0, 0]
    Image.fromarray(RAMP > 30000).save(tmp_path / "bits.png")
    assert set(decoded(tmp_path / "bits.png").unique().tolist()) == {0, 255}


def folder_of(path: Path, mode: str = "RGB") -> str:
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for name in ("a", "b", "c"):
            (path / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(path / part / name / f"{index}.png")
    return f"folder:{path}"


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def test_an_empty_class_is_said_and_keeps_its_place(tmp_path: Path) -> None:
    source = folder_of(tmp_path)
    emptied(tmp_path / "test/b")
    data = load_data(source, seed=0)
    assert data.classes == ("a", "b", "c")
    assert data.test.labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert any("test has classes without images: b" in note for note in data.notes)
    emptied(tmp_path / "train/b")
    data = load_data(source, seed=0)
    assert data.classes == ("a", "b", "c")
    assert set(data.train.labels.tolist()) == {0, 2}
    Image.new("RGB", (16, 16)).save(tmp_path / "test/b/0.png")
    with pytest.raises(CompressorError, match=r"train/b holds no images, but .*test/b has 1"):
        load_data(source, seed=0)


class Grey(nn.Module):
    """A network for images of one channel."""

    def __init__(self, num_classes: int = 3, channels: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


class FourChannels(Grey):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(num_classes, 4)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_grey_network_gets_grey_images(mode: str, tmp_path: Path) -> None:
    source = folder_of(tmp_path, mode)
    recipe = Recipe.model_validate({"model": f"{__name__}:Grey", "weights": "none", "data": source})
    loaded = load(recipe.resolved())
    assert loaded.task.preprocessing.input_shape == (1, 16, 16)
    assert loaded.recipe.data.channel_order == "grey"
    assert loaded.recipe.data.mean == pytest.approx((0.449,))
    images, _ = next(iter(loaded.task.test.batches(2)))
    pixels = np.asarray(Image.open(tmp_path / "test/a/0.png").convert("L"), dtype=np.float64)
    assert np.abs(images[0, 0].numpy() - (pixels / 255 - 0.449) / 0.226).max() <= 1 / 255 / 0.226 + 1e-6
    again = load(loaded.recipe)  # as a resumed run has it
    assert again.recipe == loaded.recipe
    assert again.task.test.preprocessing == loaded.task.test.preprocessing


def test_other_channels_are_said_to_be_that() -> None:
    with pytest.raises(CompressorError, match="first convolution takes 4 channels"):
        create_model(f"{__name__}:FourChannels", 3, "none", (3, 16, 16))
    assert input_channels(Grey(), (3, 16, 16)) == 1
    assert input_channels(Grey(channels=3), (1, 16, 16)) == 3


def test_grey_that_was_asked_for_needs_a_grey_network(tmp_path: Path) -> None:
    fields = {"source": folder_of(tmp_path), "channel_order": "grey"}
    recipe = Recipe.model_validate({"model": "tests.nets:tiny", "weights": "none", "data": fields})
    with pytest.raises(CompressorError, match=r"takes images of 3 channels, but data\.channel_order is grey"):
        load(recipe.resolved())


def test_files_are_cut_as_torchvision_and_timm_do_it(tmp_path: Path) -> None:
    from timm.data import create_transform
    from torchvision.models import get_model_weights

    from compressor.models import published

    pixels = np.random.default_rng(0).integers(0, 256, (171, 260, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "0.png")
    theirs = {
        "mobilenet_v2": get_model_weights("mobilenet_v2").DEFAULT.transforms(),
        "efficientnet_b1": get_model_weights("efficientnet_b1").DEFAULT.transforms(),
        "timm:tf_efficientnet_lite0": create_transform(
            224, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
        ),
    }
    for name, transform in theirs.items():
        known = published(name)
        assert known is not None
        mine = Preprocessing(**known.preprocessing)
        image = mine.normalised(decoded(tmp_path / "0.png", mine)[None])[0]
        torch.testing.assert_close(image, transform(picture), rtol=0, atol=1e-5)
