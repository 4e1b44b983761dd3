"""Mixed precision on TensorRT: layers of engines as times of parts, and plans timed as engines. No GPU is needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from compressor.latency import local
from compressor.latency.engine_precisions import EngineTimer, engine_kernels
from compressor.latency.local import LocalGpu
from compressor.latency.paired import Ratio
from compressor.latency.precisions import (
    Conversions,
    KernelTime,
    _conversions,
    fastest,
    measured_conversions,
    part_prices,
)
from compressor.latency.request import Request
from compressor.run.mixed import write_mixed
from export.convert.calibrated import TENSORRT, Calibrated
from export.convert.half import open_fp32
from export.convert.mixed import Prices, parts_of
from export.convert.quantize import with_rest
from export.convert.to_onnx import export_onnx
from export.device.here import Backend
from export.engine.cuda import Device
from export.engine.engine import build_engine
from export.engine.trt import RTX
from export.errors import ExportError
from tests.latency.made_up_engines import (
    CAST,
    HALF,
    INT8,
    QUANTISE,
    SUM_HALF,
    SUM_INT8,
    MadeUpEngines,
    engine_layers,
    whole_ms,
)

IMAGES = np.random.default_rng(3).standard_normal((40, 3, 16, 16)).astype(np.float32)
PARTS = {"/stem/Conv": 432, "/wide/Conv": 9216, "/deep/Conv": 36864, "/Add": 0, "/narrow/Conv": 512, "/head/Gemm": 80}
"""Quantisable nodes with the number of their weights."""

HALF_TYPE = onnx.TensorProto.FLOAT16


class Net(nn.Module):
    """Narrow, wide and narrow again, with a residual sum whose value the convolution before it reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 64, 3, padding=1)
        self.deep, self.narrow = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.stem(x))))
        x = torch.relu(x + self.deep(x))
        return self.head(torch.relu(self.narrow(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    torch.manual_seed(0)
    export_onnx(Net().eval(), torch.zeros(1, 3, 16, 16), path)
    return path


@pytest.fixture(scope="module")
def calibrated(source: Path) -> Calibrated:
    proto, header = open_fp32(source)
    return Calibrated(proto, header.inputs[0], IMAGES, "minmax", runtime=TENSORRT)


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the timer of a machine with a made-up GPU."""

    def plug(device: Any, runtime: str = "tensorrt", floats: str | None = None) -> Any:
        monkeypatch.setattr(local, "device_of", lambda backend, precision, streams: device)
        gpu = Device("NVIDIA GeForce RTX 4090", "8.9", 24 << 30, 2520, "13.0")
        return LocalGpu(Backend(runtime, "10.3.0", gpu)).precision_timer(Request(precision="fp16"), floats)

    return plug


def score_of(lost: Sequence[str] = ()) -> Any:
    """Return a score that INT8 in one of these nodes halves."""

    def score(path: Path) -> float:
        return 0.45 if set(lost) & in_int8(path) else 0.9

    return score


def in_int8(path: Path, rest: int | None = None) -> set[str]:
    """The nodes of a file that read pairs on all inputs; the others read none, and have weights of the type `rest`."""
    graph = onnx.load(path).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    kinds = {item.name: item.data_type for item in graph.initializer}
    found = set()
    for node in graph.node:
        if node.name in PARTS:
            paired = [made.get(name) == "DequantizeLinear" for name in node.input[:2]]
            assert all(paired) or not any(paired), node.name
            if paired[0]:
                found.add(node.name)
            elif rest and node.op_type != "Add":
                assert kinds[node.input[1]] == rest, node.name
    return found


def test_layers_belong_to_nodes(calibrated: Calibrated) -> None:
    proto = with_rest(calibrated, ["/wide/Conv"], "fp16")
    index = {node.name: place for place, node in enumerate(proto.graph.node)}

    def tags(*names: str) -> str:
        return " + ".join(f"@{index[name]}." for name in names)

    entry = next(node for node in proto.graph.node if node.op_type == "QuantizeLinear" and "Relu" in node.name)
    cast = next(node for node in proto.graph.node if node.output[0] == entry.input[0])
    relus = [node.name for node in proto.graph.node if node.op_type == "Relu"]
    layers = [
        (f"Reformatting CopyNode for Input Tensor 0 to {tags('/stem/Conv', relus[0])}", 1.0),
        (f"stem.weight + {tags('/stem/Conv', relus[0])}", 2.0),
        (tags(cast.name, entry.name), 3.0),
        (f"Reformatting CopyNode for Input Tensor 0 to {tags('/wide/Conv')}", 4.0),
        (tags("/wide/Conv", relus[1]), 5.0),
        (tags("/deep/Conv", "/Add", relus[2]), 6.0),
        (tags("/narrow/Conv"), 7.0),
    ]
    kernels, unsure = engine_kernels(proto, layers)
    assert unsure == 0
    assert [(kernel.node, kernel.op, kernel.ms) for kernel in kernels] == [
        ("/stem/Conv", "Reformat", 1.0), ("/stem/Conv", "Conv", 2.0), (entry.name, "QuantizeLinear", 3.0),
        ("/wide/Conv", "Reformat", 4.0), ("/wide/Conv", "Conv", 5.0), ("/deep/Conv", "Conv", 6.0),
        ("/narrow/Conv", "Conv", 7.0),
    ]  # fmt: skip
    assert [kernel.elements for kernel in kernels[:5]] == [768, 4096, 4096, 4096, 16384]
    found = _conversions(kernels, {"/wide/Conv"})
    assert sum(found.to_int8) > 0
    assert found.to_int8[0] + found.to_int8[1] * 4096 == pytest.approx(3.0 + 4.0)
    assert found.to_float[0] + found.to_float[1] * 768 == pytest.approx(1.0)
    _, unsure = engine_kernels(proto, [*layers, ("__myl_Fc_12", 4.0), (tags("/wide/Conv", "/deep/Conv"), 8.0)])
    assert unsure == pytest.approx(12 / 40)


def test_a_cast_to_half_leaves_int8() -> None:
    nodes = [onnx.helper.make_node("Cast", ["x"], [f"y{kind}"], name=f"c{kind}", to=kind) for kind in (1, 10)]
    graph = onnx.helper.make_graph(nodes, "g", [onnx.helper.make_tensor_value_info("x", 1, [3])], [])
    kernels, _ = engine_kernels(onnx.helper.make_model(graph), [("@0.", 1.0), ("@1.", 1.0)])
    assert [kernel.op for kernel in kernels] == ["QuantizeLinear", "DequantizeLinear"]


def test_layout_changes_are_conversions_where_nothing_else_converts() -> None:
    found = _conversions([KernelTime("a", "Reformat", 2.0, 10), KernelTime("b", "Reformat", 3.0, 10)], {"a"})
    assert found.to_int8[0] + 10 * found.to_int8[1] == pytest.approx(2.0)
    assert found.to_float[0] + 10 * found.to_float[1] == pytest.approx(3.0)


def test_a_part_has_the_times_of_its_layers(calibrated: Calibrated, plugged: Any) -> None:
    parts = parts_of(calibrated.proto, TENSORRT)
    prices = part_prices(calibrated, parts, [0.0] * 6, plugged(MadeUpEngines()))
    assert prices is not None
    weights = np.asarray(list(PARTS.values()))
    float_ms, int8_ms = (rates[0] + rates[1] * weights for rates in (HALF, INT8))
    float_ms[3], int8_ms[3] = SUM_HALF, SUM_INT8
    assert [part.nodes[0] for part in parts.parts] == list(PARTS)
    assert prices.float_ms == pytest.approx(float_ms)
    assert prices.int8_ms == pytest.approx(int8_ms)
    sizes = np.asarray([crossing.elements for crossing in parts.crossings])
    assert prices.to_int8_ms == pytest.approx(QUANTISE[0] + QUANTISE[1] * sizes)
    assert prices.to_float_ms == pytest.approx(np.full(len(sizes), CAST))


def mixed(source: Path, target: Path, timer: Any, score: Any = None, **options: Any) -> Any:
    return write_mixed(source, target, IMAGES, score or score_of(), timer, **{"max_drop": 0.01, **options})


@pytest.fixture(scope="module")
def times(calibrated: Calibrated) -> dict[tuple[str, ...], float]:
    """What the made-up GPU takes for all 64 plans, by their nodes in INT8."""
    every = (plan for size in range(7) for plan in itertools.combinations(PARTS, size))
    return {plan: whole_ms(with_rest(calibrated, plan, "fp16").SerializeToString()) for plan in every}


def test_no_other_plan_is_faster(source: Path, times: Any, plugged: Any, tmp_path: Path) -> None:
    """The narrow layers stay in FP16, without pairs."""
    made = mixed(source, tmp_path / "mixed.onnx", plugged(MadeUpEngines()))
    best = min(times, key=lambda plan: times[plan])
    assert in_int8(tmp_path / "mixed.onnx", HALF_TYPE) == set(best) == {"/wide/Conv", "/deep/Conv", "/Add"}
    assert made.chosen.ratio == pytest.approx(times[best] / times[()])
    assert made.chosen.ratio < min(1.0, times[tuple(PARTS)] / times[()])
    assert {plan.int8 for plan in made.plans} >= {0, 3, 6}
    assert [layer.precision for layer in made.layers] == ["fp16", "int8", "int8", "int8", "fp16", "fp16"]
    assert made.layers[2].float_ms == pytest.approx(HALF[0] + HALF[1] * 36864)
    predicted = [plan.predicted_ratio or 0.0 for plan in made.plans]
    assert predicted[0] == 1.0
    assert min(predicted) == predicted[[plan.chosen for plan in made.plans].index(True)]


def test_widths_are_timed_in_their_faster_precisions(source: Path, times: Any, plugged: Any) -> None:
    """With conversions as measured; where parts cannot be timed, in the faster one of FP16 and INT8."""
    content = source.read_bytes()
    named, nameless = (plugged(MadeUpEngines(named=named)) for named in (True, False))
    assert whole_ms(fastest(content, named)) == pytest.approx(min(times.values()))
    assert whole_ms(fastest(content, nameless)) == pytest.approx(min(times[()], times[tuple(PARTS)]))
    found = measured_conversions([content], named)
    assert found.to_int8 == pytest.approx(QUANTISE)
    assert found.to_float == pytest.approx((CAST, 0.0), abs=1e-9)
    assert measured_conversions([content], nameless) == Conversions((0.0, 0.0), (0.0, 0.0))


def test_a_part_that_costs_the_score_stays_in_fp16(source: Path, plugged: Any, tmp_path: Path) -> None:
    made = mixed(source, tmp_path / "m.onnx", plugged(MadeUpEngines()), score_of(["/stem/Conv", "/narrow/Conv"]))
    assert in_int8(tmp_path / "m.onnx") == {"/wide/Conv", "/deep/Conv", "/Add"}
    assert made.chosen.score == 0.9
    made = mixed(source, tmp_path / "m.onnx", plugged(MadeUpEngines()), score_of(["/wide/Conv", "/deep/Conv", "/Add"]))
    assert in_int8(tmp_path / "m.onnx") == set()
    assert made.chosen.ratio == 1.0


def test_the_rest_may_be_fp32(source: Path, plugged: Any, tmp_path: Path) -> None:
    made = mixed(source, tmp_path / "mixed.onnx", plugged(MadeUpEngines(), floats="fp32"))
    kinds = {item.data_type for item in onnx.load(tmp_path / "mixed.onnx").graph.initializer}
    assert HALF_TYPE not in kinds
    assert "fp32" in {layer.precision for layer in made.layers}


def test_layers_without_names_give_no_times(
    source: Path, plugged: Any, tmp_path: Path, said: list[str]
) -> None:
    made = mixed(source, tmp_path / "mixed.onnx", plugged(MadeUpEngines(named=False)))
    assert any("does not say which parts 100% of an engine's time belongs to" in line for line in said)
    assert "made by noise alone" in made.rule
    assert all(layer.float_ms is None and layer.int8_ms is None for layer in made.layers)
    assert all(plan.predicted_ratio is None for plan in made.plans)
    assert [plan.int8 for plan in made.plans] == [0, 1, 2, 3, 4, 5, 6]
    assert made.chosen.ratio == min(plan.ratio for plan in made.plans)
    noise = [layer.noise for layer in made.layers]
    quietest = made.layers[noise.index(min(noise))].name
    assert made.chosen.int8 == 0 or quietest in in_int8(tmp_path / "mixed.onnx")


class Refusing(MadeUpEngines):
    """Has no INT8 kernel for some nodes."""

    def __init__(self, *nodes: str) -> None:
        super().__init__()
        self.without = set(nodes)

    def _check(self, network: Any) -> None:
        proto = onnx.load_model_from_string(network.model)
        made = {name: node.op_type for node in proto.graph.node for name in node.output}
        weights = {item.name: int(np.prod(item.dims)) for item in proto.graph.initializer}
        sizes = {PARTS[name] for name in self.without}
        for node in proto.graph.node:
            if made.get(node.input[0]) == "QuantizeLinear" and node.op_type == "DequantizeLinear":
                source = next(each for each in proto.graph.node if each.output[0] == node.input[0]).input[0]
                if weights.get(source) in sizes:
                    raise ExportError("Could not find any implementation for a node.")

    def layers(self, network: Any) -> Any:
        self._check(network)
        return super().layers(network)

    def measure(self, network: Any, seconds: float) -> Any:
        self._check(network)
        return super().measure(network, seconds)


def test_plans_without_an_engine_are_left_out(
    source: Path, plugged: Any, tmp_path: Path, said: list[str]
) -> None:
    made = mixed(source, tmp_path / "mixed.onnx", plugged(Refusing("/narrow/Conv")))
    assert any("The parts are not timed one by one: Could not find any" in line for line in said)
    assert any("The plan with 6 layers in INT8 has no time on this machine's NVIDIA" in line for line in said)
    assert 6 not in {plan.int8 for plan in made.plans}
    assert "/narrow/Conv" not in in_int8(tmp_path / "mixed.onnx")
    with pytest.raises(ExportError, match="No plan of precisions has been measured"):
        mixed(source, tmp_path / "other.onnx", plugged(Refusing(*PARTS)))
    assert not (tmp_path / "other.onnx").exists()


def test_a_time_without_an_interval(source: Path, plugged: Any, tmp_path: Path) -> None:
    """Of a device that was hardly ever undisturbed: its plans cannot be told apart, and the quietest one is taken."""
    timer = plugged(MadeUpEngines())
    timer = replace(timer, compare=lambda floats, plans: [Ratio(0.5, 0.0, math.inf, 1.0)] * len(plans))
    made = mixed(source, tmp_path / "mixed.onnx", timer)
    assert [plan.interval for plan in made.plans] == [[1.0, 1.0], *[[0.0, None]] * (len(made.plans) - 1)]
    assert made.chosen.noise == min(plan.noise for plan in made.plans)


def test_onnx_runtimes_gpu_providers_have_no_engines(plugged: Any) -> None:
    class Whole:
        def measure(self, network: Any, seconds: float) -> Any: ...

    with pytest.raises(Exception, match="times of TensorRT's engines; this machine's GPU runs onnxruntime-cuda"):
        plugged(Whole(), "onnxruntime-cuda")


def test_profiles_and_comparisons_are_of_the_same_files(source: Path, calibrated: Calibrated) -> None:
    """What is profiled are the networks that are delivered, with the rest in half precision."""
    given: list[bytes] = []

    def profile(networks: Sequence[bytes]) -> Any:
        given.extend(networks)
        return [engine_layers(network) for network in networks]

    timer = EngineTimer("fp16", "a GPU", profile, lambda networks: [], lambda floats, plans: [])
    assert isinstance(part_prices(calibrated, parts_of(calibrated.proto, TENSORRT), [0.0] * 6, timer), Prices)
    kinds = [{item.data_type for item in onnx.load_model_from_string(each).graph.initializer} for each in given]
    assert [HALF_TYPE in each for each in kinds] == [True, False, True]  # all products are in INT8


@pytest.mark.parametrize("capability", ["8.6", "8.9"])
def test_a_mixed_file_builds(source: Path, calibrated: Calibrated, tmp_path: Path, capability: str) -> None:
    pytest.importorskip(RTX, reason="TensorRT-RTX is not installed")
    for place, nodes in enumerate((["/wide/Conv", "/deep/Conv", "/Add"], ["/deep/Conv"], ["/stem/Conv", "/Add"])):
        path = tmp_path / f"{place}.onnx"
        path.write_bytes(with_rest(calibrated, nodes, "fp16").SerializeToString())
        assert in_int8(path, HALF_TYPE) == set(nodes)
        info = build_engine(path, tmp_path / "net.engine", module=RTX, compute_capability=capability)
        assert (info.precision, info.compute_capabilities) == ("int8", (capability,))
