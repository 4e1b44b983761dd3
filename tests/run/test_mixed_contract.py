"""Runs in mixed precision: the file that is delivered keeps the target, a share of the dense network in FP32."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from typer.testing import CliRunner

from compressor import Recipe, run_recipe
from compressor.cli.app import app
from compressor.core.errors import CompressorError
from compressor.core.manifest import Manifest
from compressor.latency.local import LocalCpu
from compressor.latency.networks import Device, NetworkTimes, TaggedNetwork, file_nodes, tag
from compressor.latency.paired import Timing
from compressor.latency.precisions import Conversions, CpuTimer
from compressor.latency.request import Request
from compressor.latency.table import LatencyTable
from compressor.run.explain import explain_again
from compressor.run.measure import measure_again
from compressor.run.pipeline import resume
from compressor.run.predict import predict
from export.convert.mixed import Parts, Prices
from tests.other_device import timing
from tests.runs import recipe

FLOATS, INT8 = (0.002, 1e-5), (0.008, 2e-6)
"""Milliseconds of starting an operator, and of each of its weights."""

WEIGHTED = ("Conv", "Gemm")


def weights_of(graph: Any) -> Iterator[tuple[str, int, bool]]:
    """The weight-bearing nodes of a file, the elements of their weights, and whether these are quantised."""
    stored = {item.name: int(np.prod(item.dims)) for item in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in WEIGHTED:
            name = node.input[1]
            while name not in stored:
                name = made[name].input[0]
            yield node.name, stored[name], name != node.input[1]


def milliseconds(elements: int, rates: tuple[float, float]) -> float:
    return rates[0] + rates[1] * elements


@dataclass
class TwoPrecisions:
    """Takes what the weights of a file say, each in its precision.

    Attributes:
        also: Precisions in which operators of FP32 files may run besides.
    """

    also: tuple[tuple[float, float], ...] = (FLOATS,)

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        graph = onnx.load_model_from_string(network.model).graph
        times = [
            milliseconds(elements, INT8) if int8 else min(milliseconds(elements, rates) for rates in self.also)
            for _, elements, int8 in weights_of(graph)
        ]
        return NetworkTimes(np.full(40, 0.02 + sum(times)), np.tile(times, (40, 1)))


def whole_ms(path: Path) -> float:
    return TwoPrecisions().measure(tag(path), 1.0).median_ms


def in_turns(timer: CpuTimer, networks: Sequence[bytes]) -> list[float]:
    return [TwoPrecisions().measure(TaggedNetwork(each, (), ()), 1.0).median_ms for each in networks]


def made_up(dense: Path, slim: Path, *_: object) -> Timing:
    return timing([whole_ms(dense)] * 9, [whole_ms(slim)] * 9)


def prices(calibrated: Any, parts: Parts, noise: Sequence[float], *_: object) -> Prices:
    elements = {name: size for name, size, _ in weights_of(calibrated.proto.graph)}

    def of(rates: tuple[float, float]) -> tuple[float, ...]:
        return tuple(
            sum(milliseconds(elements[name], rates) for name in part.nodes if name in elements) for part in parts.parts
        )

    nothing = [0.0] * len(parts.crossings)
    return Prices(of(FLOATS), of(INT8), nothing, nothing, tuple(noise))


def runner(here: LocalCpu, request: Request) -> Device:
    return TwoPrecisions({"fp32": (FLOATS,), "int8": (INT8,), "mixed": (FLOATS, INT8)}[request.precision])


@pytest.fixture(scope="module", autouse=True)
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A CPU on which narrow layers are slower in INT8 than in FP32, and conversions take no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(LocalCpu, "runner", runner)
        patch.setattr(LocalCpu, "time_limit_s", 0.0)
        patch.setattr("compressor.latency.joined.measured_conversions", lambda *_: Conversions((0.0, 0.0), (0.0, 0.0)))
        for module in ("compressor.latency.local", "compressor.latency.precisions"):
            patch.setattr(f"{module}.measured", made_up)
        patch.setattr(CpuTimer, "whole_ms", in_turns)
        for module in ("compressor.run.mixed", "compressor.latency.precisions"):  # the one that imports it first
            patch.setattr(f"{module}.part_prices", prices)
        yield


def wanted(latency: str) -> Recipe:
    return recipe(
        precision="mixed",
        budgets={"latency": latency},
        agent="knapsack",
        epochs=6,
        pruning={"granularity": 4, "min_share": 0.1},
        export={"engine": False, "max_drop": 30},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, device: None) -> Path:
    return run_recipe(wanted("45%"), out=tmp_path_factory.mktemp("runs") / "run").directory


def test_the_delivered_file_keeps_the_target(run: Path) -> None:
    manifest = Manifest.read(run / "manifest.json")
    (budget,), latency = manifest.budgets, manifest.latency
    dense_ms, delivered_ms = (whole_ms(run / name) for name in ("checkpoints/dense.onnx", "model.mixed.onnx"))
    assert manifest.exit_code == 0
    assert budget.verdict == "kept"
    assert budget.dense == latency.dense_ms == pytest.approx(dense_ms)
    assert budget.target == pytest.approx(0.45 * dense_ms)
    assert budget.measured == latency.measured_ms == pytest.approx(delivered_ms)
    assert 0.9 * budget.target < delivered_ms <= budget.target
    assert latency.precision == "mixed"
    assert manifest.rounds[-1].predicted_ratio == pytest.approx(manifest.rounds[-1].ratio, rel=0.1)
    entry = manifest.exports["mixed"]
    assert entry.accuracy is not None
    assert manifest.rounds[-1].file == manifest.files["model.mixed.onnx"]
    assert all(each.file != manifest.rounds[-1].file for each in manifest.rounds[:-1])


def test_neither_precision_alone_is_as_fast(run: Path) -> None:
    """Its layers are in the precision that is faster at their widths, with some of either kind."""
    found = list(weights_of(onnx.load(run / "model.mixed.onnx").graph))
    assert {int8 for _, _, int8 in found} == {True, False}
    for _, elements, int8 in found:
        gain = milliseconds(elements, FLOATS) - milliseconds(elements, INT8)
        assert int8 == (gain > 0) or abs(gain) < 1e-3


def test_the_table_has_both_precisions(run: Path) -> None:
    table = LatencyTable.read(run / "latency_table.json")
    assert table.precision == "mixed"
    assert table.fields.joined is not None
    (network,) = table.fields.joined.floats.networks.values()
    assert len(table.fields.joined.int8.entries) == len(table.fields.joined.floats.entries) == len(network.layers)


def test_the_page_and_the_commands_are_those_of_the_delivered_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (run / "report.html").read_text()
    assert "Accuracy, of model.mixed.onnx" in page
    assert "Precisions of model.mixed.onnx" in page
    lines = list(measure_again(run))
    share = whole_ms(run / "model.mixed.onnx") / whole_ms(run / "checkpoints/dense.onnx")
    assert any(f"slim takes {share:.1%} of the dense" in line for line in lines)
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    ((_, answers),) = predict(run, [tmp_path / "photo.png"])
    ((_, explicit),) = predict(run, [tmp_path / "photo.png"], precision="mixed")
    assert answers == explicit
    copied = shutil.copytree(run, tmp_path / "copied")
    (copied / "model.mixed.onnx").unlink()
    with pytest.raises(CompressorError, match=r"has no model\.mixed\.onnx"):
        list(predict(copied, [tmp_path / "photo.png"]))
    assert list(predict(copied, [tmp_path / "photo.png"], runtime="torch"))


def test_the_explanation_is_of_the_delivered_file(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    parts = list(explain_again(copied))
    assert any("the slim one in mixed precision" in part for part in parts if isinstance(part, str))
    explanation = Manifest.read(copied / "manifest.json").explanation
    assert explanation is not None
    assert explanation.precision == "mixed"
    (lines,) = (part for part in parts if isinstance(part, list))
    kinds = {line.layer: line.kind for line in lines if line.layer is not None}
    found = list(weights_of(onnx.load(run / "model.mixed.onnx").graph))
    names = [node.name for node in file_nodes(run / "model.onnx") if node.operator >= 0]
    assert len(kinds) == len(names)
    for name, _, int8 in found:
        assert kinds[names.index(name)].startswith("Q") == int8
    (copied / "model.mixed.onnx").unlink()
    with pytest.raises(CompressorError, match=r"The run has no model\.mixed\.onnx"):
        list(explain_again(copied))


def test_all_widths_are_kept_where_int8_is_enough(tmp_path: Path) -> None:
    result = run_recipe(wanted("80%"), out=tmp_path / "run")
    manifest = result.manifest
    assert result.exit_code == 0
    assert all(group["kept"] == group["width"] for group in manifest["groups"])
    assert manifest["latency"]["ratio"] < 0.7
    assert any("already meets every budget in mixed precision" in note for note in manifest["notes"])


def test_killed_in_its_stages_a_run_ends_as_if_it_had_not_been(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    goes = {
        "probe": lambda: run_recipe(wanted("45%"), out=tmp_path / "run"),
        "export": lambda: resume(tmp_path / "run"),
    }
    for stage, go in goes.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"compressor.run.pipeline.{stage}", stopped)
            with pytest.raises(KeyboardInterrupt):
                go()
    resume(tmp_path / "run")
    again, before = (Manifest.read(folder / "manifest.json") for folder in (tmp_path / "run", run))
    for name in ("budgets", "groups", "accuracy", "corrections"):
        assert getattr(again, name) == getattr(before, name), name
    assert [each.widths for each in again.rounds] == [each.widths for each in before.rounds]
    assert again.exports["mixed"] == before.exports["mixed"]


def test_a_target_that_no_precision_reaches(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match="The budget cannot be reached: latency"):
        run_recipe(wanted("5%"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_table_is_measured_beforehand(tmp_path: Path) -> None:
    options = ["--model", "tests.nets:tiny", "--image-size", "16", "--precision", "mixed"]
    result = CliRunner().invoke(app, ["profile", *options])
    assert result.exit_code == 0, result.output
    assert "operators of the dense network" in " ".join(result.output.split())


def test_a_device_that_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match=r"ssh reaches\. This run is for jetson-orin-nano-8gb") as refused:
        run_recipe(wanted("45%").changed({"device": "jetson-orin-nano-8gb"}), out=tmp_path / "run")
    assert "Use int8" in str(refused.value.hint)
    assert "--device ssh://user@host" in str(refused.value.hint)
    assert not (tmp_path / "run").exists()
    options = ["--model", "tests.nets:tiny", "--precision", "mixed", "--device", "my-orin"]
    result = CliRunner().invoke(app, ["profile", *options, "--bundle", str(tmp_path / "bundle")])
    assert result.exit_code == 2
    assert "A bundle has networks in one precision" in " ".join(result.output.split())
    assert not (tmp_path / "bundle").exists()
