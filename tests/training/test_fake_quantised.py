"""Training for INT8: what is rounded and how, the ranges that come out, and the file that takes them."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn.utils import parametrizations

from compressor import CompressorError, Recipe, run_recipe
from compressor.run.job import Job
from compressor.run.pipeline import resume
from compressor.training import fake_quantised
from compressor.training.classification import Classification
from compressor.training.fake_quantised import FakeQuantised
from compressor.training.loop import Trainer
from compressor.training.settings import TrainSettings
from export.convert.calibrated import FORMS, LEVELS, ONNXRUNTIME, TENSORRT, weight_levels
from export.convert.ort import onnx_outputs
from export.convert.quantize import noise, quantize_onnx
from export.convert.to_onnx import export_onnx
from tests.runs import manifest_of, recipe
from tests.training.test_loop import digits, network, same  # noqa: F401  (a fixture)

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@needs_torchao
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_by_hand(symmetric: bool) -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.26]])
    rounded = FakeQuantised(layer, symmetric=symmetric, levels=LEVELS)
    found = float(layer(torch.tensor([[0.502, -1.0], [1.55, 0.0]])).detach()[0])
    weight = round(0.26 * 127) / 127
    step = 1.55 / 127 if symmetric else 2.55 / 255
    assert found == pytest.approx(round(0.502 / step) * step - weight * round(1 / step) * step, abs=1e-6)
    assert rounded.remove() == {"": (-1.0, pytest.approx(1.55))}


@needs_torchao
def test_ranges_are_moving_averages_and_weights_come_back() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.unused = nn.Linear(1, 3), nn.Linear(1, 1)
            self.computed = parametrizations.weight_norm(nn.Linear(3, 1))

        def forward(self, x: torch.Tensor) -> Any:
            return self.computed(self.first(x))

    model = Two()
    before = copy.deepcopy(model)
    rounded = FakeQuantised(model, symmetric=False, levels=LEVELS)
    model(torch.tensor([[-1.0], [2.0]]))
    model(torch.tensor([[-3.0], [4.0]])).sum().backward()
    assert all(each.grad is not None for each in model.first.parameters())
    ranges = rounded.remove()
    assert ranges["first"] == pytest.approx((-1.02, 2.02))
    assert set(ranges) == {"first", "computed"}
    left, wanted = model.state_dict(), before.state_dict()
    assert left.keys() == wanted.keys()
    assert all(torch.equal(left[name], tensor) for name, tensor in wanted.items())
    assert type(model.first) is nn.Linear
    assert torch.equal(model(torch.ones(2, 1)), before(torch.ones(2, 1)))  # nothing rounds any more


@needs_torchao
@pytest.mark.parametrize("runtime", [ONNXRUNTIME, TENSORRT])
def test_the_file_computes_what_was_trained(runtime: str, tmp_path: Path) -> None:
    """Here all that the file rounds is rounded in training, and the folded batch norm changes nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    images = torch.rand(64, 3, 8, 8) - 0.5
    rounded = FakeQuantised(model, symmetric=FORMS[runtime].symmetric, levels=weight_levels(runtime))
    for _ in range(3):
        model.train()(images)
    with torch.no_grad():
        goal = model.eval()(images).numpy()
    ranges = rounded.remove()
    with torch.no_grad():
        exact = model(images).numpy()
    export_onnx(model, images[:1], tmp_path / "net.onnx")
    info = quantize_onnx(tmp_path / "net.onnx", tmp_path / "int8.onnx", images.numpy(), runtime=runtime, trained=ranges)
    assert info.trained >= 3
    found = onnx_outputs(info.path, images.numpy())[0]
    assert noise([goal], [found]) < 0.03 * noise([exact], [found])


@needs_torchao
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_training_continues_bit_by_bit(digits: Any, decay: float) -> None:  # noqa: F811
    settings = TrainSettings(batch_size=32, learning_rate=0.05, ema_decay=decay)

    def trainer(model: nn.Module) -> Trainer:
        return Trainer(model, Classification.of(digits), settings, epochs=2, seed=0)

    whole = network()
    rounded = FakeQuantised(whole, symmetric=False, levels=LEVELS)
    training = trainer(whole)
    training.run_epoch()
    state = training.state()
    training.run_epoch()
    part = network(seed=1)
    again = FakeQuantised(part, symmetric=False, levels=LEVELS)
    training = trainer(part)
    training.restore(state)
    training.run_epoch()
    assert again.remove() == rounded.remove()
    assert same(whole, part)


@needs_torchao
def test_a_run_writes_its_int8_file_by_the_ranges_of_its_training(tmp_path: Path) -> None:
    fields = {"agent": "uniform", "budgets": {"flops": "60%"}, "training": {"quantize": "int8"}}
    result = run_recipe(recipe(**fields, export={"engine": False, "precisions": ["int8"]}), out=tmp_path / "run")
    assert result.exit_code == 0
    manifest = manifest_of(tmp_path / "run")
    assert set(manifest["trained_ranges"]) == {"stem.0", "conv1", "conv2", "head.0", "linear"}
    assert manifest["exports"]["int8"]["trained_ranges"] == 5
    low, high = manifest["trained_ranges"]["conv2"]
    assert low == 0.0  # after a ReLU
    graph = onnx.load(tmp_path / "run" / "model.int8.onnx").graph
    made_by = {name: node for node in graph.node for name in node.output}
    (conv,) = (node for node in graph.node if node.name == "/conv2/Conv")
    scale = made_by[conv.input[0]].input[1]
    (stored,) = (numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name == scale)
    assert stored == pytest.approx(high / 255)
    assert not any("weight" in name and "parametrizations" in name for name in result.model.state_dict())
    assert resume(tmp_path / "run").exit_code == 0


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"epochs": 0, "weights": "given.pt"}, "with 0 epochs nothing is trained"),
        ({"training": {"quantize": "int8", "compile": True}}, "training.compile does not compile"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], problem: str) -> None:
    wanted = {"model": "cifar_resnet20", "budgets": {"flops": "60%"}, "training": {"quantize": "int8"}, **fields}
    with pytest.raises((CompressorError, ValueError), match=problem):
        Job.prepare(Recipe.model_validate(wanted).resolved())


def test_without_torchao_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_quantised, "find_spec", lambda name: None)
    with pytest.raises(CompressorError, match="torchao, which is not installed") as caught:
        Job.prepare(recipe(budgets={"flops": "60%"}, training={"quantize": "int8"}).resolved())
    assert caught.value.hint == "Install it with: pip install 'compressor[qat]'"
