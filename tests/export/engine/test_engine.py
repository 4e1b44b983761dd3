"""Engines built for real with TensorRT-RTX, which needs no GPU, the traps of its parser, and the cache of engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from export.convert.to_onnx import export_onnx
from export.engine.cuda import Device
from export.engine.engine import BuildSettings, build_engine, cached_engine, engine_key
from export.engine.engine_info import read_sidecar, require_loadable, sidecar_path
from export.engine.trt import RTX, Flavour, available, why_not
from export.errors import ExportError
from export.files import sha256_file
from tests.export.nets import SmallNet, chain_of

pytest.importorskip(RTX, reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_onnx(SmallNet(), torch.zeros(1, 3, 16, 16), path, metadata={"model": "small"})
    return path


def write(folder: Path, content: bytes) -> Path:
    path = folder / "bad.onnx"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "12.0"])
def test_builds_for_gpus_that_are_not_here(tmp_path: Path, net: Path, capability: str) -> None:
    engine = tmp_path / "net.engine"
    info = build_engine(net, engine, module=RTX, compute_capability=capability)
    assert info.compute_capabilities == (capability,)
    assert info.size == engine.stat().st_size > 10_000
    assert info.sha256 == sha256_file(engine)
    assert info.onnx_sha256 == sha256_file(net)
    assert (info.precision, info.module, info.onnx) == ("fp32", RTX, "net.onnx")
    assert info.inputs == {"input": (1, 3, 16, 16)}
    assert info.metadata == {"model": "small"}
    assert read_sidecar(engine) == info
    assert sorted(item.name for item in tmp_path.iterdir()) == ["net.engine", "net.json"]


def test_default_is_every_rtx_generation(tmp_path: Path, net: Path) -> None:
    assert build_engine(net, tmp_path / "a.engine", module=RTX).compute_capabilities == ("8.6", "8.9", "12.0")


def test_two_builds_are_the_same_bytes(tmp_path: Path, net: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        build_engine(net, tmp_path / name / "net.engine", module=RTX, compute_capability="8.9")
    for name in ("net.engine", "net.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_open_batch_wants_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(SmallNet(), torch.zeros(1, 3, 16, 16), path, dynamic_batch=True)
    with pytest.raises(ExportError, match=r"Input input has dynamic dimensions: \[-1, 3, 16, 16\]"):
        build_engine(path, tmp_path / "net.engine", module=RTX, compute_capability="8.6")
    shapes = ((1, 3, 16, 16), (4, 3, 16, 16), (8, 3, 16, 16))
    settings = BuildSettings(profile={"input": shapes})
    info = build_engine(path, tmp_path / "n.engine", module=RTX, compute_capability="8.6", settings=settings)
    assert info.settings["profile"] == {"input": [list(shape) for shape in shapes]}
    assert read_sidecar(tmp_path / "n.engine").settings == info.settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.onnx is empty"),
        (b"hello world, this is not onnx", "truncated or not an ONNX file"),
        (chain_of(["Relu"])[:-3], "truncated or not an ONNX file|is not an ONNX network"),
        (chain_of(["Relu"], opset=99), "has ONNX opset 99; TensorRT-RTX .* reads opsets 9 to 20"),
        (chain_of(["Relu", "Det", "Unique"]), r"2 operators of .*: n1 \(Det\): not supported; n2 \(Unique\)"),
        (chain_of(["Relu", "Own"]), r"an operator of .*: n1 \(Own\): .*Plugin not found"),
    ],
)
def test_files_that_the_parser_would_take_or_not_explain(
    tmp_path: Path, content: bytes, message: str
) -> None:
    target = tmp_path / "out" / "net.engine"
    with pytest.raises(ExportError, match=message):
        build_engine(write(tmp_path, content), target, module=RTX, compute_capability="8.6")
    assert not target.exists()


def test_requests_that_would_be_ignored_are_refused(tmp_path: Path, net: Path) -> None:
    def ask(message: str, capability: str = "8.6", **settings: object) -> None:
        with pytest.raises(ExportError, match=message):
            build_engine(
                net,
                tmp_path / "net.engine",
                module=RTX,
                compute_capability=capability,
                settings=BuildSettings(**settings),  # type: ignore[arg-type]
            )

    ask("does not support optimisation levels", optimisation_level=3)
    ask("does not support deep-learning accelerators", dla_core=0)
    ask("does not support version-compatible engines", version_compatible=True)
    ask("does not support hardware-compatible engines", hardware_compatible=True)
    ask(r"does not build for compute capability 8\.7: expected 7\.5, 8\.0, 8\.6", capability="8.7")
    ask("Turing GPUs .* need FP16", capability="7.5")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_the_older_engine(tmp_path: Path, net: Path) -> None:
    target = tmp_path / "net.engine"
    build_engine(net, target, module=RTX, compute_capability="8.6")
    before = target.read_bytes()
    with pytest.raises(ExportError):
        build_engine(net, target, module=RTX, compute_capability="7.5")
    assert target.read_bytes() == before
    assert read_sidecar(target).compute_capabilities == ("8.6",)


def test_damaged_engines_and_descriptions_are_refused(tmp_path: Path, net: Path) -> None:
    target = tmp_path / "net.engine"
    build_engine(net, target, module=RTX, compute_capability="8.6")
    whole, facts = target.read_bytes(), sidecar_path(target).read_text()
    target.write_bytes(whole[:-1])
    with pytest.raises(ExportError, match="checksums differ"):
        read_sidecar(target)
    target.write_bytes(whole)
    for text, message in [
        ("{", "is not valid JSON"),
        ("[]", "holds a list"),
        ("{}", "written by another version"),
        (json.dumps({"format": 1}), "does not describe an engine"),
        (facts.replace('"size"', '"siz"'), "does not describe an engine"),
    ]:
        sidecar_path(target).write_text(text)
        with pytest.raises(ExportError, match=message):
            read_sidecar(target)
    sidecar_path(target).unlink()
    with pytest.raises(ExportError, match="no engine's description"):
        read_sidecar(target)


def test_an_engine_for_elsewhere_is_refused_before_loading(tmp_path: Path, net: Path) -> None:
    info = build_engine(net, tmp_path / "net.engine", module=RTX, compute_capability="8.6")
    here = Flavour(RTX, info.version, (1, 7))
    device = Device("RTX A2000", "8.6", 12 << 30, 1200, "13.0")
    require_loadable(info, here, device)
    with pytest.raises(ExportError, match=r"is for compute capability 8\.6; the RTX 5090 of this machine has 12\.0"):
        require_loadable(info, here, Device("RTX 5090", "12.0", 32 << 30, 2400, "13.0"))
    with pytest.raises(ExportError, match=r"built with version .*; this machine has TensorRT-RTX 1\.8"):
        require_loadable(info, Flavour(RTX, "1.8.0.1", (1, 8)), device)
    with pytest.raises(ExportError, match=r"built with tensorrt_rtx_bindings; this machine has TensorRT 10\.3"):
        require_loadable(info, Flavour("tensorrt", "10.3.0", (10, 3)), device)


def test_what_is_installed() -> None:
    assert available() in ("tensorrt", RTX)
    assert "pip install 'compressor[rtx]'" in why_not()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="There is no ONNX file"):
        build_engine(tmp_path / "none.onnx", tmp_path / "net.engine", module=RTX)


def test_found_again_under_another_name(tmp_path: Path, net: Path) -> None:
    cache = tmp_path / "cache"
    first, hit = cached_engine(net, tmp_path / "a.engine", cache, module=RTX, compute_capability="8.6")
    assert not hit
    renamed = tmp_path / "other.onnx"
    renamed.write_bytes(net.read_bytes())
    second, hit = cached_engine(renamed, tmp_path / "b.engine", cache, module=RTX, compute_capability="8.6")
    assert hit
    assert (second.engine, second.onnx, second.sha256) == ("b.engine", "other.onnx", first.sha256)
    assert read_sidecar(tmp_path / "b.engine") == second
    assert (tmp_path / "a.engine").read_bytes() == (tmp_path / "b.engine").read_bytes()


@pytest.mark.parametrize("damage", ["engine", "json"])
def test_damaged_entries_are_built_anew(tmp_path: Path, net: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    cached_engine(net, tmp_path / "a.engine", cache, module=RTX, compute_capability="8.6")
    (kept,) = cache.glob(f"*.{damage}")
    kept.write_bytes(kept.read_bytes()[:-5])
    info, hit = cached_engine(net, tmp_path / "a.engine", cache, module=RTX, compute_capability="8.6")
    assert not hit
    assert read_sidecar(tmp_path / "a.engine") == info


def test_key_covers_what_matters(net: Path) -> None:
    content, plain = net.read_bytes(), BuildSettings()
    keys = [
        engine_key(content, RTX, "8.6", plain),
        engine_key(content + b"\0", RTX, "8.6", plain),
        engine_key(content, RTX, "8.9", plain),
        engine_key(content, RTX, ["8.6", "8.9"], plain),
        engine_key(content, RTX, "8.6", BuildSettings(tf32=False)),
        engine_key(content, RTX, "8.6", BuildSettings(workspace_bytes=1 << 28)),
    ]
    assert len(set(keys)) == len(keys)
    assert engine_key(content, RTX, ("8.6",), BuildSettings()) == keys[0]
