"""A table of a device that is not here: its bundle, a plain shell with a stand-in for trtexec, and the way back."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.job import latency_table
from compressor.latency import carry
from compressor.latency.carried import table_of_results
from compressor.latency.carry import write_table_bundle
from compressor.latency.design import random_widths
from compressor.latency.devices import devices, find_table
from compressor.latency.fused import shares_of_layers
from compressor.latency.table import LatencyTable
from compressor.latency.user_tables import keep, tables_folder
from compressor.pruning.space import PruningSpace
from compressor.recipe import parse_recipe
from export.archive import CHECKSUMS, checksums, unpack
from export.errors import ExportError
from tests.export.fake_trtexec import known_layers, make_trtexec
from tests.latency.conftest import SmallNet

TOOLS = ["cat", "cut", "gzip", "head", "mkdir", "mv", "rm", "sha256sum", "sort", "tail", "tar", "tr", "wc"]
FAST = ("--duration", "1", "--warmup", "0", "--processes", "2")
pytestmark = pytest.mark.skipif(os.name == "nt" or not shutil.which("dash"), reason="needs a POSIX shell")


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def written(space: PruningSpace, example: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle."""
    patch = pytest.MonkeyPatch()
    patch.setattr(carry, "LEVELS", 3)
    patch.setattr(carry, "HELD_OUT", 4)
    folder = tmp_path_factory.mktemp("carry") / "carry"
    write_table_bundle(space, example, folder, device="my-orin", model="small", precision="fp16")
    patch.undo()
    return folder


