"""The whole job on generated pictures with masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import CompressorError, RunResult, run_recipe
from compressor.data import load_data
from compressor.models import create_model
from compressor.recipe import load_recipe, shipped_recipes
from compressor.run.exports import Request, export_format
from compressor.run.job import DenseFile, Job
from compressor.training.segmentation import Segmentation
from tests.runs import recipe


def wanted(**fields: Any) -> Any:
    base = {
        "model": "tests.nets:segmenter", "data": "shapes:60", "task": "segmentation", "image_size": 32,
        "agent": "uniform", "epochs": 2, "budgets": {"params": "70%"}, "search": {"max_evaluations": 2},
    }  # fmt: skip
    return recipe(**{**base, **fields})


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run_recipe(wanted(), tmp_path_factory.mktemp("segmented") / "run")


def test_a_network_is_scored_by_mean_iou(segmented: RunResult) -> None:
    assert segmented.exit_code == 0
    found = segmented.manifest["accuracy"]
    assert (found["metric"], found["share"], found["images"]) == ("mean IoU", True, 12)
    data = load_data("shapes:60", seed=0, image_size=32, task="segmentation")
    score = Segmentation(data).test_score(segmented.model, None, "cpu")
    assert found["finetuned"] == pytest.approx(score, abs=1e-3)
    assert found["exported"] == pytest.approx(found["finetuned"], abs=1e-3)
    assert 0 < score < 1
    assert segmented.manifest["parity"]["max_abs"] < 1e-4
    budget = segmented.manifest["budgets"][0]
    assert budget["measured"] <= budget["target"]


def test_the_page_speaks_of_mean_iou(segmented: RunResult) -> None:
    page = (segmented.directory / "report.html").read_text(encoding="utf-8")
    assert "Mean IoU" in page
    assert "ccuracy" not in page
    assert "one image more or less" not in page


def test_the_outputs_keep_all_classes(segmented: RunResult) -> None:
    assert segmented.model(torch.zeros(1, 3, 32, 32))["out"].shape == (1, 4, 16, 16)


def test_the_shares_of_the_classes_are_told(segmented: RunResult, tmp_path: Path) -> None:
    from PIL import Image

    from compressor.run.predict import predict

    run = segmented.directory
    assert (run / "labels.txt").read_text().split() == ["background", "circle", "square", "triangle"]
    assert json.loads((run / "preprocess.json").read_text())["resize"] == "squash"
    assert not (run / "infer.py").exists()  # it is for classifiers
    test: Any = load_data("shapes:60", seed=0, image_size=32, task="segmentation").test
    pixels = test.scenes[0].read(test.preprocessing)[0]
    image = test.preprocessing.normalised(pixels[None])
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "scene.png")
    for runtime in ("onnx", "torch"):
        ((_, answers),) = predict(run, [tmp_path / "scene.png"], runtime=runtime, top=9, factory="tests.nets:segmenter")
        classes = segmented.model(image)["out"].argmax(1).flatten().bincount(minlength=4) / 256
        names = (run / "labels.txt").read_text().split()
        assert {each.name: pytest.approx(each.share, abs=0.02) for each in answers} == {
            name: float(share) for name, share in zip(names, classes, strict=True) if share
        }


def test_int8_is_judged_by_mean_iou(segmented: RunResult) -> None:
    lines = list(export_format(segmented.directory, Request(precision="int8", max_drop=90.0)))
    assert any(line.startswith("Mean IoU on 12 test images: ") for line in lines)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "resnet18"}, "resnet18 is a classifier of images, and the task is segmentation"),
        ({"model": "cifar_resnet20"}, "is a classifier"),
        ({"task": None, "model": "resnet18"}, "shapes has masks and boxes, and --task is classification"),
        ({"data": "digits"}, "digits has images by class, or without labels, and --task is segmentation"),
        ({"task": None, "data": "digits", "model": "fcn_resnet50"}, "segmentation network, and the task is class"),
        ({"model": "tests.nets:tiny"}, r"gives a tensor of shape \(1, 4\) for one image; a segmentation network"),
        ({"search": {"measure": "closeness"}}, "search.measure is closeness, which is for images by class"),
        ({"search": {"workers": 2}}, "search.workers is 2, which is for images by class"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressorError, match=message):
        run_recipe(wanted(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_with_an_auxiliary_head_are_loaded(tmp_path: Path) -> None:
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    given = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4, aux_loss=True)
    torch.save(given.state_dict(), tmp_path / "weights.pt")
    name = "deeplabv3_mobilenet_v3_large"
    model = create_model(name, 4, tmp_path / "weights.pt", (3, 32, 32), task="segmentation")
    assert torch.equal(model.state_dict()["classifier.4.weight"], given.state_dict()["classifier.4.weight"])
    said: list[str] = []
    create_model(name, 5, tmp_path / "weights.pt", (3, 32, 32), said.append, "segmentation")
    assert said == [f"{tmp_path / 'weights.pt'} is for 4 classes: classifier.4 starts fresh with 5."]


def test_the_shipped_recipe_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseFile, "_write", lambda *_: None)
    given = load_recipe(shipped_recipes()["lraspp_shapes"])
    job = Job.prepare(given.changed({"data": "shapes:20", "budgets": {"latency": None, "flops": "60%"}}).resolved())
    (budget,) = job.budgets()
    assert float(budget.predict(job.space.min_widths[None])[0]) <= budget.target < budget.dense
    assert job.task.metric.name == "mean IoU"
