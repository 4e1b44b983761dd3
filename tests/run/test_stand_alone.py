"""A run's folder works from anywhere: repeated, resumed and exported, with and without its data."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from compressor.cli.app import app
from compressor.core.files import sha256_file
from compressor.data import load_data
from compressor.recipe import Recipe
from tests.runs import manifest_of

COMMAND = [
    "--model", "tests.nets:tiny", "--data", "folder:photos", "--weights", "tiny.pt", "--params", "60%", "--epochs", "0",
    "--agent", "uniform", "--accept-dense", "--set", "search.max_evaluations=2", "--set", "contract.repeats=1",
    "--set", "contract.seconds=5", "--set", "export.engine=false",
]  # fmt: skip


def command(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and weights, and a run that was started there with relative paths."""
    import torch

    from tests.nets import tiny

    folder = tmp_path_factory.mktemp("place")
    digits: Any = load_data("digits", seed=0)
    for part, split in (("train", digits.train), ("test", digits.test)):
        for index in range(60):
            where = folder / "photos" / part / str(int(split.labels[index]) % 4)
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.images[index].permute(1, 2, 0).numpy()).save(where / f"{index}.png")
    torch.manual_seed(0)
    torch.save(tiny(4).state_dict(), folder / "tiny.pt")
    before = Path.cwd()
    os.chdir(folder)
    try:
        command(*COMMAND, "--out", "run")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def moved(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run in another folder, from which commands are called."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(place / "run", tmp_path / "elsewhere" / "run"))


def test_the_recipe_repeats_the_run_from_its_own_folder(
    place: Path, moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(moved)
    command("--recipe", "recipe.yaml")  # as the report says
    (again,) = (each for each in moved.parent.iterdir() if each != moved)  # beside the run, not within it
    first, second = manifest_of(place / "run"), manifest_of(again)
    assert second["accuracy"] == first["accuracy"]
    assert second["files"]["model.safetensors"] == first["files"]["model.safetensors"]
    assert first["data"] == f"folder:{place / 'photos'}"


def test_it_is_resumed_and_exported_from_any_folder(place: Path, moved: Path) -> None:
    before = sha256_file(moved / "model.onnx")
    command("--resume", "elsewhere/run")
    command("--resume", "elsewhere/run", "--weights", place / "tiny.pt")
    assert "started with another recipe" in command("--resume", moved, "--weights", "tiny.pt", code=2)
    command("export", moved, "--precision", "fp16")
    assert manifest_of(moved)["exports"]["fp16"]["images"] == 60
    assert sha256_file(moved / "model.onnx") == before


def test_a_run_of_an_earlier_version_with_relative_paths_is_resumed(
    place: Path, moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("recipe.yaml", "manifest.json"):
        text = (moved / name).read_text()
        assert str(place) in text
        (moved / name).write_text(text.replace(f"{place}/", ""))
    monkeypatch.chdir(place)
    command("--resume", moved)


def test_only_scores_need_the_data(moved: Path, tmp_path: Path) -> None:
    text = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(text.replace("/photos", "/gone"))
    for options in (["--format", "pt2"], ["--batch", "4"]):
        assert "/gone is not here: files are compared on random inputs" in command("export", moved, *options)
    command("export", moved, "--target", "jetson-nano", "--bundle", "nano.tar.gz")
    exports = manifest_of(moved)["exports"]
    assert exports["batch4"]["parity"]["max_abs"] < 1e-4
    assert exports["batch4"]["accuracy"] is None
    assert "gone does not exist" in command("export", moved, "--precision", "int8", code=2)
    assert json.loads((moved / "preprocess.json").read_text())["scored"]["inputs"] == 60


def test_paths_begin_at_the_folder_of_the_call() -> None:
    base = Path("/here")
    recipe = Recipe.model_validate({"model": "resnet18", "data": "folder:a/b", "weights": "../w.pt"}).placed(base)
    assert (recipe.data.source, recipe.weights) == ("folder:/here/a/b", "/here/../w.pt")
    for data, weights in (("digits", "none"), ("cifar10", "default"), ("imagenet:/data", "/w.pt")):
        recipe = Recipe.model_validate({"model": "resnet18", "data": data, "weights": weights})
        assert recipe.placed(base) is recipe or recipe.placed(base) == recipe
    home = Recipe.model_validate({"model": "resnet18", "data": "images:~/photos"}).placed(base)
    assert home.data.source == f"images:{Path.home()}/photos"
