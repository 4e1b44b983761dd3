"""Devices by name, and a device of a user's own package: the page's example is used as it stands."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor
from typer.testing import CliRunner

from compressor import register_device
from compressor.budgets.energy import find_meter
from compressor.cli.app import app
from compressor.core import plugins
from compressor.core.errors import CompressorError
from compressor.latency import provider
from compressor.latency.local import LocalCpu
from compressor.latency.measured import MeasuredDevice
from compressor.latency.networks import NetworkTimes, TaggedNetwork
from compressor.latency.over_ssh import SshDevice
from compressor.latency.paired import Timing
from compressor.latency.provider import StoredTables, TableProvider, known_devices
from compressor.latency.request import Request, Turns
from compressor.pruning.space import PruningSpace
from compressor.recipe import Recipe, load_recipe
from compressor.run.device import resolved
from compressor.run.measure import measure_again
from compressor.run.onnx_files import engine_elsewhere
from compressor.run.profile import import_results, measure_table, write_bundle
from export.errors import ExportError
from tests.architecture import code_of, installed
from tests.other_device import timing

TOOL = """#!{python}
import sys
from pathlib import Path
if "--seconds" not in sys.argv:
    sys.exit("no time was given")
size = Path(sys.argv[-1]).stat().st_size
print(*(0.05 + size / 2e5 for _ in range(11)))
"""


@pytest.fixture(autouse=True)
def registered_meanwhile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a test registers and imports is gone after it."""
    monkeypatch.setattr(provider._registry, "classes", dict(provider._registry.classes))
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMPRESSOR_BACKEND", "onnxruntime-cpu")
    plugins.load_plugins.cache_clear()
    yield
    plugins.load_plugins.cache_clear()
    sys.modules.pop("mynpu", None)


def test_each_kind_of_device() -> None:
    kinds = {"local": LocalCpu, "ssh://me@orin.local": SshDevice, "jetson-nano": StoredTables, "mine": StoredTables}
    for name, kind in kinds.items():
        assert type(TableProvider.for_device(name)) is kind
        assert TableProvider.for_device(name).measures is (kind is not StoredTables)
    for unknown in ("mine", "ssh", "ssh://", "local:2"):
        with pytest.raises(CompressorError):
            TableProvider.for_device(unknown).check("fp32")


def test_a_device_that_cannot_be_timed_says_so(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match="jetson-nano cannot be measured from here"):
        TableProvider.for_device("jetson-nano").time(tmp_path, tmp_path, Request(), Turns())


