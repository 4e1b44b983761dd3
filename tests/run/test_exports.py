"""`compress export` on a finished run: every format, checked and repeated, and what it refuses."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from compressor import Recipe, load, run_recipe
from compressor.cli.app import app
from compressor.core.files import sha256_file
from compressor.core.manifest import Export, Manifest
from compressor.recipe import load_recipe
from compressor.report.comparison import comparison
from compressor.report.formats import size
from compressor.run.boards import _asks_for_another, _require_own
from compressor.run.deployable import write_deployable
from compressor.run.exports import Finished, Request
from compressor.run.folder import RunFolder
from compressor.run.predict import predict
from export.convert import parity, quantize
from export.convert.onnx_header import read_header
from export.convert.program import load_program
from export.device.archive import unpack
from export.engine.engine_info import read_sidecar
from export.engine.trt import RTX
from export.errors import DropError, ExportError
from export.files import disk_error
from tests.export.tiny_disk import tiny_disk


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = {
        "model": "tests.nets:tiny", "epochs": 4, "budgets": {"flops": "60%"}, "agent": "uniform",
        "search": {"max_evaluations": 4, "batch_norm_batches": 2}, "export": {"engine": False},
        "contract": {"repeats": 1}, "pruning": {"compensation_images": 64},
    }  # fmt: skip
    assert run_recipe(Recipe.model_validate(recipe), out=folder).exit_code == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run under its own name."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "run"))


def export(run: Path, *options: object) -> str:
    result = CliRunner().invoke(app, ["export", str(run), *map(str, options)])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def refused(run: Path, *options: object) -> str:
    before = {path: sha256_file(path) for path in run.rglob("*") if path.is_file()}
    result = CliRunner().invoke(app, ["export", str(run), *map(str, options)])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    after = {path: sha256_file(path) for path in run.rglob("*") if path.is_file()}
    assert after == before
    return " ".join(result.output.split())


def exports_of(run: Path) -> dict[str, Any]:
    manifest = json.loads((run / "manifest.json").read_text())
    for name, checksum in manifest["files"].items():
        assert sha256_file(run / name) == checksum, name
    content: dict[str, Any] = manifest["exports"]
    return content


def test_the_runs_own_file_comes_out_of_the_saved_network_again(run: Path, tmp_path: Path) -> None:
    from compressor.run.exports import Finished
    from export.convert.to_onnx import export_onnx

    own = Finished.open(run)
    export_onnx(own.model, torch.zeros(1, 3, 32, 32), tmp_path / "again.onnx", metadata=own.metadata())
    own.close()
    assert (tmp_path / "again.onnx").read_bytes() == (run / "model.onnx").read_bytes()
    export(run, "--out", tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == (run / "model.onnx").read_bytes()
    facts = read_header(run / "model.onnx").metadata
    assert set(facts) == {"model", "classes", "mean", "std", "preprocessing", "run", "plan"}
    assert (facts["run"], facts["model"]) == ("run", "tests.nets:tiny")
    assert facts["plan"] == json.loads((run / "channels.json").read_text())["plan_sha256"]


def test_every_file_repeats(run: Path, tmp_path: Path) -> None:
    wanted = {
        "open.onnx": ["--batch", "1..4"],
        "old.onnx": ["--opset", 13],
        "half.onnx": ["--precision", "fp16", "--batch", 2],
        "program.pt2": ["--format", "pt2"],
        "orin.tar.gz": ["--target", "jetson-orin-nano-8gb"],
    }
    made: dict[str, list[bytes]] = {name: [] for name in wanted}
    for turn in ("one", "two"):
        folder = tmp_path / turn
        copied = Path(shutil.copytree(run, folder / "run"))
        for name, options in wanted.items():
            where = "--bundle" if name.endswith(".tar.gz") else "--out"
            export(copied, *options, where, folder / name)
            made[name].append((folder / name).read_bytes())
    assert all(first == second for first, second in made.values())
    assert read_header(tmp_path / "one" / "open.onnx").shapes["input"] == (-1, 3, 32, 32)
    assert read_header(tmp_path / "one" / "half.onnx").shapes["input"] == (2, 3, 32, 32)
    assert read_header(tmp_path / "one" / "old.onnx").opset == 13
    entry = exports_of(tmp_path / "one" / "run")["fp16.batch2"]
    assert entry["parity"]["max_abs"] < 0.05
    assert entry["accuracy"] > 0.3
    assert entry["images"] == 359


def test_a_program_computes_the_slim_network(run: Path) -> None:
    words = export(run, "--format", "pt2", "--batch", "1..8")
    assert "load_program('model.batch1-8.pt2')" in words
    assert exports_of(run)["batch1-8.pt2"]["parity"]["max_abs"] < 1e-4
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32))
    slim = load(run, factory="tests.nets:tiny")
    with torch.no_grad():
        torch.testing.assert_close(load_program(run / "model.batch1-8.pt2")(images), slim(images))


def test_int8_with_halves_within_the_drop(run: Path) -> None:
    words = export(
        run, "--precision", "int8", "--rest", "fp16", "--calibration", "percentile", "--max-drop", 2
    )
    assert "nodes in INT8" in words
    entry = exports_of(run)["int8"]
    exact = json.loads((run / "manifest.json").read_text())["accuracy"]["exported"]
    assert entry["accuracy"] >= exact - 0.02
    assert (entry["calibration"], entry["rest"]) == ("percentile", "fp16")
    assert json.loads(read_header(run / "model.int8.onnx").metadata["calibration"])["method"] == "percentile"
    kinds = [node.op_type for node in onnx.load(run / "model.int8.onnx").graph.node]
    assert "QuantizeLinear" in kinds
    assert "Cast" in kinds
    assert entry["calibration_images"] == 256
    assert set(entry["calibration_classes"]) == {str(digit) for digit in range(10)}
    assert {25, 26} <= set(entry["calibration_classes"].values()) <= {24, 25, 26, 27}
    assert sum(entry["calibration_classes"].values()) == 256
    assert entry["images"] == 359  # the whole test split


def test_a_drop_on_the_test_split_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.run.conversions.scored", lambda *_: (0.1, 359))
    made: list[float] = []
    original = quantize.quantize_within

    def counted(*args: Any, max_drop: float, **kwargs: Any) -> Any:
        made.append(max_drop)
        return original(*args, max_drop=max_drop, **kwargs)

    monkeypatch.setattr(quantize, "quantize_within", counted)
    for precision in ("fp16", "int8"):
        message = refused(run, "--precision", precision, "--max-drop", 0.5)
        assert f"model.{precision}.onnx: it loses" in message
        assert "at most 0.5 is allowed" in message
    assert not list(run.glob("*fp16*"))
    assert made == [0.005]  # no second try after the test split has spoken


def test_the_advice_follows_what_was_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parity.TOLERANCES, "fp16", 1e-12)
    message = refused(run, "--precision", "fp16")
    assert "FP16 differs from the network by" in message
    assert "--max-drop" not in message

    def lossy(*_: object, **__: object) -> None:
        raise DropError("INT8 reaches an accuracy of 25.00% at best.", "Allow a larger drop.")

    monkeypatch.setattr(quantize, "quantize_within", lossy)
    message = refused(run, "--precision", "int8")
    assert "model.int8.onnx: INT8 reaches an accuracy of 25.00% at best. Allow more with --max-drop." in message
    assert "fp16" not in message  # which this CPU does not compute
    message = refused(run, "--precision", "int8", "--rest", "fp16")  # for TensorRT
    assert "Allow more with --max-drop, or use --precision fp16." in message


def test_engines_are_built_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(RTX, reason="TensorRT-RTX is not installed")
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    options = ["--format", "engine", "--batch", "1..2..4", "--compute-capability", "8.9"]
    message = refused(run, *options)  # with another cache the run's factory is nobody's
    assert "'tests.nets:tiny', Python code that was not run from here before" in message
    assert "--factory tests.nets:tiny" in message
    options += ["--factory", "tests.nets:tiny"]
    assert "Built model.batch1-4.engine for compute capability 8.9" in export(run, *options)
    assert "Found in the cache: model.batch1-4.engine" in export(
        run, *options, "--out", tmp_path / "e.engine"
    )
    info = read_sidecar(tmp_path / "e.engine")
    assert info.settings["profile"] == {"input": [[size, 3, 32, 32] for size in (1, 2, 4)]}
    assert info.compute_capabilities == ("8.9",)
    assert len(list((tmp_path / "cache" / "engines").glob("*.engine"))) == 1
    assert exports_of(run)["engine.batch1-4"]["file"] == "engines/model.batch1-4.engine"
    message = refused(run, "--format", "engine", "--dla", 0, *options[-2:])
    assert "does not support deep-learning accelerators" in message
    message = refused(run, "--format", "engine", "--target", "jetson-orin-nano-8gb", *options[-2:])
    assert "does not build for compute capability 8.7" in message


def test_a_network_that_no_builder_takes_still_ends_its_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ExportError("n1 (Det): not supported.")

    pytest.importorskip(RTX, reason="TensorRT-RTX is not installed")
    monkeypatch.setattr("export.engine.engine.cached_engine", fails)
    assert "There is no engine of model.fp16.onnx: n1 (Det)" in export(run, "--precision", "fp16")
    assert "n1 (Det): not supported" in refused(run, "--format", "engine")


def test_a_bundle_is_in_the_opset_that_its_board_reads(run: Path, tmp_path: Path) -> None:
    export(run, "--precision", "int8", "--rest", "fp32", "--max-drop", 3)
    words = export(
        run, "--target", "jetson-nano", "--precision", "fp16", "--bundle", tmp_path / "nano.tar.gz"
    )
    assert "The Jetson Nano has no INT8 units: the int8 network is left out" in words
    files = unpack(tmp_path / "nano.tar.gz")
    names = sorted(name for name in files if name.startswith("models/"))
    assert names == [
        f"models/{name}.opset13.onnx" for name in ("dense.fp16", "dense", "model.fp16", "model")
    ]
    assert [each["beside"] for each in json.loads(files["bundle.json"])["networks"]] == [
        None, "dense.opset13", None, "dense.fp16.opset13"
    ]  # fmt: skip
    for name in ("infer.py", "infer_tensorrt.py"):
        assert files[name] == (run / name).read_bytes()
    assert files["labels.txt"] == b"0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n"
    described = json.loads(files["bundle.json"])
    assert {entry["opset"] for entry in described["networks"]} == {13}
    assert described["facts"]["run"] == "run"
    assert described["facts"]["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    words = export(run, "--target", "jetson-orin-nano-8gb", "--bundle", tmp_path / "orin.tar.gz")
    assert "model.int8.onnx computes the rest in fp32; export another one with" in words
    names = sorted(name for name in unpack(tmp_path / "orin.tar.gz") if name.startswith("models/"))
    kinds = ("", ".fp16", ".int8")
    assert names == sorted(f"models/{name}{kind}.onnx" for name in ("dense", "model") for kind in kinds)
    assert unpack(tmp_path / "orin.tar.gz")["models/dense.onnx"] == (run / "checkpoints/dense.onnx").read_bytes()


def test_a_bundle_is_of_the_run_with_its_network(run: Path, predicted: Path, tmp_path: Path) -> None:
    """Every front has runs of the same names, and a folder can be renamed: the FP32 file decides."""
    ours = ["--bundle", tmp_path / "orin.tar.gz"]
    export(run, "--target", BOARD, "--max-drop", 3, *ours)
    namesake = Path(shutil.copytree(predicted, tmp_path / "front" / "run"))
    own, came = (sha256_file(folder / "model.onnx")[:12] for folder in (namesake, run))
    for options in (["--import", tmp_path / "r.tar.gz"], ["--target", "ssh://nowhere.invalid"]):  # nothing is sent
        message = refused(namesake, *ours, *options)
        assert f"its model.onnx has the checksum {came} (of the run 'run'), expected {own}" in message
        assert f"--target {BOARD} --bundle FILE" in message
    renamed = Path(shutil.copytree(run, tmp_path / "renamed"))
    assert "r.tar.gz" in refused(renamed, *ours, "--import", tmp_path / "r.tar.gz")  # its own, without results
    export(renamed, "--precision", "int8", "--max-drop", 3)  # for the CPU
    with RunFolder.open(renamed) as folder:
        assert _require_own(tmp_path / "orin.tar.gz", folder) == ("model.int8",)


def test_int8_has_the_form_of_the_runtime_that_it_is_for(run: Path, tmp_path: Path) -> None:
    assert "--rounding up is not exported" in refused(run, "--precision", "int8", "--rounding", "up")
    export(run, "--precision", "int8", "--max-drop", 3, "--rounding", "outputs")
    assert read_header(run / "model.int8.onnx").metadata["runtime"] == "onnxruntime"  # the run's: this CPU
    entry = exports_of(run)["int8"]
    assert (entry["runtime"], entry["rounding"]) == ("onnxruntime", "outputs")
    export(run, "--target", "jetson-orin-nano-8gb", "--max-drop", 3, "--bundle", tmp_path / "orin.tar.gz")
    (tmp_path / "int8.onnx").write_bytes(unpack(tmp_path / "orin.tar.gz")["models/model.int8.onnx"])
    facts = read_header(tmp_path / "int8.onnx").metadata
    assert "runtime" not in facts  # written again, for TensorRT
    assert facts["rest"] == "fp16"


def test_a_bundle_follows_the_options(run: Path, tmp_path: Path) -> None:
    def bundled(name: str, *options: str) -> tuple[str, str]:
        export(run, "--target", BOARD, "--bundle", tmp_path / name, "--max-drop", 50, *options)
        file = unpack(tmp_path / name)["models/model.int8.onnx"]
        assert file == (run / "model.int8.onnx").read_bytes()
        entry = exports_of(run)["int8"]
        return entry["calibration"], entry["rounding"]

    assert bundled("first.tar.gz") == ("minmax", "nearest")
    assert bundled("other.tar.gz", "--calibration", "entropy", "--rounding", "outputs") == ("entropy", "outputs")
    assert bundled("default.tar.gz") == ("entropy", "outputs")  # no other file is asked for
    assert bundled("named.tar.gz", "--precision", "int8") == ("minmax", "nearest")
    assert bundled("rest.tar.gz", "--rest", "fp32") == ("minmax", "nearest")
    assert read_header(run / "model.int8.onnx").metadata["rest"] == "fp32"


@pytest.mark.parametrize(
    ("lost", "kept", "options", "again"),
    [
        (0.01, [], {"max_drop": 0.5}, True),  # it may lose more than is allowed
        (0.0, ["stem"], {"max_drop": 3.0}, True),  # and fewer layers may have to stay in floats
        (0.0, [], {"max_drop": 0.0}, False),
        (0.01, ["stem"], {}, False),
        (0.01, [], {"precision": "int8"}, True),
    ],
)
def test_another_drop_writes_a_file_again(
    run: Path, lost: float, kept: list[str], options: dict[str, Any], again: bool
) -> None:
    shutil.copy(run / "model.onnx", run / "model.int8.onnx")
    with closing(Finished.open(run)) as finished:
        manifest = finished.run.manifest
        entry = Export(
            accuracy=(manifest.accuracy.exported or 0) - lost, kept_float=kept, calibration="minmax", rounding="nearest"
        )
        manifest.exports = {"int8": entry}
        wanted = Request(**options)
        assert _asks_for_another(finished, replace(wanted, precision="int8", target=BOARD), wanted) is again


def test_a_bundle_over_ssh_continues_with_its_own_options(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    monkeypatch.setattr("export.device.remote.identify", lambda _: {"model": ""})
    monkeypatch.setattr("export.device.remote.run_remote", lambda _, path, *__, **___: sent.append(path.read_bytes()))
    monkeypatch.setattr("compressor.run.boards.import_results", lambda *_: iter(()))
    there = ["--target", "ssh://me@orin.invalid", "--max-drop", 50]
    assert "Continuing" not in export(run, *there)
    assert "Continuing with" in export(run, *there)
    words = export(run, *there, "--calibration", "percentile")
    assert "is written again: it was written with --calibration minmax, not percentile." in words
    assert sent[0] == sent[1] != sent[2]
    (path,) = (run / "bundles").glob("*.tar.gz")
    message = refused(run, *there, "--bundle", path)
    assert "it was written with --calibration percentile, not minmax. Choose another --bundle FILE" in message
    message = refused(run, *there, "--calibration", "percentile", "--bundle", path, "--board", "jetson-nano")
    assert f"it is for {BOARD}, not for jetson-nano" in message
    export(run, "--precision", "int8", "--max-drop", 50)  # for the CPU
    assert "the run has another model.int8.onnx now" in export(run, *there, "--calibration", "percentile")
    assert sent[3] == sent[2]


def test_an_int8_run_keeps_the_file_that_it_has_timed(run: Path, tmp_path: Path) -> None:
    """A file for TensorRT has another form and another name; programs use the run's own."""
    export(run, "--precision", "int8", "--max-drop", 3)
    text = (run / "recipe.yaml").read_text().replace("precision: fp32", "precision: int8", 1)
    (run / "recipe.yaml").write_text(text.replace("max_drop: 1.0", "max_drop: 3.0", 1))
    with RunFolder.open(run) as folder:
        folder.manifest.latency = folder.manifest.latency.model_copy(update={"precision": "int8"})
        own = folder.manifest.exports["int8"]
        write_deployable(folder, load_recipe(run / "recipe.yaml"), Finished(folder).task)
        changed = {name: sha256_file(run / name) for name in ("recipe.yaml", "preprocess.json")}
        folder.manifest.files = {**folder.manifest.files, **changed}
        folder.save()
    how = json.loads((run / "preprocess.json").read_text())
    assert (how["file"], how["scored"]["file"], how["scored"]["value"]) == (*["model.int8.onnx"] * 2, own.accuracy)
    checksum = sha256_file(run / "model.int8.onnx")
    export(run, "--target", "jetson-orin-nano-8gb", "--bundle", tmp_path / "orin.tar.gz", "--max-drop", 3)
    export(run, "--precision", "int8", "--rest", "fp16", "--max-drop", 3)
    assert sha256_file(run / "model.int8.onnx") == checksum
    found = exports_of(run)
    assert (found["int8"]["runtime"], found["int8.tensorrt"]["runtime"]) == ("onnxruntime", "tensorrt")
    assert found["int8"]["accuracy"] == own.accuracy
    assert "models/model.int8.tensorrt.onnx" in unpack(tmp_path / "orin.tar.gz")
    rows = {row.label: row for row in comparison(Manifest.read(run / "manifest.json"))}
    assert rows["ONNX file, model.int8.onnx"].slim == size((run / "model.int8.onnx").stat().st_size)
    image = tmp_path / "photo.png"
    Image.new("RGB", (32, 32), (200, 40, 40)).save(image)
    default, int8, fp32 = (next(predict(run, [image], precision=each))[1] for each in (None, "int8", "fp32"))
    assert default == int8 != fp32
    (run / "preprocess.json").write_text(json.dumps({**how, "scored": None}))
    assert "model.int8.onnx is there, checked when the run wrote it." in export(run, "--precision", "int8")
    assert json.loads((run / "preprocess.json").read_text())["scored"]["value"] == own.accuracy
    export(run, "--precision", "int8", "--max-drop", 3, "--rounding", "nearest", "--batch", 1)  # as the recipe has it
    message = refused(run, "--precision", "int8", "--max-drop", 2, "--rounding", "outputs")
    assert "written with --max-drop 3.0, not 2.0, --rounding nearest, not outputs." in message
    assert "Leave out --max-drop, --rounding, or start another run: compress --recipe " in message
    assert message.endswith("recipe.yaml --set export.max_drop=2.0 --set export.rounding=outputs")
    message = refused(run, "--precision", "int8", "--calibration", "entropy")
    assert message.endswith("written with --calibration minmax, not entropy. Leave out --calibration")
    assert sha256_file(run / "model.int8.onnx") == checksum
    (run / "model.int8.onnx").unlink()
    refused(run, "--precision", "int8", "--calibration", "entropy")
    export(run, "--precision", "int8")
    assert sha256_file(run / "model.int8.onnx") == checksum  # the same again
    assert "model.int8.tensorrt.onnx" in (run / "report.html").read_text(encoding="utf-8")


