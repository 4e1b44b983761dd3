"""The engine cache: what is the same is found, what differs in anything that matters is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.convert.to_onnx import export_onnx
from export.engine.engine import BuildSettings, cached_engine, engine_key
from export.engine.engine_info import read_sidecar
from export.engine.trt import RTX
from tests.export.nets import SmallNet

pytest.importorskip(RTX, reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_onnx(SmallNet(), torch.zeros(1, 3, 16, 16), path)
    return path


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
