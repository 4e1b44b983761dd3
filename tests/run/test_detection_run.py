"""The whole job on generated pictures with boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import CompressorError, RunResult, run_recipe
from compressor.data import load_data
from compressor.recipe import load_recipe, shipped_recipes
from compressor.run.exports import Request, export_format
from compressor.run.job import DenseFile, Job
from compressor.training.detection import Detection
from export.convert.onnx_header import read_header
from export.convert.ort import open_session, run_session
from tests.runs import recipe


def wanted(**fields: Any) -> Any:
    base = {
        "model": "tests.nets:detector", "data": "shapes:60", "task": "detection", "image_size": 32,
        "agent": "uniform", "epochs": 2, "budgets": {"params": "70%"}, "search": {"max_evaluations": 2},
    }  # fmt: skip
    return recipe(**{**base, **fields})


@pytest.fixture(scope="module")
def detected(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run_recipe(wanted(), tmp_path_factory.mktemp("detected") / "run")


def test_a_network_is_scored_by_map(detected: RunResult) -> None:
    assert detected.exit_code == 0
    found = detected.manifest["accuracy"]
    assert (found["metric"], found["share"], found["images"]) == ("mAP", True, 12)
    data = load_data("shapes:60", seed=0, image_size=32, task="detection")
    model: Any = detected.model
    assert found["finetuned"] == pytest.approx(Detection(data, model).test_score(model, None, "cpu"), abs=1e-4)
    assert found["exported"] == pytest.approx(found["finetuned"], abs=1e-3)
    assert detected.manifest["parity"]["max_abs"] < 1e-4
    budget = detected.manifest["budgets"][0]
    assert budget["measured"] <= budget["target"]


def test_the_outputs_stay_whole_and_the_detector_gives_boxes(detected: RunResult) -> None:
    model: Any = detected.model
    images = torch.rand(2, 3, 32, 32)
    outputs = model(images)
    assert list(outputs) == ["cls_logits", "bbox_regression"]
    assert [each.shape[2] for each in outputs.values()] == [4, 4]
    assert [set(each) for each in model.detector(images)] == [{"boxes", "scores", "labels"}] * 2


def test_the_page_speaks_of_map(detected: RunResult) -> None:
    page = (detected.directory / "report.html").read_text(encoding="utf-8")
    assert "mAP, test split" in page
    assert "ccuracy" not in page


def test_boxes_are_told_in_pixels_of_the_photograph(
    detected: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from compressor.run.predict import predict

    monkeypatch.setattr("compressor.run.predict.CERTAIN", 0.0)
    Image.new("RGB", (96, 64), (200, 30, 30)).save(tmp_path / "photo.png")
    given = [tmp_path / "photo.png"]
    ((_, found),) = predict(detected.directory, given, runtime="torch", top=500, factory="tests.nets:detector")
    assert found
    assert [each.share for each in found] == sorted((each.share for each in found), reverse=True)
    for each in found:
        assert each.box is not None
        left, top, right, bottom = each.box
        assert 0 <= left <= right <= 96 + 1e-3
        assert 0 <= top <= bottom <= 64 + 1e-3
        assert each.name in ("circle", "square", "triangle")
    assert max(each.box[2] for each in found if each.box) > 64  # not in pixels of the input
    with pytest.raises(CompressorError, match=r"has no model\.boxes\.onnx"):
        list(predict(detected.directory, given))
    list(export_format(detected.directory, Request(format="boxes")))
    ((_, same),) = predict(detected.directory, given, top=500)
    assert len(same) == len(found)
    assert same[0].box == pytest.approx(found[0].box, abs=0.05)


def test_half_precision_is_judged_by_map(detected: RunResult) -> None:
    lines = list(export_format(detected.directory, Request(precision="fp16", max_drop=90.0)))
    assert any(line.startswith("mAP on 12 test images: ") for line in lines)


def test_a_file_with_post_processing_gives_the_same_boxes(detected: RunResult) -> None:
    lines = list(export_format(detected.directory, Request(format="boxes")))
    assert lines[0].startswith(f"Wrote {detected.directory / 'model.boxes.onnx'}: opset 17, ")
    model: Any = detected.model
    session = open_session(detected.directory / "model.boxes.onnx")
    assert [(each.name, each.shape) for each in session.get_outputs()] == [
        ("output_boxes", ["boxes", 4]), ("output_scores", ["boxes"]), ("output_labels", ["boxes"])
    ]  # fmt: skip
    data = load_data("shapes:60", seed=0, image_size=32, task="detection")
    images = next(iter(data.search.batches(8)))[0]
    with torch.no_grad():
        for image in images.split(1):
            (expected,) = model.eval().detector(image)
            found = run_session(session, {"input": image.numpy()})
            assert len(found[1]) == len(expected["scores"]) > 0
            assert found[1] == pytest.approx(expected["scores"].numpy(), abs=1e-5)
    entry = json.loads((detected.directory / "manifest.json").read_text())["exports"]["boxes"]
    assert entry["parity"]["max_abs"] < 1e-4
    assert entry["parity"]["top1_agreement"] > 0.9
    assert entry["accuracy"] == pytest.approx(detected.manifest["accuracy"]["finetuned"], abs=1e-3)
    assert entry["images"] == 12
    written = (detected.directory / "model.boxes.onnx").read_bytes()
    list(export_format(detected.directory, Request(format="boxes")))
    assert (detected.directory / "model.boxes.onnx").read_bytes() == written
    header = [read_header(detected.directory / name) for name in ("model.boxes.onnx", "model.onnx")]
    assert header[0].metadata == header[1].metadata


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "resnet18"}, "resnet18 is a classifier of images, and the task is detection"),
        ({"model": "fcn_resnet50"}, "fcn_resnet50 is a segmentation network, and the task is detection"),
        ({"task": "segmentation", "model": "fcos_resnet50_fpn"}, "a detection network, and the task is segmentation"),
        ({"model": "fasterrcnn_resnet50_fpn"}, "whose outputs have no fixed size before its post-processing"),
        ({"model": "tests.nets:tiny"}, "gives a Tiny; a one-stage detector of torchvision was expected"),
        ({"data": "digits"}, "digits has images by class, or without labels, and --task is detection"),
        ({"data": {"source": "shapes", "crop_share": 0.5}}, "data.crop_share is 0.5, which is for images by class"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressorError, match=message):
        run_recipe(wanted(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_shipped_recipe_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseFile, "_write", lambda *_: None)
    given = load_recipe(shipped_recipes()["ssdlite320_shapes"])
    job = Job.prepare(given.changed({"data": "shapes:20", "budgets": {"latency": None, "flops": "60%"}}).resolved())
    (budget,) = job.budgets()
    assert float(budget.predict(job.space.min_widths[None])[0]) <= budget.target < budget.dense
    assert job.task.metric.name == "mAP"