def test_the_pages_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: PruningSpace, example: Tensor
) -> None:
    tool = tmp_path / "npu-run"
    tool.write_text(TOOL.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    installed(tmp_path, "mypackage", "mynpu", code_of("Add a device"))
    monkeypatch.syspath_prepend(tmp_path)
    device = TableProvider.for_device("npu:second")
    assert type(device).__module__ == "mynpu"
    assert ("npu", "npu-run") in [(each.name, each.runtime) for each in known_devices()]
    device.check("fp32")
    with pytest.raises(CompressorError, match="run in fp32 on npu:second, not in fp16"):
        device.check("fp16")
    assert set(device.steps(space.groups, "fp32").values()) == {16}
    request = Request(time_limit_s=0.0)
    table = device.table(space, example, request)
    assert (table.device, table.fields.runtime.name, table.fields.block) == ("npu:second", "npu-run", 16)
    smallest, dense = table.curve(space)(np.stack([space.min_widths, space.dense_widths]))
    assert 0 < smallest < dense
    assert device.table(space, example, request).to_json() == table.to_json()  # kept
    device.require_same(table, request)
    monkeypatch.setattr(type(device), "version", "1.1")
    with pytest.raises(CompressorError, match=r"npu-run 1\.0, and this is npu-run 1\.1"):
        device.require_same(table, request)

    from compressor.latency.assemble import export_candidate

    for name, widths in (("dense.onnx", space.dense_widths), ("slim.onnx", space.min_widths)):
        (tmp_path / name).write_bytes(export_candidate(space, space.rank(), example, widths).model)
    timing = device.time(tmp_path / "dense.onnx", tmp_path / "slim.onnx", request, Turns(repeats=2))
    assert timing.ratio.value == pytest.approx(timing.slim.median_ms / timing.dense.median_ms)
    assert timing.ratio.value < 1
    tool.write_text(f"#!{sys.executable}\nraise SystemExit('no licence')\n")
    with pytest.raises(ExportError, match="cannot run the network: no licence"):
        device.measure(TaggedNetwork(b"", (), ()), 0.1)


def test_auto_is_a_precision_that_the_device_runs() -> None:
    register_device(Plain)
    found = {"plain": "fp32", "local": "fp32", "jetson-nano": "fp16", "ssh://me@orin.local": "fp16"}
    for device, precision in found.items():
        assert resolved(Recipe(model="resnet18", device=device)).precision == precision
    assert resolved(Recipe(model="resnet18", device="plain", precision="int8")).precision == "int8"


def test_what_is_said_of_a_registered_device(tmp_path: Path) -> None:
    register_device(Plain)
    device = TableProvider.for_device("plain:second")
    assert (device.title, device.is_here, device.runs_tensorrt, device.measures) == ("plain:second", False, False, True)
    assert engine_elsewhere(device) == "Networks run on plain:second through nothing, without an engine."
    with pytest.raises(CompressorError, match="over ssh, not on plain"):
        find_meter("plain", Request(), tmp_path)
    with pytest.raises(CompressorError) as caught:
        TableProvider.for_device("plan").check("fp32")
    assert "Did you mean plain or local?" in caught.value.hint
    with pytest.raises(CompressorError, match="plain is measured from here and needs no bundle"):
        list(write_bundle(Recipe(model="resnet18", device="plain"), tmp_path / "bundle"))
    with pytest.raises(CompressorError, match="plain is measured from here"):
        list(import_results(tmp_path, "plain"))
    with pytest.raises(CompressorError, match="jetson-nano cannot be measured from here"):
        list(measure_table(Recipe(model="resnet18", device="jetson-nano")))


def test_a_time_limit_is_for_registered_devices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    register_device(Plain)
    limits: list[object] = []
    monkeypatch.setattr("compressor.run.profile.measure_table", lambda recipe, limit: limits.append(limit) or ["done"])
    result = CliRunner().invoke(app, ["profile", "--model", "resnet18", "--device", "plain", "--time-limit", "5s"])
    assert (result.exit_code, limits) == (0, ["5s"]), result.output


def test_a_run_is_measured_again_on_its_device(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_device(Plain)
    monkeypatch.setattr("compressor.latency.local.measured", lambda *_: timing([2.0] * 9, [1.0] * 9))
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)

    def again(device: str, runtime: str) -> list[str]:
        (folder / "recipe.yaml").write_text(load_recipe(finished / "recipe.yaml").changed({"device": device}).to_yaml())
        manifest = json.loads((finished / "manifest.json").read_text())
        manifest["latency"].update(device=device, runtime=runtime)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return list(measure_again(folder))

    here = "these times are from this machine's CPU."
    assert not any(here in line for line in again("local", "onnxruntime-cpu 1"))
    assert again("local", "tensorrt 10.3")[0] == f"The run is for this machine's GPU; {here}"
    assert again("jetson-nano", "tensorrt")[0] == f"The run is for jetson-nano; {here}"
    lines = again("plain", "nothing 1")
    assert "median 1.000 ms" in lines[0]
    assert "(nothing " in lines[0]
    assert not any(here in line for line in lines)
    monkeypatch.setattr("compressor.latency.local.measured", lambda *_: timing([2.0], [1.0]))
    assert any(
        "slim takes 50.0% of the dense network's time, 95 % interval not known, after" in line
        for line in again("local", "onnxruntime-cpu 1")
    )


@pytest.mark.parametrize(
    ("device", "precision", "form", "kept"),
    [
        ("jetson-nano", "int8", "tensorrt", False),
        ("jetson-nano", "fp16", "", False),
        ("local", "mixed", "tensorrt", False),
        ("local", "int8", "onnxruntime", True),
    ],
)
def test_the_cpu_takes_a_devices_place_with_files_that_it_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, precision: str, form: str, kept: bool
) -> None:
    seen: list[tuple[str, bool]] = []

    def measured(dense: Path, slim: Path, request: Request, turns: Turns) -> Timing:
        seen.append((request.precision, (dense.parent.parent, slim.parent) == (folder, folder)))
        return timing([2.0] * 9, [1.0] * 9)

    monkeypatch.setattr("compressor.latency.local.measured", measured)
    folder, delivered = tmp_path / "run", f"model.{precision}.onnx"
    shutil.copytree(finished, folder)
    shutil.copy(folder / "model.onnx", folder / delivered)
    changed = load_recipe(folder / "recipe.yaml").changed({"device": device, "precision": precision})
    (folder / "recipe.yaml").write_text(changed.to_yaml())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["latency"].update(device=device, runtime="tensorrt 10.3")
    manifest["exports"] = {precision: {"file": delivered, "runtime": form}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lines = list(measure_again(folder))
    assert seen == [(precision, False) if kept else ("fp32", True)]  # as they are, not converted
    assert (f"Both networks are in FP32: {delivered} is not for this CPU." in lines) == (not kept)


class Plain(MeasuredDevice):
    name = "plain"
    runtime = "nothing"

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        return NetworkTimes(np.ones(3), np.zeros((0, network.operators)))


def test_names_that_are_taken_or_missing() -> None:
    assert register_device(Plain) is Plain
    register_device(Plain)  # the same class once more, as after a reload

    class Other(Plain):
        pass

    with pytest.raises(CompressorError, match=r"'plain' of \S+:\S+Other is taken by \S*test_provider:Plain\."):
        register_device(Other)
    for taken, place in (("local", "compressor.latency.local"), ("ssh", "compressor.latency.over_ssh")):
        Other.name = taken
        with pytest.raises(CompressorError, match=rf"Other is taken by {place}"):
            register_device(Other)
    for bad in ("", "a b", "a:b"):
        Other.name = bad
        with pytest.raises(CompressorError, match="has the name"):
            register_device(Other)
    with pytest.raises(CompressorError, match="no subclass of TableProvider"):
        register_device(dict)  # type: ignore[type-var]
    assert import_module("compressor.latency.local").LocalCpu is LocalCpu