def test_a_network_that_failed_on_the_board_is_no_success(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.device.results import Board, DeviceResults, NetworkResult

    ours = ["--bundle", tmp_path / "orin.tar.gz"]
    export(run, "--target", "jetson-orin-nano-8gb", *ours)
    failed = NetworkResult("model", "fp32", "build-failed", "out of memory", "", 0, "", (), (), None, None)
    board = Board("10.3.0", "", "", "Orin", "", "", "", "", "7")
    came = DeviceResults("b" * 64, "jetson-orin-nano-8gb", board, {}, {"model": failed}, "d" * 64, 1, 15, 2)
    monkeypatch.setattr("export.device.results.read_results", lambda *_: came)
    arguments = ["export", str(run), *map(str, ours), "--import", "results.tar.gz"]
    result = CliRunner().invoke(app, arguments)
    message = " ".join(result.output.split())
    assert result.exit_code == 2
    assert "model (fp32): build-failed, out of memory" in message
    assert "1 of 1 networks failed on the board: model." in message
    assert json.loads((run / "manifest.json").read_text())["devices"][-1]["networks"][0]["status"] == "build-failed"


BOARD = "jetson-orin-nano-8gb"


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run for a board, with a latency budget in milliseconds that is only predicted."""
    folder = tmp_path_factory.mktemp("predicted") / "run"
    recipe = {
        "model": "tests.nets:tiny", "epochs": 1, "budgets": {"latency": "2ms"}, "agent": "uniform",
        "device": BOARD, "search": {"max_evaluations": 2, "batch_norm_batches": 2}, "export": {"engine": False},
        "pruning": {"compensate": "off"},
    }  # fmt: skip
    assert run_recipe(Recipe.model_validate(recipe), out=folder).exit_code == 4  # predicted only
    return folder


@pytest.mark.parametrize(
    ("turns_ms", "verdict", "code"),
    [((1.8, 1.9, 1.95), "kept", 0), ((2.1, 2.2, 2.4), "missed", 3), ((1.9, 1.98, 2.1), "undecided", 4)],
)
def test_a_board_decides_a_budget_in_milliseconds(
    predicted: Path,
    turns_ms: tuple[float, ...],
    verdict: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from compressor.run.boards import import_results
    from export.device.results import Board, DeviceResults, NetworkResult, Turn
    from export.engine.bench import summarise

    target, folder = BOARD, tmp_path / "run"
    shutil.copytree(predicted, folder)
    (folder / "model.pt2").write_bytes(b"exported earlier")
    assert "its latency is" in (folder / "report.html").read_text()
    turns = tuple(Turn(place, 1, (each,) * 10, {}) for place, each in enumerate(turns_ms, start=1))
    stats = summarise([each for each in turns_ms for _ in range(10)], runtime="tensorrt", version="10.3.0")
    network = NetworkResult("model.fp16", "fp16", "ok", "", "", 1, "", turns, (), stats, None)
    board = Board("10.3.0", "", "", "Orin", "", "", "", "", "7")
    came = DeviceResults("b" * 64, target, board, {}, {"model.fp16": network}, "d" * 64, 3, 15, 2)
    monkeypatch.setattr("export.device.results.read_results", lambda *_: came)
    monkeypatch.setattr("compressor.run.boards._require_own", lambda *_: ())
    (*_, line) = import_results(folder, tmp_path / "results.tar.gz", tmp_path / "orin.tar.gz")
    assert line.endswith(f"target 2.000 ms: {verdict}.")
    manifest = json.loads((folder / "manifest.json").read_text())
    (budget,) = manifest["budgets"]
    assert (budget["measured"], budget["verdict"], manifest["exit_code"]) == (turns_ms[1], verdict, code)
    assert manifest["latency"]["measured_ms"] == turns_ms[1]
    for name in ("report.html", "model.pt2"):
        assert manifest["files"][name] == sha256_file(folder / name)
    assert "not measured" not in " ".join(manifest["notes"])


@pytest.mark.parametrize(
    ("model", "capability", "expected"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", "8.7", "It may be jetson-agx-orin-32gb, jetson-agx-orin-64gb."),
        ("", "7.2", "It may be jetson-xavier-nx, jetson-agx-xavier."),
        ("NVIDIA Jetson Orin Nano Developer Kit", "8.7", ""),
        ("", "8.7", "that it is a Jetson Orin Nano 8GB was not checked by more than its compute capability 8.7."),
        ("Orin", "", "that it is a Jetson Orin Nano 8GB was not checked."),
    ],
)
def test_another_module_decides_nothing(
    predicted: Path, model: str, capability: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(predicted, tmp_path / "run"))
    _board_reports(monkeypatch, model, capability)
    given = ["--bundle", tmp_path / "orin.tar.gz", "--import", tmp_path / "results.tar.gz"]
    if expected.startswith("It may be"):
        assert expected in refused(folder, *given)
        return
    assert "target 2.000 ms: kept" in export(folder, *given)
    notes = [note for note in Manifest.read(folder / "manifest.json").notes if "name its module" in note]
    assert [note.partition(": ")[2] for note in notes] == [expected] * bool(expected)
    _board_reports(monkeypatch, "NVIDIA Orin Nano Developer Kit", "8.7")
    export(folder, *given)  # a later import of a board that does
    assert "name its module" not in (folder / "manifest.json").read_text()


def test_the_board_is_the_device_of_the_run(predicted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(predicted, tmp_path / "run"))
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace(f"device: {BOARD}", "device: jetson-agx-orin-64gb"))
    nano = "NVIDIA Jetson Orin Nano Developer Kit"
    monkeypatch.setattr("export.device.remote.identify", lambda _: {"model": nano})
    arguments = ["export", str(folder), "--target", "ssh://me@orin.invalid", "--max-drop", "50"]
    result = CliRunner().invoke(app, arguments)  # nothing is sent to another module
    message = " ".join(result.output.split())
    assert result.exit_code == 2
    assert f"jetson-agx-orin-64gb is a Jetson AGX Orin 64GB, and the board is a {nano}" in message
    assert "add --board BOARD. It may be jetson-orin-nano-4gb, jetson-orin-nano-8gb." in message
    assert [path.name for path in (folder / "bundles").iterdir()] == ["jetson-agx-orin-64gb.tar.gz"]
    _board_reports(monkeypatch, nano, "8.7")
    words = export(folder, "--bundle", tmp_path / "b.tar.gz", "--import", tmp_path / "results.tar.gz")
    assert f"The latency budget is for jetson-agx-orin-64gb, not for {BOARD}: its result stays as it is." in words


def _board_reports(monkeypatch: pytest.MonkeyPatch, model: str, capability: str) -> None:
    """Let a board of `BOARD`'s bundle have measured the slim network, in 1.9 ms."""
    from export.device.results import Board, DeviceResults, NetworkResult, Turn
    from export.engine.bench import summarise

    turns = tuple(Turn(place, 1, (1.9,) * 10, {}) for place in (1, 2, 3))
    stats = summarise([1.9] * 30, runtime="tensorrt", version="10.3.0")
    network = NetworkResult("model.fp16", "fp16", "ok", "", "", 1, "", turns, (), stats, None)
    board = Board("10.3.0", "", "", model, "Orin", capability, "", "", "7")
    came = DeviceResults("b" * 64, BOARD, board, {}, {"model.fp16": network}, "d" * 64, 3, 15, 2)
    monkeypatch.setattr("export.device.results.read_results", lambda *_: came)
    monkeypatch.setattr("compressor.run.boards._require_own", lambda *_: ())


@pytest.mark.parametrize(
    ("dense_ms", "replaced", "verdict", "code"),
    [
        ((4.0, 4.2, 4.1), ("model.int8",), "kept", 0),
        ((3.0, 3.2, 3.1), (), "missed", 3),
        ((), (), "which the board did not measure", 4),
        ((4.0, 4.2, 4.1), ("model.fp16",), "the run's model.fp16.onnx, and another one was measured", 4),
    ],
)
def test_a_board_decides_a_budget_that_is_a_share(
    predicted: Path,
    dense_ms: tuple[float, ...],
    replaced: tuple[str, ...],
    verdict: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from compressor.run.boards import import_results
    from export.device.results import Board, DeviceResults, NetworkResult, Turn
    from export.engine.bench import summarise

    folder = Path(shutil.copytree(predicted, tmp_path / "run"))
    text = (folder / "recipe.yaml").read_text()
    assert "latency: 2ms" in text
    (folder / "recipe.yaml").write_text(text.replace("latency: 2ms", "latency: 50%"))

    def measured(name: str, times: tuple[float, ...]) -> NetworkResult:
        turns = tuple(Turn(place, 1, (each,) * 10, {}) for place, each in enumerate(times, start=1))
        stats = summarise([each for each in times for _ in range(10)], runtime="tensorrt", version="10.3.0")
        return NetworkResult(name, "fp16", "ok", "", "", 1, "", turns, (), stats, None)

    times = {"dense.fp16": dense_ms, "model.fp16": (1.9, 2.0, 1.95)}
    networks = {name: measured(name, each) for name, each in times.items() if each}
    board = Board("10.3.0", "", "", "Orin", "", "", "", "", "7")
    came = DeviceResults("b" * 64, BOARD, board, {}, networks, "d" * 64, 3, 15, 2)
    monkeypatch.setattr("export.device.results.read_results", lambda *_: came)
    monkeypatch.setattr("compressor.run.boards._require_own", lambda *_: replaced)
    (*_, line) = import_results(folder, tmp_path / "results.tar.gz", tmp_path / "orin.tar.gz")
    manifest = json.loads((folder / "manifest.json").read_text())
    (budget,) = manifest["budgets"]
    if code == 4:
        assert verdict in line
        assert (budget["measured"], manifest["exit_code"]) == (None, code)
        return
    assert line.endswith(f"target 50.0%: {verdict}.")
    assert (budget["verdict"], manifest["exit_code"]) == (verdict, code)
    median = sorted(dense_ms)[1]
    assert (budget["measured"], budget["dense"], budget["target"]) == (1.95, median, median / 2)
    assert manifest["latency"]["dense_ms"] == median


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--format", "coreml"], "Choose onnx, boxes, engine, pt2"),
        (["--format", "torchscript"], "Choose onnx, boxes, engine, pt2"),
        (["--precision", "int4"], "Choose fp32, fp16, int8"),
        (["--format", "pt2", "--precision", "fp16"], "--format pt2 is written in fp32"),
        (["--format", "boxes"], "--format boxes is for runs of detection, and the task of this one is classification"),
        (["--format", "boxes", "--batch", "4"], "--format boxes does not take --batch. Leave it out, or choose"),
        (["--format", "boxes", "--precision", "int8"], "--format boxes is written in fp32"),
        (["--format", "pt2", "--opset", "13"], "--format pt2 does not take --opset"),
        (["--builder", "tensorrt"], "--format onnx does not take --builder. Leave it out, or choose --format engine"),
        (["--batch", "8..1"], "Write 8, 1..8 or 1..4..8"),
        (["--opset", "99"], "Opset 99 cannot be written: expected 13 to 20"),
        (["--calibration", "guess", "--precision", "int8"], "expected one of minmax, entropy, percentile"),
        (["--target", "jetson-orin"], "no target jetson-orin. Did you mean"),
        (["--target", "jetson-nano", "--precision", "int8"], "The Jetson Nano has no INT8 units"),
        (
            ["--target", "jetson-nano", "--precision", "int8", "--bundle", "b.tar.gz"],
            "The Jetson Nano has no INT8 units",
        ),
        (["--format", "engine", "--builder", "tensorflow"], "tensorflow is not a TensorRT module"),
        (["--bundle", "b.tar.gz"], "A bundle is for a board"),
        (["--bundle", "b.tar.gz", "--target", "jetson-nano", "--format", "pt2"], "Leave out --format"),
        (["--bundle", "b.zip", "--target", "jetson-orin-nano-8gb"], "Expected a bundle named NAME.tar.gz"),
        (["--import", "r.tar.gz"], "--import needs the bundle"),
        (["--target", "ssh://-oProxyCommand=x"], "is not an ssh address"),
        (["--target", "ssh://me@orin", "--board", "pi"], "There is no target pi"),
        (["--max-drop", "-1", "--precision", "int8"], "takes percentage points from 0 to below 100, got -1"),
        (["--max-drop", "nan", "--precision", "fp16"], "takes percentage points from 0 to below 100, got nan"),
        (["--workspace", "0", "--format", "engine"], "--workspace"),
    ],
)
def test_what_cannot_be_exported(run: Path, options: list[str], expected: str) -> None:
    assert expected in refused(run, *options)


