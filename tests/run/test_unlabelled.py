"""Runs on pictures without labels: the dense network is teacher and judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import CompressorError, RunResult, run_recipe
from compressor.data import load_data
from compressor.models import usual_classes
from compressor.run.exports import Request, export_format
from compressor.run.pipeline import resume
from tests.nets import trained_tiny
from tests.runs import manifest_of, recipe


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 digits in folders that mean nothing."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    images: Any = load_data("digits", seed=0).train
    for place, image in enumerate(images.images[:120]):
        (folder / "some" / f"{place % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"some/{place % 3}/{place}.png")
    (folder / "some/readme.txt").write_text("no picture")
    return folder


def wanted(pictures: Path, **fields: Any) -> Any:
    base = {
        "model": "tests.nets:trained_tiny", "data": f"images:{pictures}", "agent": "uniform", "image_size": None,
        "budgets": {"params": "60%"}, "epochs": 0, "search": {"max_evaluations": 2},
    }  # fmt: skip
    return recipe(**{**base, **fields})


@pytest.fixture(scope="module")
def unlabelled(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run_recipe(wanted(pictures, epochs=1), tmp_path_factory.mktemp("unlabelled") / "run")


def test_the_dense_network_judges(unlabelled: RunResult, pictures: Path) -> None:
    assert unlabelled.exit_code == 0
    found = unlabelled.manifest["accuracy"]
    assert (found["metric"], found["dense"], found["images"]) == ("agreement with the dense network", 1.0, 24)
    data, dense = load_data(f"images:{pictures}", seed=0), trained_tiny()
    with torch.no_grad():
        same = [
            (unlabelled.model(x).argmax(1) == dense(x).argmax(1)).float().mean() for x, _ in data.test.batches(24)
        ]
    assert found["finetuned"] == pytest.approx(float(same[0]))
    assert found["exported"] == pytest.approx(found["finetuned"], abs=0.05)
    assert [each["phase"] for each in unlabelled.manifest["training"]] == ["finetune"]
    assert unlabelled.manifest["recipe"]["search"]["measure"] == "closeness"
    assert (unlabelled.directory / "labels.txt").read_text().split() == [str(number) for number in range(10)]


def test_the_page_speaks_of_agreement(unlabelled: RunResult) -> None:
    page = (unlabelled.directory / "report.html").read_text(encoding="utf-8")
    assert "Agreement with the dense network" in page
    assert "without labels" in page
    assert "ccuracy" not in page


def test_int8_is_judged_by_the_same_agreement(unlabelled: RunResult) -> None:
    lines = list(export_format(unlabelled.directory, Request(precision="int8", max_drop=50.0)))
    assert any(line.startswith("Agreement with the dense network on 24 test images: ") for line in lines)


def test_pictures_that_came_later_are_refused(pictures: Path, tmp_path: Path) -> None:
    """Divided anew, some of the test split would be trained on."""
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    run = run_recipe(wanted(folder), tmp_path / "run").directory
    known = manifest_of(run)["splits"]
    assert {name: each["images"] for name, each in known.items()} == {"train": 77, "search": 19, "test": 24}
    for number in range(10):
        shutil.copy(folder / "some/0/0.png", folder / f"some/new{number}.png")
    said = "expected 77 in train, 19 in search, 24 in test; found 83 in train, 21 in search, 26 in test"
    with pytest.raises(CompressorError, match=said):
        resume(run)
    with pytest.raises(CompressorError, match=said):
        list(export_format(run, Request(precision="int8")))
    for new in folder.glob("some/new*.png"):
        new.unlink()
    (folder / "some/0/0.png").rename(folder / "some/0/000.png")
    with pytest.raises(CompressorError, match="24 in test, with other names or labels"):
        resume(run)
    (folder / "some/0/000.png").rename(folder / "some/0/0.png")
    assert resume(run).exit_code == 0
    content = manifest_of(run)
    del content["splits"]  # as earlier versions wrote it
    (run / "manifest.json").write_text(json.dumps(content))
    shutil.copy(folder / "some/0/0.png", folder / "some/new.png")
    assert resume(run).exit_code == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"search": {"measure": "accuracy"}}, "search.measure: accuracy needs labels"),
        ({"search": {"epochs_share": 0.5}}, "search.epochs_share needs labels"),
        ({"epochs": 1, "training": {"distill_weight": 0}}, "distill_weight: 0 needs labels"),
        ({"pruning": {"importance": "taylor"}}, "taylor, which needs labels"),
        ({"model": "cifar_resnet20", "epochs": 1}, "no labels, and cifar_resnet20 has no trained weights"),
    ],
)
def test_what_needs_labels_is_refused(pictures: Path, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressorError, match=message):
        run_recipe(wanted(pictures, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(CompressorError, match="holds 0 pictures; at least 10"):
        load_data(f"images:{tmp_path}", seed=0)


def test_a_network_keeps_its_own_number_of_outputs() -> None:
    assert usual_classes("tests.nets:trained_tiny") == 10  # the factory takes no number
    assert usual_classes("tests.nets:tiny") == 10
    assert usual_classes("resnet18") == 1000