@pytest.fixture(scope="module")
def memory(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stand-in makes of each network, worked out here once."""
    folder = tmp_path_factory.mktemp("memory")
    for path in (written / "models").iterdir():
        for rule in ("named", "nameless"):
            known_layers(path.read_bytes(), rule, folder)
    return folder


def run(folder: Path, trtexec: Path, *options: str, shell: str = "dash") -> subprocess.CompletedProcess[str]:
    """Run the script with nothing on the path but coreutils."""
    tools = folder.parent / "tools"
    if not tools.exists():
        tools.mkdir()
        for name in TOOLS:
            (tools / name).symlink_to(str(shutil.which(name)))
    return subprocess.run(
        [str(shutil.which(shell)), str(folder / "run.sh"), *(options or FAST)],
        env={"PATH": str(tools), "TRTEXEC": str(trtexec)},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def measured(written: Path, memory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle after it was on the device."""
    folder = shutil.copytree(written, tmp_path_factory.mktemp("device") / "carry")
    done = run(folder, make_trtexec(folder.parent / "bin", "10.3.0", rule="named", memory=str(memory)))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return Path(folder)


@pytest.fixture
def back(measured: Path, tmp_path: Path) -> Path:
    """A copy of the measured bundle to spoil."""
    return Path(shutil.copytree(measured, tmp_path / "carry"))


def respoil(folder: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Change the results and make their checksums right again."""
    files = unpack(folder / "results.tar.gz")
    change(files)
    files.pop(CHECKSUMS, None)
    files[CHECKSUMS] = checksums(files)
    with tarfile.open(folder / "results.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"results/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return folder


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


def test_a_table_comes_back(measured: Path, space: PruningSpace) -> None:
    table = table_of_results(measured)
    fields = table.fields
    assert (table.device, table.precision, fields.how, fields.block) == ("my-orin", "fp16", "measured", 8)
    assert (fields.runtime.name, fields.runtime.version) == ("tensorrt", "10.3.0")
    assert (fields.device.sku, fields.device.compute_capability) == ("Orin", "8.7")
    assert "0.624 GHz" in fields.device.clocks
    assert "profile" in fields.protocol
    network = next(iter(fields.networks.values()))
    assert network.held_out is not None
    facts = json.loads((measured / "bundle.json").read_text())["facts"]
    roles = [each["role"] for each in facts["candidates"].values()]
    assert network.held_out.networks == roles.count("held out") > 1
    assert network.drift == 0
    assert table.covers(space)
    assert table.predict(space) == pytest.approx(truth(space, space.dense_widths)[0], rel=1e-4)
    widths = random_widths(space, 50, seed=7)
    error = np.abs(table.curve(space)(widths) / truth(space, widths) - 1)
    assert error.mean() < 0.03
    assert not (measured / "engines").exists()


def test_layers_without_names_are_fitted_to_whole_networks(
    written: Path, memory: Path, tmp_path: Path, space: PruningSpace
) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "carry"))
    assert (
        run(folder, make_trtexec(tmp_path / "bin", "8.5.2", rule="nameless", memory=str(memory))).returncode
        == 0
    )
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
    )
    assert killed.returncode == -9
    with pytest.raises(ExportError, match=r"no results\.json: the script has not come to its end"):
        table_of_results(folder)
    kept = {path: path.stat().st_mtime_ns for path in (folder / "results").glob("*/1-*.txt")}
    assert len(kept) == 5
    calls = tmp_path / "calls"
    done = run(
        folder, make_trtexec(tmp_path / "bin", "10.3.0", rule="named", memory=str(memory), calls=str(calls))
    )
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    made = calls.read_text().splitlines()
    assert sum("--onnx=" in call for call in made) == 0
    assert sum("--exportTimes=" in call for call in made) == 2 * (networks + 1) - 5
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
    assert "was begun with [TensorRT 10.3.0" in done.stderr
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


def _json(files: dict[str, bytes], name: str, **changes: object) -> None:
    files[name] = json.dumps({**json.loads(files[name]), **changes}).encode()


SPOILT: list[tuple[str, Callable[[dict[str, bytes]], None]]] = [
    (r"mixes measurements: n01/1-2.txt is of the board 'other'", lambda f: _json(f, "n01/1-2.json", board="other")),
    (r"mixes measurements: .* version of TensorRT '8.5.2'", lambda f: _json(f, "n01/1-2.json", tensorrt="8.5.2")),
    (r"mixes measurements: .* power mode '7W'", lambda f: _json(f, "n01/1-2.json", power_mode="7W")),
    (r"lacks 1 measurements, such as n01 in turn 1", lambda f: f.pop("n01/1-2.txt") and None),
    (r"lacks \d+ networks", lambda f: _json(f, "results.json", networks=json.loads(f["results.json"])["networks"][:3])),
    (r"belongs to another bundle", lambda f: _json(f, "results.json", bundle="0" * 64)),
    (r"another version of the program", lambda f: _json(f, "results.json", format=9)),
    (r"n01/1-2.txt is no list of times", lambda f: f.update({"n01/1-2.txt": b"-5\n"})),
    (r"n01/1-2.txt is no list of times", lambda f: f.update({"n01/1-2.txt": b"nan\n"})),
    (r"n01/1-2.txt says that a network took 0 ms", lambda f: f.update({"n01/1-2.txt": b"0\n"})),
    (r"results.json is no JSON", lambda f: f.update({"results.json": b"{"})),
    (r"results.json holds a list", lambda f: f.update({"results.json": b"[]"})),
    (r"cannot be understood", lambda f: _json(f, "results.json", networks=[1])),
    (r"cannot be understood", lambda f: _json(f, "results.json", processes="many")),
    (r"cannot be understood.*0 turns", lambda f: _json(f, "results.json", processes=0)),
    (r"cannot be understood", lambda f: _json(f, "results.json", processes=10**9)),
    (r"cannot be understood", lambda f: _json(f, "n01/1-2.json", after=[])),
    (r"cannot be understood", lambda f: _json(f, "n01/1-2.json", after={"17000000.gpu": float("inf")})),
]  # fmt: skip


@pytest.mark.parametrize(("message", "change"), SPOILT)
def test_results_that_do_not_belong_together(
    back: Path, message: str, change: Callable[[dict[str, bytes]], None]
) -> None:
    with pytest.raises((CompressorError, ExportError), match=message):
        table_of_results(respoil(back, change))


def test_hostile_and_damaged_archives(back: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in [
        ("../../etc/x", "leaves the archive's folder"),
        ("/etc/x", "leaves"),
        ("a\\b", "leaves"),
    ]:
        with tarfile.open(back / "results.tar.gz", "w:gz") as archive:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
        with pytest.raises(ExportError, match=message):
            table_of_results(back)
    (back / "results.tar.gz").write_bytes(b"noise")
    with pytest.raises(ExportError, match=r"is no whole \.tar\.gz"):
        table_of_results(back)
    monkeypatch.setattr("export.timing_results.LARGEST_RESULTS", 1000)
    with pytest.raises(ExportError, match="unpacks to more than"):
        table_of_results(back / "results")


def test_a_changed_bundle(back: Path, tmp_path: Path) -> None:
    text = (back / "bundle.json").read_text()
    (back / "bundle.json").write_text(text.replace("my-orin", "another"))
    with pytest.raises(ExportError, match=r"checksum of bundle\.json does not match"):
        table_of_results(back)
    with pytest.raises(CompressorError, match="There is no folder"):
        table_of_results(tmp_path / "nothing")
    with pytest.raises(CompressorError, match=r"is no bundle: it has no bundle\.json"):
        table_of_results(tmp_path)


def test_times_in_another_unit(back: Path) -> None:
    def shrink(files: dict[str, bytes]) -> None:
        for name in files:
            if name.endswith(".txt") and name.count("/") == 1:
                files[name] = b"1001\n" * 21

    respoil(back, shrink)
    facts = json.loads((back / "bundle.json").read_text())
    for layer in facts["facts"]["layout"]["layers"]:
        layer["out_hw"] = [4096, 4096]
    content = (json.dumps(facts) + "\n").encode()
    (back / "bundle.json").write_bytes(content)
    sums = [
        line for line in (back / CHECKSUMS).read_text().splitlines() if not line.endswith("  bundle.json")
    ]
    import hashlib

    (back / CHECKSUMS).write_text(
        "\n".join([*sums, f"{hashlib.sha256(content).hexdigest()}  bundle.json", ""])
    )
    digest = hashlib.sha256((back / CHECKSUMS).read_bytes()).hexdigest()
    respoil(back, lambda files: _json(files, "results.json", bundle=digest))
    with pytest.raises(CompressorError, match="no device is that fast"):
        table_of_results(back)


def test_kept_tables_are_found(measured: Path, space: PruningSpace, said: list[str]) -> None:
    table = table_of_results(measured)
    path = keep(table)
    assert path.parent == tables_folder()
    assert LatencyTable.load("my-orin", precision="fp16").predict(space) == table.predict(space)
    assert [entry.how for entry in devices() if entry.name == "my-orin"] == [
        f"measured by you on {table.fields.date}, 1 network"
    ]
    assert keep(table) == path  # the same measurements again change nothing
    with pytest.raises(CompressorError, match="kept already, as the device my-orin"):
        keep(table_of_results(measured, "other-name"))
    with pytest.raises(
        CompressorError, match=r"no latency table of my-orin in int8\. It was measured in fp16"
    ):
        find_table("my-orin", "int8")
    path.write_text("{")
    assert [entry.name for entry in devices()].count("my-orin") == 0
    assert any("is damaged" in line and "left out" in line for line in said)


def test_a_shipped_name_is_taken_only_by_its_own_module(measured: Path, said: list[str]) -> None:
    with pytest.raises(
        CompressorError, match=r"jetson-nano has compute capability 5\.3; this was measured on Orin"
    ):
        keep(table_of_results(measured, "jetson-nano"))
    keep(table_of_results(measured, "jetson-orin-nano-8gb"))
    assert not find_table("jetson-orin-nano-8gb", "fp16").estimated
    assert any("takes the shipped one's place" in line for line in said)
    assert find_table("jetson-orin-nano-8gb", "fp32").estimated


class Straight(SmallNet):
    """The small network without its addition: other groups, but no operator that it has not."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(self.one(self.stem(x))))
        return self.head(self.narrow(self.deep(self.wide(x))).mean((2, 3)))


def test_other_networks_keep_the_shipped_estimate(
    measured: Path, space: PruningSpace, said: list[str]
) -> None:
    name = "jetson-orin-nano-8gb"
    table = table_of_results(measured, name)
    estimated = LatencyTable.load(name, "fp16", space=space)
    assert estimated.estimated
    keep(table)
    assert [entry.how.split()[0] for entry in devices() if entry.name == name] == ["estimated:", "measured"]
    assert LatencyTable.load(name, "fp16", space=space).to_json() == table.to_json()
    assert any("takes the shipped one's place" in line for line in said)

    said.clear()
    larger = PruningSpace(SmallNet().eval(), torch.zeros(1, 3, 24, 24), granularity=8)
    found = LatencyTable.load(name, "fp16", space=larger)
    assert found.estimated
    assert found.predict(larger) > estimated.predict(space)
    (line,) = said
    assert re.search(
        r"other networks only: .* lacks 4 of .* operators, such as: .* network is estimated", line
    )
    recipe = parse_recipe({"model": "resnet18", "device": name, "precision": "fp16"}, "test")
    assert latency_table(recipe, larger, torch.zeros(1, 3, 24, 24)).to_json() == found.to_json()
    assert said[-1] == f"The latency of {name} is estimated, not measured."

    said.clear()
    straight = PruningSpace(Straight().eval(), torch.zeros(1, 3, 16, 16), granularity=8)
    together = LatencyTable.load(name, "fp16", space=straight)
    assert not together.estimated
    assert together.predict(straight) == pytest.approx(table.predict(space), rel=0.2)
    assert any("was not measured on" in line and "operators of others" in line for line in said)


def test_where_nothing_is_shipped_a_table_says_what_it_lacks(measured: Path) -> None:
    keep(table_of_results(measured))
    larger = PruningSpace(SmallNet().eval(), torch.zeros(1, 3, 24, 24), granularity=8)
    with pytest.raises(CompressorError, match=r"table of my-orin lacks 4 of this network's operators"):
        LatencyTable.load("my-orin", "fp16", space=larger).predict(larger)


def test_another_board_of_the_same_name(measured: Path, back: Path) -> None:
    keep(table_of_results(measured))

    def other(files: dict[str, bytes]) -> None:
        for name in files:
            if name == "results.json" or (name.count("/") == 1 and json_of_a_turn(name)):
                _json(files, name, board="0123456789abcdef")

    with pytest.raises(
        CompressorError, match="kept from another state of it: the board is 'board 0123456789abcdef'"
    ):
        keep(table_of_results(respoil(back, other)))


def json_of_a_turn(name: str) -> bool:
    return name.endswith(".json") and name.split("/")[1][0].isdigit()


def test_bundles_are_never_written_over(
    written: Path, space: PruningSpace, example: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(CompressorError, match="has no results yet"):
        table_of_results(written)
    with pytest.raises(CompressorError, match="exists already"):
        write_table_bundle(space, example, written, device="x", model="m", precision="fp16")
    manifest = json.loads((written / "bundle.json").read_text())
    assert manifest["order"][0] == manifest["order"][-1] == "dense"
    roles = [each["role"] for each in manifest["facts"]["candidates"].values()]
    assert roles.count("dense") == 1
    widths = [tuple(each["widths"]) for each in manifest["facts"]["candidates"].values()]
    assert len(set(widths)) == len(widths)
