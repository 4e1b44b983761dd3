"""`python -m export build | measure | verify`, as on a board, with ONNX Runtime where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from export.__main__ import main
from export.convert.half import convert_half
from export.convert.parity import read_reference, verify
from export.convert.to_onnx import export_onnx, reference_outputs
from export.engine.bench import OnnxRunner
from export.engine.engine_info import read_sidecar
from export.engine.trt import RTX
from export.errors import ExportError
from export.files import sha256_file
from tests.export.nets import SmallNet, write_reference

INPUTS = np.random.default_rng(5).standard_normal((4, 3, 16, 16)).astype(np.float32)
QUICK = ["--warmup", "0.01", "--duration", "0.05", "--runtime", "onnxruntime"]


@pytest.fixture
def net(tmp_path: Path) -> Path:
    model, path = SmallNet(), tmp_path / "net.onnx"
    export_onnx(model, torch.zeros(1, 3, 16, 16), path)
    write_reference(tmp_path / "reference.npz", INPUTS, reference_outputs(model, INPUTS)[0])
    return path


def test_build(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(RTX, reason="TensorRT-RTX is not installed")
    assert main(["build", str(net), "--module", RTX, "--compute-capability", "8.6"]) == 0
    printed = capsys.readouterr().out
    assert "net.engine: fp32" in printed
    assert "compute capability 8.6" in printed
    assert read_sidecar(net.with_suffix(".engine")).onnx_sha256 == sha256_file(net)


def test_build_for_a_range_of_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(RTX, reason="TensorRT-RTX is not installed")
    path = tmp_path / "open.onnx"
    export_onnx(SmallNet(), torch.zeros(1, 3, 16, 16), path, dynamic_batch=True)
    options = ["build", str(path), "--module", RTX, "--compute-capability", "8.6"]
    assert main(options) == 2
    assert "has dynamic dimensions" in capsys.readouterr().err
    assert main([*options, "--batch", "1..2..4"]) == 0
    shapes = [[size, 3, 16, 16] for size in (1, 2, 4)]
    assert read_sidecar(path.with_suffix(".engine")).settings["profile"] == {"input": shapes}


def test_measure_in_processes(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = net.with_name("latency.json")
    assert main(["measure", str(net), *QUICK, "--processes", "2", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["latency"]["runs"] == len(found["times_ms"]) >= 14  # 7 at the least, from each process
    assert found["onnx_sha256"] == sha256_file(net)
    assert found["latency"]["runtime"] == "onnxruntime"
    assert 0 < found["latency"]["median_ms"] <= found["latency"]["p99_ms"]
    assert found["board"]["machine"]
    assert "median" in capsys.readouterr().out


def test_measure_batches_in_streams_at_a_percentile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, target = tmp_path / "open.onnx", tmp_path / "latency.json"
    export_onnx(SmallNet(), torch.zeros(1, 3, 16, 16), path, dynamic_batch=True)
    load = ["--batch", "4", "--streams", "2", "--percentile", "75"]
    assert main(["measure", str(path), *QUICK, "--processes", "1", *load, "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert (found["latency"]["batch"], found["latency"]["streams"]) == (4, 2)
    assert found["percentile_ms"] == pytest.approx(float(np.quantile(found["times_ms"], 0.75)))
    printed = capsys.readouterr().out
    assert f"p75 {found['percentile_ms']:.3f} ms" in printed
    assert f"batch 4, 2 streams, 1 thread: {8e3 / found['latency']['mean_ms']:.1f} inputs a second" in printed


def test_another_batch_than_the_files_is_refused(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", str(net), *QUICK, "--processes", "1", "--batch", "4"]) == 2
    assert "takes batches of 1, not of 4" in capsys.readouterr().err
    for wrong in (["--streams", "0"], ["--percentile", "100"], ["--threads", "two"]):
        with pytest.raises(SystemExit) as ended:
            main(["measure", str(net), *wrong])
        assert ended.value.code == 2
    assert "argument --streams: expected 1 or more, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["measure", *QUICK], ["verify", "--runtime", "onnxruntime"]])
def test_more_threads_than_cores_are_refused(
    command: list[str], net: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command[0], str(net), *command[1:], "--threads", "2000"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 2000 threads were requested")
    assert "Use --threads" in said


def test_verify(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(net), "--runtime", "onnxruntime"]) == 0
    assert "same first class for 100.0% of 4 inputs" in capsys.readouterr().out
    half = net.with_name("net.fp16.onnx")
    convert_half(net, half, inputs=INPUTS)
    target = net.with_name("v.json")
    assert main(["verify", str(half), "--runtime", "onnxruntime", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["precision"] == "fp16"
    assert 0 < found["parity"]["max_abs"] < 0.02


def test_verify_refuses_other_outputs(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = read_reference(net.with_name("reference.npz"))
    write_reference(net.with_name("reference.npz"), reference.inputs, reference.outputs + 0.5)
    assert main(["verify", str(net), "--runtime", "onnxruntime"]) == 2
    assert "differs from the network by 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["measure", "none.onnx"], "There is no ONNX file none.onnx"),
        (["verify", "none.onnx"], "There is no ONNX file none.onnx"),
        (["build", "none.onnx"], "There is no ONNX file none.onnx"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}.\n"


def test_a_process_that_fails_says_why(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["measure", str(net), "--runtime", "engine", "--processes", "2", "--duration", "0.1"]
    assert main(options) == 2
    assert "There is no engine" in capsys.readouterr().err


def test_no_traceback_from_the_shell(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-m", "export", "verify", str(tmp_path / "empty.onnx")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith("is empty. Export the network again, and copy all of the file.")


def test_references_of_numpy_are_read(tmp_path: Path) -> None:
    outputs = INPUTS.reshape(4, -1)[:, :10]
    write_reference(tmp_path / "a.npz", INPUTS, outputs)
    back = read_reference(tmp_path / "a.npz")
    assert np.array_equal(back.inputs, INPUTS)
    assert np.array_equal(back.outputs, outputs)
    parity = verify(outputs, back, "it", precision="fp32")
    assert (parity.max_abs, parity.samples) == (0.0, 4)


def test_damaged_references(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    with pytest.raises(ExportError, match="There is no reference file"):
        read_reference(path)
    write_reference(path, INPUTS, INPUTS)
    for content in (b"", b"noise", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(ExportError, match="is not a reference"):
            read_reference(path)
    np.savez(path, inputs=np.array([{"a": 1}], dtype=object), outputs=np.zeros(1))
    with pytest.raises(ExportError, match="is not a reference"):  # pickled objects are not loaded
        read_reference(path)
    write_reference(path, INPUTS, INPUTS[:1])
    with pytest.raises(ExportError, match="differ in number"):
        read_reference(path)


def test_run_for_ends_in_time(net: Path) -> None:
    from export.engine.bench import run_for

    assert len(run_for(OnnxRunner(net), 0.02)) >= 7
