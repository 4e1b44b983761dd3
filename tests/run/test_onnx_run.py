"""Runs from ONNX files and unlabelled pictures: pruned, compensated, exported again, and loaded without code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import CompressorError, RunResult, load, run_recipe
from compressor.data import load_data
from compressor.run.explain import explain_again
from compressor.run.exports import Request, export_format
from compressor.run.pipeline import resume
from export.convert.onnx_header import read_header
from export.convert.ort import onnx_outputs
from export.convert.to_onnx import export_onnx
from tests.nets import trained_tiny
from tests.runs import manifest_of, recipe

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures of digits, and a trained network as a file that says nothing about them."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("given")
    (folder / "pictures").mkdir()
    images: Any = load_data("digits", seed=0).train
    for place, image in enumerate(images.images[:120]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"pictures/{place}.png")
    export_onnx(trained_tiny(), torch.zeros(1, 3, SIZE, SIZE), folder / "net.onnx")
    return folder


def wanted(folder: Path, **fields: Any) -> Any:
    base = {
        "model": str(folder / "net.onnx"), "data": f"images:{folder / 'pictures'}", "agent": "uniform",
        "image_size": None, "budgets": {"flops": "70%"}, "epochs": 0, "search": {"max_evaluations": 2},
    }  # fmt: skip
    return recipe(**{**base, **fields})


@pytest.fixture(scope="module")
def result(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run_recipe(wanted(folder), tmp_path_factory.mktemp("deployed") / "run")


def test_the_file_comes_back_smaller_and_equal_to_the_network(result: RunResult, folder: Path) -> None:
    assert result.exit_code == 0
    assert result.onnx.stat().st_size < (folder / "net.onnx").stat().st_size
    images = torch.randn(5, 3, SIZE, SIZE)
    with torch.no_grad():
        right = result.model(images).numpy()
    assert abs(onnx_outputs(result.onnx, images.numpy())[0] - right).max() < 1e-4
    assert result.manifest["cost"]["slim"]["macs"] <= 0.7 * result.manifest["cost"]["dense"]["macs"]
    assert result.manifest["compensation"]["refitted"]  # layers whose batch norms are folded into them
    assert result.manifest["accuracy"]["metric"] == "agreement with the dense network"
    assert "network.onnx" in result.manifest["files"]
    assert read_header(result.onnx).metadata["model"] == "net.onnx"


def test_the_run_says_what_it_assumed(result: RunResult) -> None:
    note = next(note for note in result.manifest["notes"] if "how its images were prepared" in note)
    assert "net.onnx does not say how its images were prepared: the usual ImageNet values are assumed" in note
    assert result.manifest["preprocessing"]["origin"] == "assumed: usual for ImageNet"


def test_a_file_of_a_run_is_pruned_again_as_it_says(result: RunResult, folder: Path, tmp_path: Path) -> None:
    """Its metadata has the preprocessing, whatever it was."""
    given = run_recipe(
        wanted(folder, data={"source": f"images:{folder / 'pictures'}", "mean": 0.3, "std": 0.4}),
        tmp_path / "a",
    )
    assert not any("prepared" in note for note in given.manifest["notes"])
    again = run_recipe(wanted(folder, model=str(given.onnx)), tmp_path / "b")
    assert again.manifest["preprocessing"]["origin"] == "the metadata of model.onnx"
    assert again.manifest["preprocessing"]["mean"] == [0.3] * 3
    assert again.onnx.stat().st_size < given.onnx.stat().st_size


def test_a_run_needs_its_own_files_only(result: RunResult, folder: Path, tmp_path: Path) -> None:
    """Elsewhere, without the file that it was started with and without the cache."""
    copy = Path(shutil.copytree(result.directory, tmp_path / "copy"))
    images = torch.randn(2, 3, SIZE, SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSOR_CACHE", str(tmp_path / "empty"))
        with torch.no_grad():
            assert torch.equal(load(copy)(images), result.model(images))
        moved = folder / "moved.onnx"
        (folder / "net.onnx").rename(moved)
        try:
            assert "model.fp16.onnx" in next(export_format(copy, Request(precision="fp16", max_drop=50.0)))
            assert any("slim" in line for line in explain_again(copy) if isinstance(line, str))
            assert resume(copy).exit_code == 0
        finally:
            moved.rename(folder / "net.onnx")
    content = (copy / "network.onnx").read_bytes()
    (copy / "network.onnx").write_bytes(content[:-1] + b"!")
    with pytest.raises(CompressorError, match=r"network\.onnx is not the file .* its checksum differs"):
        load(copy)
    (copy / "network.onnx").unlink()
    with pytest.raises(CompressorError, match=r"There is no ONNX file .*network\.onnx"):
        load(copy)


def test_a_stopped_run_goes_on_with_its_copy(
    folder: Path, result: RunResult, tmp_path: Path, monkeypatch: Any
) -> None:
    own = tmp_path / "own.onnx"
    shutil.copy(folder / "net.onnx", own)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("compressor.run.pipeline.export", stop)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(wanted(folder, model=str(own)), tmp_path / "run")
    own.unlink()
    resumed = resume(tmp_path / "run")
    assert resumed.exit_code == 0
    assert manifest_of(tmp_path / "run")["groups"] == result.manifest["groups"]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        result.directory / "model.safetensors"
    ).read_bytes()


def test_several_workers_build_it_from_the_cache(folder: Path, tmp_path: Path) -> None:
    search = {"max_evaluations": 3, "workers": 2}
    found = run_recipe(wanted(folder, agent="random", search=search), tmp_path / "run")
    assert found.exit_code == 0
