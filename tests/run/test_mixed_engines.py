"""Mixed precision for TensorRT in a run, an export and a bundle, with a made-up GPU and a made-up board."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

from compressor import Recipe, run_recipe
from compressor.cli.app import app
from compressor.core.errors import CompressorError
from compressor.core.manifest import Export, Manifest
from compressor.latency import joined, local, over_ssh, remote_bundle
from compressor.latency.converted import in_precision
from compressor.latency.local import LocalGpu
from compressor.latency.precisions import PrecisionTimer
from compressor.latency.request import Request
from compressor.latency.table import LatencyTable
from compressor.run.measure import measure_again
from export.device import here
from export.device.here import Backend
from export.engine.cuda import Device
from export.engine.trt import RTX
from tests.export.device.fake_trtexec import known_layers, make_trtexec
from tests.latency import made_up_engines
from tests.latency.made_up_board import URL, MadeUpBoard
from tests.latency.made_up_engines import MadeUpEngines, whole_ms
from tests.latency.remote_bundle import needs_shell
from tests.latency.remote_bundle import run as run_bundle

GPU = Device("NVIDIA GeForce RTX 4090", "8.9", 24 << 30, 2520, "13.0")
BOARD = {
    "tensorrt": "10.3.0", "jetpack": "", "l4t": "", "model": "NVIDIA Orin", "power_mode": "", "board": "unknown",
}  # fmt: skip


def recipe(**fields: Any) -> Recipe:
    plain = {
        "model": "tests.nets:tiny", "image_size": 16, "epochs": 2, "budgets": {"flops": "60%"}, "agent": "uniform",
        "search": {"max_evaluations": 4, "batch_norm_batches": 2}, "contract": {"repeats": 1},
        "export": {"engine": False, "max_drop": 50}, "pruning": {"compensate": "off"},
    }  # fmt: skip
    return Recipe.model_validate({**plain, **fields})


@pytest.fixture
def cheap_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which products with more than 500 weights are faster in INT8, with conversions that cost little."""
    times = {
        "HALF": (0.002, 4e-6), "INT8": (0.0035, 1e-6), "QUANTISE": (1e-5, 0.0), "CAST": 1e-5, "SUM_HALF": 1e-3,
        "SUM_INT8": 9e-4, "POOL": 1e-3,
    }  # fmt: skip
    for name, value in times.items():
        monkeypatch.setattr(made_up_engines, name, value)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cheap_int8: None) -> None:
    """This machine has the GPU."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(here, "gpu_backend", lambda: Backend("tensorrt", "10.3.0", GPU))
    monkeypatch.setattr(local, "device_of", lambda backend, precision, streams: MadeUpEngines(precision))
    monkeypatch.setattr(LocalGpu, "time_limit_s", 0.0)


def check_file(path: Path, entry: Export) -> None:
    """The pairs are those of the record, all other products are in half precision, and times are the made-up ones."""
    graph = onnx.load(path).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    kinds = {item.name: item.data_type for item in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    for layer in entry.layers:
        node = nodes[layer.name]
        paired = [made.get(name) == "DequantizeLinear" for name in node.input[:2]]
        assert paired == [layer.precision == "int8"] * 2, layer.name
        if layer.precision == "fp16" and node.op_type != "Add":
            assert kinds[node.input[1]] == onnx.TensorProto.FLOAT16
        assert layer.float_ms is not None
        assert layer.int8_ms is not None
    assert {layer.precision for layer in entry.layers} == {"fp16", "int8"}
    assert (entry.runtime, entry.rest) == ("tensorrt", "fp16")
    (chosen,) = (plan for plan in entry.plans if plan.chosen)
    assert chosen.ratio <= 1.01 * min(plan.ratio for plan in entry.plans) < 1


def searched(**fields: Any) -> Recipe:
    """A recipe that searches widths and precisions."""
    return recipe(
        precision="mixed", budgets={"latency": "40%"}, agent="knapsack", epochs=4, training={"batch_size": 64},
        pruning={"granularity": 4, "min_share": 0.1, "compensation_images": 64}, **fields,
    )  # fmt: skip


def check_contract(run: Path, where: str) -> Manifest:
    """The delivered file keeps a target that neither FP16 nor INT8 alone keeps at its widths."""
    manifest = Manifest.read(run / "manifest.json")
    (budget,) = manifest.budgets
    dense_ms = whole_ms(in_precision((run / "checkpoints" / "dense.onnx").read_bytes(), "fp16"))
    delivered_ms = whole_ms((run / "model.mixed.onnx").read_bytes())
    assert manifest.exit_code == 0
    assert budget.verdict == "kept"
    assert budget.dense == pytest.approx(dense_ms)
    assert budget.measured == manifest.latency.measured_ms == pytest.approx(delivered_ms)
    assert 0.85 * budget.target < delivered_ms <= budget.target == pytest.approx(0.4 * dense_ms)
    for alone in ("fp16", "int8"):
        assert whole_ms(in_precision((run / "model.onnx").read_bytes(), alone)) > delivered_ms
    table = LatencyTable.read(run / "latency_table.json")
    assert table.fields.joined is not None
    assert (table.precision, table.fields.joined.floats.precision) == ("mixed", "fp16")
    check_file(run / "model.mixed.onnx", manifest.exports["mixed"])
    assert manifest.exports["mixed"].timed_on == where
    page = " ".join((run / "report.html").read_text().split())
    assert "mixed precision, the dense network in fp16" in page
    words = f"shares of that of the network in FP16, which was timed in turns with each plan on {where}"
    assert html.escape(words).replace("&#x27;", "&#39;") in page
    assert "In FP16" in page
    return manifest


def test_widths_and_precisions_are_chosen_together(tmp_path: Path, gpu: None) -> None:
    run = run_recipe(searched(), out=tmp_path / "run").directory
    manifest = check_contract(run, "this machine's NVIDIA GeForce RTX 4090, tensorrt 10.3.0")
    pytest.importorskip(RTX, reason="TensorRT-RTX is not installed")
    engine = next(each for each in manifest.engines if "mixed" in each.file)
    assert (engine.precision, (run / engine.file).stat().st_size) == ("int8", engine.bytes)


def test_a_device_over_ssh_searches_them_alike(
    tmp_path: Path, cheap_int8: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tables, prices and verdicts by bundles that ran there."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(over_ssh, "MIXED_S", 0.0)
    monkeypatch.setattr(remote_bundle, "LEVELS", 3)
    there = MadeUpBoard().plug(monkeypatch)
    run = run_recipe(searched(device=URL), out=tmp_path / "run").directory
    manifest = check_contract(run, f"NVIDIA Orin ({URL}), tensorrt 10.3.0")
    assert (manifest.latency.device, manifest.latency.runtime) == (URL, "tensorrt 10.3.0")
    judged = [order for order in there.ran if order == ["dense", "slim", "dense"]]
    assert len(judged) == joined.LEAST + len(manifest.rounds)
    table = LatencyTable.read(run / "latency_table.json")
    assert "board 0123456789abcdef" in table.fields.sources
    assert f"slim takes {manifest.latency.ratio:.1%} of the dense" in " ".join(measure_again(run))
    there.facts["power_mode"] = "15W"
    with pytest.raises(CompressorError, match="the power mode is 15W, and was MAXN") as refused:
        list(measure_again(run))
    assert "--precision mixed" in str(refused.value.hint)


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A board that runs bundles on this machine with a stand-in for trtexec; returns the bundles that it got."""
    memory = tmp_path / "memory"
    programs = {
        "timing": make_trtexec(tmp_path / "times", "10.3.0", rule="precisions", memory=str(memory)),
        "network": make_trtexec(tmp_path / "runs", "10.3.0"),
    }
    sent: list[Path] = []

    def there(url: str, bundle: Path, results: Path, **options: Any) -> int:
        folder = tmp_path / f"there{len(sent)}"
        shutil.unpack_archive(bundle, folder)
        (inside,) = folder.iterdir()
        sent.append(inside)
        kind = (inside / "kind.txt").read_text().strip()
        if kind == "timing":
            for model in (inside / "models").iterdir():  # quicker here than in processes of their own
                known_layers(model.read_bytes(), "precisions", memory)
        turns = str(min(2, options["processes"]) if kind == "timing" else 1)
        done = run_bundle(inside, programs[kind], "--duration", "1", "--warmup", "0", "--processes", turns)
        assert done.returncode == 0, done.stdout + done.stderr
        shutil.copy(inside / "results.tar.gz", results)
        return 0

    for module in ("export.device.remote", "compressor.latency.over_ssh"):
        monkeypatch.setattr(f"{module}.run_remote", there)
    monkeypatch.setattr(over_ssh, "identify", lambda url, trtexec: BOARD)
    monkeypatch.setattr("export.device.remote.identify", lambda url: BOARD)
    return sent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(recipe(), out=tmp_path_factory.mktemp("runs") / "run").directory