def test_no_space_is_one_message(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise disk_error(path, OSError(28, "No space left on device"))

    for module in ("export.convert.to_onnx", "export.convert.half", "export.convert.program"):
        monkeypatch.setattr(f"{module}.write_bytes", full)
    for options in (["--batch", "4"], ["--precision", "fp16"], ["--format", "pt2"]):
        assert "No space is left on the device" in refused(run, *options)


def test_a_full_disk_leaves_nothing_half_written(run: Path, tmp_path: Path) -> None:
    export(run, "--target", BOARD, "--bundle", tmp_path / "b.tar.gz")  # the run has all precisions then
    with tiny_disk(tmp_path / "disk", 16) as disk:
        for options in (
            ["--out", disk / "copy.onnx"],
            ["--target", "jetson-orin-nano-8gb", "--bundle", disk / "b.tar.gz"],
        ):
            assert "No space is left on the device" in refused(run, *options)
            assert list(disk.iterdir()) == []


def test_a_run_without_an_export(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: tests.nets:tiny\n")
    (tmp_path / ".lock").touch()
    assert "has exported no model.onnx yet" in refused(tmp_path)


def test_there_and_back_over_ssh(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real sshd on this machine, and a stand-in for trtexec; interrupted once, and gone on with."""
    from functools import partial

    import export.device.remote
    from tests.export.device.fake_trtexec import make_trtexec
    from tests.export.device.local_sshd import SSHD, Board

    if not Path(SSHD).exists() or not shutil.which("ssh-keygen"):
        pytest.skip("there is no sshd on this machine")
    board = Board(tmp_path / "board")
    go = partial(
        export.device.remote.run_remote,
        duration_s=1, processes=1, trtexec=str(make_trtexec(tmp_path / "bin", "10.3.0")),
        ssh_options=board.options, poll_s=0.1, pause_s=0.05,
    )  # fmt: skip
    monkeypatch.setattr("export.device.remote.run_remote", go)
    know = partial(export.device.remote.identify, **{name: go.keywords[name] for name in ("trtexec", "ssh_options")})
    monkeypatch.setattr("export.device.remote.identify", know)
    try:
        board.options[0:2] = ["-F", str(tmp_path / "no-such-config")]
        assert "cannot be reached" in " ".join(_ssh(run, board.url, 2).split())
        assert (run / "bundles" / "jetson-orin-nano-8gb.tar.gz").exists()
        board.options[0:2] = ["-F", "none"]
        words = " ".join(_ssh(run, board.url, 0).split())
    finally:
        board.process.terminate()
        board.process.wait(timeout=10)
    assert "Continuing with" in words
    assert "model (fp32): ok; median 1.600 ms, p90 1.680 ms, p99 1.698 ms; largest difference" in words
    (entry,) = json.loads((run / "manifest.json").read_text())["devices"]
    assert entry["board"]["tensorrt"] == "10.3.0"
    network = next(each for each in entry["networks"] if each["name"] == "model")
    assert network["status"] == "ok"
    assert network["latency"]["median_ms"] > 0
    assert network["parity"]["max_abs"] < 1e-4


def _ssh(run: Path, url: str, code: int) -> str:
    result = CliRunner().invoke(app, ["export", str(run), "--target", url])
    assert result.exit_code == code, result.output
    return result.output
