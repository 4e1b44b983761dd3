"""Networks that compute their weights before each forward: fixed on a copy, pruned, saved and loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

from compressor.core.errors import CompressorError
from compressor.models import create_model
from compressor.models.computed import computed_weights
from compressor.pruning.artefact import load, save
from compressor.pruning.space import PruningSpace
from export.convert.to_onnx import export_onnx
from tests.pruning.networks import RepVGG


def _masked(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.3)


def _old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return utils.weight_norm(layer)


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "old_weight_norm": _old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old_spectral_norm": utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "masks": _masked,
}
NORM = "weight_norm"


def build(num_classes: int = 4) -> nn.Module:
    norm = NORMS[NORM]
    return nn.Sequential(
        norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), norm(nn.Conv2d(16, 12, 3)), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes),
    )  # fmt: skip


@pytest.fixture(params=NORMS)
def norm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(f"{__name__}.NORM", request.param)
    return str(request.param)


def _silenced(dense: nn.Module, keep: Mapping[str, tuple[int, ...]], x: Tensor) -> Tensor:
    """The dense network's output with the channels that a plan removes set to zero, which is what removing does."""
    assert isinstance(dense, nn.Sequential)
    for name, layer in dense.named_children():
        x = layer(x)
        if name in keep:
            mask = torch.zeros(x.shape[1])
            mask[list(keep[name])] = 1
            x = x * mask[:, None, None]
    return x


def test_computed_weights_are_fixed_on_a_copy_and_pruned(norm: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, 3, 10, 10)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    space = PruningSpace(model, x[:1])
    assert [group.width for group in space.groups] == [16, 12]
    torch.testing.assert_close(space.apply(space.dense())(x), expected)
    plan = space.uniform(0.5)
    slim = space.apply(plan)
    assert slim.get_parameter("0.weight").shape == (8, 3, 3, 3)
    assert not computed_weights(slim)
    # The user's network is as it was.
    assert computed_weights(model) == ["0.weight", "2.weight"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    torch.testing.assert_close(slim(x), _silenced(model, plan.keep, x))
    save(slim, plan, tmp_path, factory=build)
    torch.testing.assert_close(load(tmp_path, factory=build)(x), slim(x))


def test_a_change_after_the_weights_were_fixed_is_refused() -> None:
    model = build().eval()
    space = PruningSpace(model, torch.zeros(1, 3, 10, 10))
    plan = space.uniform(0.5)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(CompressorError, match=r"changed after the space fixed.*space\.model"):
        space.apply(plan)
    x = torch.randn(1, 3, 10, 10)
    torch.testing.assert_close(space.apply(space.dense(), model)(x), model(x))


def test_given_weights_are_loaded_before_they_are_fixed(norm: str, tmp_path: Path, said: list[str]) -> None:
    torch.manual_seed(0)
    own, x = build().eval(), torch.randn(2, 3, 10, 10)
    torch.save(own.state_dict(), tmp_path / "own.pt")
    model = create_model(f"{__name__}:build", 4, tmp_path / "own.pt", (3, 10, 10)).eval()
    torch.testing.assert_close(model(x), own(x))
    assert any("2 weights of" in text and "are fixed" in text for text in said)


def test_branches_that_are_fused_in_forward_are_pruned_and_exported(tmp_path: Path) -> None:
    dense, x = RepVGG().eval(), torch.randn(3, 3, 16, 16)
    space = PruningSpace(dense, x[:1])
    assert [group.name for group in space.groups] == ["stem", "one.wide", "three.wide"]
    assert [skipped.name for skipped in space.skipped] == ["head"]
    small = space.apply(space.uniform(0.5))
    assert isinstance(small, RepVGG)
    assert small.two.channels == small.two.wide.out_channels == 8  # the unit matrix shrinks with its branch
    export_onnx(small, x[:1], tmp_path / "small.onnx", dynamic_batch=True)
    (found,) = onnxruntime.InferenceSession(tmp_path / "small.onnx").run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small(x), rtol=1e-4, atol=1e-5)
