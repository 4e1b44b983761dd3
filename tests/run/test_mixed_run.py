"""Mixed precision: which of the measured plans is taken, and the file, record and page of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from compressor import Recipe, run_recipe
from compressor.cli.app import app
from compressor.core.answers import read_answers
from compressor.core.errors import CompressorError
from compressor.core.manifest import Manifest, PrecisionPlan
from compressor.models import create_model
from compressor.recipe import load_recipe
from compressor.run.folder import RunFolder
from compressor.run.job import Job
from compressor.run.max_drop import lost
from compressor.run.mixed import chosen_of
from compressor.run.points import points
from compressor.run.runs import listed
from export.convert.onnx_header import read_header
from export.convert.to_onnx import export_onnx
from export.errors import ExportError


def plan(int8: int, ratio: float, noise: float, score: float, half: float = 0.01) -> PrecisionPlan:
    return PrecisionPlan(
        int8=int8, predicted_ratio=ratio, ratio=ratio, interval=[ratio - half, ratio + half], noise=noise, score=score
    )


def test_the_fastest_within_the_drop_is_taken() -> None:
    floats = PrecisionPlan(int8=0, predicted_ratio=1.0, ratio=1.0, interval=[1.0, 1.0], noise=0.0, score=0.9)
    found = [floats, plan(3, 0.8, 0.001, 0.899), plan(6, 0.6, 0.01, 0.891), plan(8, 0.4, 0.2, 0.7)]
    assert chosen_of(found, 0.9, 0.01)[0] == 2
    assert chosen_of(found, 0.9, 0.5)[0] == 3
    assert chosen_of(found, 0.9, 0.0)[0] == 0
    with pytest.raises(ExportError, match=r"\(91\.00%\) within 0\.50%: 90\.00% at best"):
        chosen_of(found, 0.91, 0.005)
    assert "loses at most 1 points" in chosen_of(found, 0.9, 0.01)[1]


def test_noise_decides_between_times_that_cannot_be_told_apart() -> None:
    found = [plan(0, 1.0, 0.0, 0.9, 0.0), plan(5, 0.605, 0.002, 0.89), plan(6, 0.6, 0.01, 0.9)]
    assert chosen_of(found, 0.9, 0.02)[0] == 1
    slower = [*found, plan(4, 0.62, 0.001, 0.9)]
    assert chosen_of(slower, 0.9, 0.02)[0] == 1
    slower_int8 = [plan(0, 1.0, 0.0, 0.9, 0.0), plan(6, 1.3, 0.01, 0.9)]
    assert chosen_of(slower_int8, 0.9, 0.02)[0] == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = {
        "model": "tests.nets:tiny", "image_size": 16, "epochs": 4, "budgets": {"flops": "60%"}, "agent": "uniform",
        "search": {"max_evaluations": 4, "batch_norm_batches": 2}, "contract": {"repeats": 1},
        "export": {"engine": False, "precisions": ["mixed"], "max_drop": 3},
        "pruning": {"compensation_images": 64},
    }  # fmt: skip
    assert run_recipe(Recipe.model_validate(recipe), out=folder).exit_code == 0
    return folder


def test_the_record_is_that_of_the_file(run: Path) -> None:
    entry = Manifest.read(run / "manifest.json").exports["mixed"]
    proto = onnx.load(run / "model.mixed.onnx")
    made_by = {name: node.op_type for node in proto.graph.node for name in node.output}
    read_by = {name: node.op_type for node in proto.graph.node for name in node.input}
    for layer in entry.layers:
        (node,) = (each for each in proto.graph.node if each.name == layer.name)
        paired = [made_by.get(name) == "DequantizeLinear" for name in node.input[:2]]
        paired.append(node.op_type == "Gemm" or read_by[node.output[0]] == "QuantizeLinear")
        assert layer.precision == ("int8" if all(paired) else "fp32"), layer.name
        assert layer.noise is not None
        assert layer.noise > 0
    (chosen,) = (each for each in entry.plans if each.chosen)
    assert chosen.int8 == sum(layer.precision == "int8" for layer in entry.layers)
    assert entry.kept_float == [layer.name for layer in entry.layers if layer.precision == "fp32"]
    ends = sorted(each.int8 for each in entry.plans)
    assert (ends[0], ends[-1]) == (0, len(entry.layers))
    assert entry.parity is not None
    assert entry.parity.top1_agreement is not None
    assert entry.accuracy is not None
    if chosen.int8:
        assert read_header(run / "model.mixed.onnx").metadata["runtime"] == "onnxruntime"


def test_the_page_says_why(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "Precisions of model.mixed.onnx" in page
    assert "cannot be told apart" in page
    layers = Manifest.read(run / "manifest.json").exports["mixed"].layers
    assert all(layer.name in page for layer in layers)


def test_what_is_lost_is_that_of_the_file_whose_time_is_measured(run: Path, tmp_path: Path) -> None:
    """Another network's file stands for one that loses much in its precision."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    torch.manual_seed(1)
    file = folder / "model.mixed.onnx"
    export_onnx(create_model("tests.nets:tiny", 10).eval(), torch.zeros(1, 3, 16, 16), file)
    job = Job.prepare(load_recipe(folder / "recipe.yaml"))
    with RunFolder.open(folder) as found:
        right, truth = (each.numpy() for each in job.task.file_answers(file) or ())
        record, accuracy = found.manifest, float((right == truth).mean())
        record.exports = {"mixed": record.exports["mixed"].model_copy(update={"accuracy": accuracy})}
        dense, fp32 = float(record.accuracy.dense or 0), lost(found, job)
        assert fp32.test_drop == pytest.approx(100 * (dense - float(record.accuracy.finetuned or 0)))
        record.latency = record.latency.model_copy(update={"precision": "mixed"})
        mixed = lost(found, job)
        assert mixed.test_drop == pytest.approx(100 * (dense - accuracy))
        assert mixed.search == job.task.on_search().file_score(file, job.model, None, lambda _: None) != fp32.search
        answers = read_answers(folder)
        changes = (np.array(answers.dense) == truth) - 1.0 * (right == truth)
        assert mixed.error == pytest.approx(100 * changes.std() / len(truth) ** 0.5)
        (point,) = points(found, job, with_dense=False)
        assert (point.onnx, point.tested) == ("run/model.mixed.onnx", accuracy)
        assert listed([folder]).records()[0]["score"] == record.accuracy.exported  # of what is on the disk so far
        found.save()
        assert listed([folder]).records()[0]["score"] == accuracy != record.accuracy.exported


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "jetson-orin-nano-8gb"], "none can be measured on a Jetson Orin Nano 8GB from here"),
        (["--target", "jetson-orin-nano-8gb", "--bundle", "b.tar.gz"], "none can be measured on a Jetson Orin"),
        (["--target", "ssh://me@nano.local", "--board", "jetson-nano"], "has no INT8 units"),
        (["--format", "engine"], "this machine's CPU, which runs no engines"),
        (["--rest", "fp16"], "FP32 or INT8 on this machine's CPU, not in FP16"),
        (["--format", "pt2"], "is written in fp32"),
    ],
)
def test_what_mixed_precision_is_not_for(run: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["export", str(run), "--precision", "mixed", *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_device_that_is_not_measured_here() -> None:
    recipe = {"model": "tests.nets:tiny", "device": "jetson-orin-nano-8gb", "budgets": {"flops": "60%"}}
    for fields in ({"precision": "mixed"}, {"export": {"precisions": ["mixed"]}}):
        with pytest.raises(CompressorError, match=r"ssh reaches\. This run is for jetson-orin-nano-8gb"):
            run_recipe(Recipe.model_validate({**recipe, **fields}))


def test_energy_is_that_of_fp32() -> None:
    recipe = {"model": "tests.nets:tiny", "precision": "int8", "budgets": {"energy": "60%"}}
    with pytest.raises(Exception, match="An energy budget counts FP32 networks"):
        run_recipe(Recipe.model_validate(recipe))
    there = {**recipe, "precision": "mixed", "device": "ssh://me@orin.local"}
    with pytest.raises(CompressorError, match="An energy budget counts networks in one precision"):
        run_recipe(Recipe.model_validate(there))
