"""A table of a device that is not here: its bundle, a plain shell with a stand-in for trtexec, and the way back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.latency.backends.gpu import shares_of_layers
from compressor.latency.remote_bundle import write_table_bundle
from compressor.latency.remote_table import table_of_results
from compressor.latency.request import Request
from compressor.latency.sampling import random_widths
from compressor.pruning.space import PruningSpace
from export.errors import ExportError
from tests.export.device.fake_trtexec import make_trtexec
from tests.latency.remote_bundle import ONCE, needs_shell, run

pytestmark = [needs_shell, pytest.mark.usefixtures("own_tables")]


def truth(space: PruningSpace, widths: np.ndarray) -> np.ndarray:
    """What the stand-in takes."""
    found = []
    for row in np.atleast_2d(widths):
        total = 0.001
        for layer in space.layers:
            c_in, c_out = int(layer.in_channels(row)), int(layer.out_channels(row))
            inputs = 1 if layer.kind == "depthwise" else c_in
            total += 0.02 + 0.0008 * np.ceil(c_out / 8) * np.ceil(inputs / 8) * np.prod(layer.kernel or (1,))
        found.append(0.05 + 0.9 * total)
    return np.asarray(found)


@pytest.fixture
def by_script(written: Path, memory: Path, tmp_path: Path) -> Path:
    """The bundle after its script was on the device."""
    folder = Path(shutil.copytree(written, tmp_path / "carry"))
    done = run(folder, make_trtexec(tmp_path / "bin", "10.3.0", rule="named", memory=str(memory)))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return folder


def test_a_table_comes_back(by_script: Path, space: PruningSpace) -> None:
    table = table_of_results(by_script)
    fields = table.fields
    assert (table.device, table.precision, fields.how, fields.block) == ("my-orin", "fp16", "measured", 8)
    assert (fields.runtime.name, fields.runtime.version) == ("tensorrt", "10.3.0")
    assert (fields.device.sku, fields.device.compute_capability) == ("Orin", "8.7")
    assert "0.624 GHz" in fields.device.clocks
    assert "profile" in fields.protocol
    network = next(iter(fields.networks.values()))
    assert network.held_out is not None
    facts = json.loads((by_script / "bundle.json").read_text())["facts"]
    roles = [each["role"] for each in facts["candidates"].values()]
    assert network.held_out.networks == roles.count("held out") > 1
    assert network.drift == 0
    assert table.covers(space)
    assert table.predict(space) == pytest.approx(truth(space, space.dense_widths)[0], rel=1e-4)
    widths = random_widths(space, 50, seed=7)
    error = np.abs(table.curve(space)(widths) / truth(space, widths) - 1)
    assert error.mean() < 0.03
    assert not (by_script / "engines").exists()


def test_layers_without_names_are_fitted_to_whole_networks(
    written: Path, memory: Path, tmp_path: Path, space: PruningSpace
) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "carry"))
    program = make_trtexec(tmp_path / "bin", "8.5.2", rule="nameless", memory=str(memory))
    assert run(folder, program, *ONCE).returncode == 0
    table = table_of_results(folder)
    assert "by a fit" in table.fields.protocol
    widths = random_widths(space, 50, seed=7)
    assert np.abs(table.curve(space)(widths) / truth(space, widths) - 1).mean() < 0.10


def test_layers_and_operators() -> None:
    owner, weighted = (0, 0, 1, 1, 2), (0, 2, 4)
    layers = [("Reformatting CopyNode for Input Tensor 0 to @0.", 0.1), ("@0. + @1.", 1.0), ("@2.", 2.0),
              ("PWN(@3.)", 0.5), ("@4.", 3.0)]  # fmt: skip
    shares = shares_of_layers(layers, owner, weighted)
    assert shares.operators_ms == pytest.approx([1.1, 2.5, 3.0])
    assert (shares.unsure, shares.trusted) == (0.0, True)
    fused = shares_of_layers([("@0. + @2.", 1.0), ("@4.", 1.0)], owner, weighted)
    assert (fused.unsure, fused.trusted) == (0.5, False)
    assert not shares_of_layers([("ForeignNode", 1.0)], owner, weighted).trusted
    assert not shares_of_layers([], owner, weighted).trusted


def test_a_killed_script_goes_on(written: Path, memory: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "carry"))
    networks = len((folder / "networks.txt").read_text().splitlines())
    killed = run(
        folder,
        make_trtexec(tmp_path / "bin", "10.3.0", rule="named", memory=str(memory), die_after=networks + 5),
        *ONCE,
    )
    assert killed.returncode == -9
    with pytest.raises(ExportError, match=r"no results\.json: the script has not finished"):
        table_of_results(folder)
    kept = {path: path.stat().st_mtime_ns for path in (folder / "results").glob("*/1-*.txt")}
    assert len(kept) == 5
    calls = tmp_path / "calls"
    program = make_trtexec(tmp_path / "bin", "10.3.0", rule="named", memory=str(memory), calls=str(calls))
    done = run(folder, program, *ONCE)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    made = calls.read_text().splitlines()
    assert sum("--onnx=" in call for call in made) == 0
    assert sum("--exportTimes=" in call for call in made) == networks + 1 - 5
    assert table_of_results(folder).device == "my-orin"


def test_another_version_does_not_mix_in(written: Path, memory: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "carry"))
    assert (
        run(
            folder, make_trtexec(tmp_path / "bin", "10.3.0", rule="named", memory=str(memory), die_after=3)
        ).returncode
        == -9
    )
    done = run(folder, make_trtexec(tmp_path / "bin", "10.13.2", rule="named", memory=str(memory)))
    assert done.returncode == 2
    assert "was started with [TensorRT 10.3.0" in done.stderr
    assert "[TensorRT 10.13.2" in done.stderr


def test_what_the_device_lacks(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "carry"))
    assert "trtexec was not found" in run(folder, tmp_path / "none").stderr
    (folder / "models" / "n01.onnx").unlink()
    done = run(folder, make_trtexec(tmp_path / "bin", "10.3.0"))
    assert (done.returncode, "copy the bundle again" in done.stderr) == (2, True)
    assert "takes a whole number" in run(folder, tmp_path, "--duration", "soon").stderr


def test_networks_that_cannot_be_built(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "carry"))
    assert run(folder, make_trtexec(tmp_path / "bin", "10.3.0", fail="build")).returncode == 1
    with pytest.raises(
        CompressorError, match=r"could not be measured on the device; dense: .*Could not find any"
    ):
        table_of_results(folder)


def test_bundles_are_never_written_over(
    written: Path, space: PruningSpace, example: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(CompressorError, match="has no results yet"):
        table_of_results(written)
    with pytest.raises(CompressorError, match="exists already"):
        write_table_bundle(space, example, written, "x", Request("m", "fp16"))
    manifest = json.loads((written / "bundle.json").read_text())
    assert manifest["order"][0] == manifest["order"][-1] == "dense"
    roles = [each["role"] for each in manifest["facts"]["candidates"].values()]
    assert roles.count("dense") == 1
    widths = [tuple(each["widths"]) for each in manifest["facts"]["candidates"].values()]
    assert len(set(widths)) == len(widths)