def exported(run: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["export", str(run), "--precision", "mixed", "--max-drop", "50", *options])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@needs_shell
def test_a_board_over_ssh_chooses_it(finished: Path, tmp_path: Path, board: list[Path]) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    manifest = json.loads((run / "manifest.json").read_text())
    ours = ["export", str(run), "--target", "jetson-orin-nano-8gb", "--max-drop", "50"]
    earlier = CliRunner().invoke(app, [*ours, "--bundle", str(run / "bundles" / "jetson-orin-nano-8gb.tar.gz")])
    assert earlier.exit_code == 0, earlier.output
    words = exported(run, "--target", "ssh://me@orin.local")
    assert "is written again: it was written with --precision fp32, not mixed." in words
    profiled, compared, delivered = board
    assert sorted(path.name for path in (profiled / "models").iterdir()) == ["n0.onnx", "n1.onnx", "n2.onnx"]
    order = (compared / "order.txt").read_text().split()
    assert order[::2] == ["dense"] * (len(order) // 2 + 1)
    assert sorted(order[1::2]) == [f"plan{place}" for place in range(len(order) // 2)]
    entry = Manifest.read(run / "manifest.json").exports["mixed.tensorrt"]
    assert entry.file == "model.mixed.tensorrt.onnx"
    assert entry.timed_on == "NVIDIA Orin (ssh://me@orin.local), tensorrt 10.3.0"
    floats_ms = whole_ms((compared / "models" / "dense.onnx").read_bytes())
    (chosen,) = (plan for plan in entry.plans if plan.chosen)
    took = (0.05 + 0.9 * whole_ms((run / entry.file).read_bytes())) / (0.05 + 0.9 * floats_ms)  # as trtexec has it
    assert chosen.ratio == pytest.approx(took, rel=1e-3)
    assert chosen.ratio <= 1.01 * min(plan.ratio for plan in entry.plans)
    assert (delivered / "models" / "model.mixed.tensorrt.onnx").read_bytes() == (run / entry.file).read_bytes()
    assert "model.mixed.tensorrt (" in words
    measured = Manifest.read(run / "manifest.json").devices[-1].networks
    assert {"model.mixed.tensorrt", "model.fp16", "dense.fp16"} <= {each.name for each in measured}
    assert all(each.status == "ok" for each in measured)
    assert manifest["files"].items() <= json.loads((run / "manifest.json").read_text())["files"].items()
    assert "Continuing with" in exported(run, "--target", "ssh://me@orin.local")
    assert len(board) == 4  # only the same bundle again


def test_a_run_for_a_device_over_ssh(
    finished: Path, tmp_path: Path, cheap_int8: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own file is measured there without an address, and has no other one beside it."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("device: local", "device: ssh://me@orin.local"))
    monkeypatch.setattr(local, "device_of", lambda backend, precision, streams: MadeUpEngines(precision))
    asked: list[str] = []

    def timer(url: str, request: Request, floats: Any) -> PrecisionTimer:
        asked.append(url)
        return LocalGpu(Backend("tensorrt", "10.3.0", GPU)).precision_timer(request, floats)

    monkeypatch.setattr(over_ssh, "timer_over_ssh", timer)
    exported(run)
    exported(run, "--out", str(tmp_path / "again.onnx"))
    assert asked == ["ssh://me@orin.local"] * 2
    entry = Manifest.read(run / "manifest.json").exports["mixed"]
    check_file(run / "model.mixed.onnx", entry)
    assert (tmp_path / "again.onnx").read_bytes() == (run / entry.file).read_bytes()
    assert not list(run.glob("*.tensorrt.onnx"))
