"""The dense network is exported before anything is measured or searched, once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from compressor import run_recipe
from compressor.cli.app import app
from compressor.core.errors import CompressorError
from compressor.latency.networks import with_distinct_weights
from compressor.models import create_model
from compressor.run.job import DenseFile, Job
from compressor.run.onnx_files import DENSE
from compressor.run.pipeline import resume
from export.convert.onnx_header import read_header
from export.convert.to_onnx import check_parity
from tests.runs import recipe


def test_what_cannot_be_exported_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> None:
        raise AssertionError("a table was measured")

    monkeypatch.setattr("compressor.run.job.latency_table", measured)
    asked = recipe(model="tests.nets:no_onnx", budgets={"latency": "60%"})
    with pytest.raises(CompressorError, match=r"no_onnx cannot be exported, .*opset 17: .*aten::frac"):
        run_recipe(asked, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    words = ["--model", "tests.nets:no_onnx", "--flops", "60%", "--dry-run"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "aten::frac" in result.output


def test_the_file_is_the_dense_network_and_lies_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = create_model("tests.nets:tiny", 10, "none", (3, 32, 32)).eval()
    images = {"preprocessing": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}, "classes": ["a", "b"]}
    task: Any = SimpleNamespace(example=torch.zeros(1, 3, 32, 32), facts=lambda: images)
    dense = DenseFile(None, recipe().resolved(), model, task)
    assert [path.name for path in tmp_path.glob("compressor-dense-*/*")] == ["dense.onnx"]
    dense.put(tmp_path / DENSE)
    dense.put(tmp_path / "again")  # it is handed over once
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["checkpoints", DENSE]
    said = read_header(tmp_path / DENSE).metadata
    assert set(said) == {"model", "classes", "preprocessing", "mean", "std"}
    assert (said["model"], json.loads(said["mean"])) == ("tests.nets:tiny", [0.1, 0.2, 0.3])
    inputs = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    assert check_parity(with_distinct_weights(model), tmp_path / DENSE, inputs).max_abs < 1e-5
    unused = DenseFile(None, recipe().resolved(), model, task)
    assert list(tmp_path.glob("compressor-dense-*"))
    del unused
    assert not list(tmp_path.glob("compressor-dense-*"))


def test_a_run_that_goes_on_exports_nothing_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = (finished / DENSE).read_bytes()

    def exported(*_: Any, **__: Any) -> None:
        raise AssertionError("it was exported again")

    monkeypatch.setattr("export.convert.to_onnx.export_onnx", exported)
    assert resume(finished).exit_code == 0
    assert (finished / DENSE).read_bytes() == written
    with pytest.raises(AssertionError, match="exported again"):
        Job.prepare(recipe(budgets={"flops": "60%"}).resolved())
