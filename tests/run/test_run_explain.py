"""`compress measure --explain` on finished runs for several devices."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from compressor.core.errors import CompressorError
from compressor.core.files import write_atomic
from compressor.core.manifest import MANIFEST, Manifest
from compressor.latency import provider
from compressor.latency.measured import MeasuredDevice
from compressor.latency.provider import register_device
from compressor.recipe import load_recipe
from compressor.run import explain
from compressor.run.explain import Profiled, explain_again
from compressor.run.onnx_files import DENSE, open_exported

ELSEWHERE = "these times are from this machine's CPU."


class Other(MeasuredDevice):
    name = "other"
    runtime = "other-run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    return folder


@pytest.fixture(scope="module")
def profiled(finished: Path) -> Profiled:
    """Real profiles of the run's networks."""
    with closing(open_exported(finished, DENSE)) as run:
        return explain._profiled_here(run, load_recipe(run.file("recipe.yaml")), run.file("model.onnx"))


@pytest.fixture(autouse=True)
def _same_profiles(profiled: Profiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "_profiled_here", lambda *_: profiled)


def said_for(run: Path, device: str) -> str:
    write_atomic(run / "recipe.yaml", load_recipe(run / "recipe.yaml").changed({"device": device}).to_yaml())
    return "\n".join(part for part in explain_again(run) if isinstance(part, str))


def test_a_run_for_this_machine(run: Path, profiled: Profiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_BACKEND", "onnxruntime-cpu")
    parts = list(explain_again(run))
    manifest = Manifest.read(run / MANIFEST)
    (lines,) = (part for part in parts if isinstance(part, list))
    assert manifest.explanation is not None
    assert manifest.explanation.precision == "fp32"
    assert [line.name for line in manifest.explanation.lines] == [line.name for line in lines]
    assert all(layer.slim_ms is not None and layer.slim_ms > 0 for layer in manifest.layers)
    words = "\n".join(part for part in parts if isinstance(part, str))
    assert f"dense {profiled.dense.whole_ms:.3f} ms" in words
    assert "The run has no latency table, so nothing was predicted." in words
    assert ELSEWHERE not in words
    assert "Why is it not faster?" in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_for_another_device(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider._registry, "classes", dict(provider._registry.classes))
    register_device(Other)
    words = said_for(run, "other")
    assert f"The run is for other; {ELSEWHERE}" in words
    assert "trtexec" not in words
    with pytest.raises(CompressorError, match="belong to a run for a TensorRT device; this one is for other"):
        list(explain_again(run, (run / "a.json", run / "b.json")))
    words = said_for(run, "jetson-nano")
    assert f"The run is for jetson-nano; {ELSEWHERE}" in words
    assert "profile both engines there (trtexec --exportProfile)" in words


def test_a_run_in_int8_is_explained_in_fp32(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_BACKEND", "onnxruntime-cpu")
    write_atomic(run / "recipe.yaml", load_recipe(run / "recipe.yaml").changed({"precision": "int8"}).to_yaml())
    words = "\n".join(part for part in explain_again(run) if isinstance(part, str))
    assert "The run is for int8; these are times in FP32." in words
    assert "the dense one's time, both in FP32. The gap" in words
    assert "both in FP32" in (run / "report.html").read_text(encoding="utf-8")
