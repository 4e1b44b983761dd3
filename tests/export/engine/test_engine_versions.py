"""What the builder asks of each version of TensorRT, against stand-ins with that version's names only."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.engine import engine
from export.engine.cuda import Device
from export.engine.engine import BuildSettings, build_engine
from export.engine.trt import Flavour, Messages, available, why_not
from export.errors import ExportError
from tests.export.engine.fake_trt import VERSIONS, make_module, release
from tests.export.nets import chain_of

ORIN = Device("Orin", "8.7", 8 << 30, 1020, "12.6")


@pytest.fixture(autouse=True)
def _on_a_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_device", lambda: ORIN)
    monkeypatch.setattr(Messages, "_loggers", {})


def install(monkeypatch: pytest.MonkeyPatch, version: str, **more: Any) -> list[tuple[Any, ...]]:
    module = make_module(version, **more)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module.log  # type: ignore[no-any-return]


def source(folder: Path, kinds: list[str], dtype: type = np.float32, opset: int = 17) -> Path:
    path = folder / "net.onnx"
    path.write_bytes(chain_of(kinds, dtype=dtype, opset=opset))
    return path


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_typing_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, precision: str
) -> None:
    log = install(monkeypatch, version)
    kinds = ["QuantizeLinear", "Relu"] if precision == "int8" else ["Relu"]
    dtype = np.float16 if precision == "fp16" else np.float32
    info = build_engine(source(tmp_path, kinds, dtype), tmp_path / "net.engine", module="tensorrt")
    created = next(entry[1] for entry in log if entry[0] == "create_network")
    flags = [entry[1] for entry in log if entry[0] == "set_flag"]
    if release(version) < (10, 0):
        assert created == 1  # explicit batch
        assert flags == {"fp32": [], "fp16": ["FP16"], "int8": ["FP16", "INT8"]}[precision]
    else:
        assert created == (2 if release(version) < (11, 0) else 0)  # strongly typed: 1 << 1, then always
        assert flags == []
    assert ("memory", "WORKSPACE", 1 << 30) in log
    assert (info.version, info.device, info.compute_capabilities) == (version, "Orin", ("8.7",))
    assert (tmp_path / "net.engine").read_bytes() == f"engine of {version}".encode()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    log = install(monkeypatch, version, dla_cores=2)
    wanted: dict[str, Any] = {"dla_core": 1, "tf32": False, "workspace_bytes": 1 << 28}
    if release(version) >= (8, 6):
        wanted.update(optimisation_level=4, version_compatible=True, hardware_compatible=True)
    build_engine(
        source(tmp_path, ["Relu"], np.float16),
        tmp_path / "net.engine",
        module="tensorrt",
        settings=BuildSettings(**wanted),
    )
    flags = [entry[1] for entry in log if entry[0] == "set_flag"]
    assert "GPU_FALLBACK" in flags
    assert ("DLA_core", 1) in log
    assert ("clear_flag", "TF32") in log
    assert ("memory", "WORKSPACE", 1 << 28) in log
    assert ("VERSION_COMPATIBLE" in flags) == (release(version) >= (8, 6))
    assert (("builder_optimization_level", 4) in log) == (release(version) >= (8, 6))


def test_settings_that_a_version_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "8.5.2.2")
    net = source(tmp_path, ["Relu"])
    for setting in ("version_compatible", "hardware_compatible"):
        with pytest.raises(ExportError, match=r"TensorRT 8\.5\.2\.2 does not support .*-compatible engines"):
            build_engine(net, tmp_path / "e", module="tensorrt", settings=BuildSettings(**{setting: True}))
    with pytest.raises(ExportError, match="computes in FP16 or INT8; the file is FP32"):
        build_engine(net, tmp_path / "e", module="tensorrt", settings=BuildSettings(dla_core=0))
    half = source(tmp_path, ["Relu"], np.float16)
    with pytest.raises(ExportError, match="accelerator 0 was requested; this device has 0"):
        build_engine(half, tmp_path / "e", module="tensorrt", settings=BuildSettings(dla_core=0))
    newer = source(tmp_path, ["Relu"], opset=18)
    with pytest.raises(ExportError, match=r"has ONNX opset 18; TensorRT 8\.5\.2\.2 reads opsets 9 to 17"):
        build_engine(newer, tmp_path / "e", module="tensorrt")


@pytest.mark.parametrize("version", VERSIONS)
def test_all_unsupported_operators_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    install(monkeypatch, version)
    net = source(tmp_path, ["Relu", "Det", "Relu", "Unique"])
    with pytest.raises(
        ExportError, match=r"2 operators .*n1 \(Det\): not supported; n3 \(Unique\): not supported"
    ):
        build_engine(net, tmp_path / "net.engine", module="tensorrt")


def test_build_errors_are_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "10.3.0.30", build_error="Error Code 10: no implementation for node\n /conv1/Conv.")
    net = source(tmp_path, ["Relu"])
    with pytest.raises(
        ExportError, match=r"cannot build .*: Error Code 10: no implementation for node /conv1/Conv\.$"
    ):
        build_engine(net, tmp_path / "net.engine", module="tensorrt")


def test_timings_are_kept_by_device_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(monkeypatch, "10.3.0.30")
    net, folder = source(tmp_path, ["Relu"]), tmp_path / "timings"
    for _ in range(2):
        build_engine(net, tmp_path / "net.engine", module="tensorrt", timing_cache=folder)
    assert [entry[1] for entry in log if entry[0] == "cache"] == [b"", b"+timed"]
    (kept,) = folder.iterdir()
    assert kept.name == "Orin-8.7-10.3.0.30.timing"
    kept.write_bytes(b"foreign")
    build_engine(net, tmp_path / "net.engine", module="tensorrt", timing_cache=folder)
    assert kept.read_bytes() == b"+timed"  # a cache that does not fit is started anew


def test_tensorrt_builds_for_the_gpu_here_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "10.3.0.30")
    net = source(tmp_path, ["Relu"])
    with pytest.raises(ExportError, match=r"for the GPU of this machine \(Orin, .* 8\.7\), not for 8\.6"):
        build_engine(net, tmp_path / "e", module="tensorrt", compute_capability="8.6")
    monkeypatch.setattr(engine, "find_device", lambda: None)
    with pytest.raises(ExportError, match="builds an engine on the GPU that the engine is for, and no GPU"):
        build_engine(net, tmp_path / "e", module="tensorrt")


def test_versions_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = source(tmp_path, ["Relu"])
    install(monkeypatch, "8.2.1.8")
    with pytest.raises(ExportError, match=r"TensorRT 8\.2\.1\.8 is too old"):
        build_engine(net, tmp_path / "e", module="tensorrt")
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "unknown")
    with pytest.raises(ExportError, match="has no readable version"):
        build_engine(net, tmp_path / "e", module="tensorrt")
    with pytest.raises(ExportError, match="tensorflow is not a TensorRT module"):
        build_engine(net, tmp_path / "e", module="tensorflow")


def test_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)  # import then fails as for a missing module
    assert available() is None
    assert "No TensorRT is installed" in why_not()
    with pytest.raises(ExportError, match="Install TensorRT-RTX with: pip install"):
        build_engine(source(tmp_path, ["Relu"]), tmp_path / "e")
    with pytest.raises(ExportError, match="tensorrt cannot be used"):
        build_engine(source(tmp_path, ["Relu"]), tmp_path / "e", module="tensorrt")


def test_external_weights_are_read_from_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    log = install(monkeypatch, "10.3.0.30")
    path = source(tmp_path, ["Relu"])
    onnx.save(onnx.load(path), path, save_as_external_data=True, size_threshold=0)
    build_engine(path, tmp_path / "net.engine", module="tensorrt")
    assert ("parse_from_file", str(path)) in log


def test_facts_of_rtx() -> None:
    facts = Flavour("tensorrt_rtx_bindings", "1.7.1.116", (1, 7))
    assert facts.title == "TensorRT-RTX 1.7.1.116"
    assert (facts.strongly_typed, facts.explicit_batch_flag, facts.precision_flags) == ("flag", False, False)
    assert not facts.optimisation_level
    assert facts.opsets[-1] == 20
