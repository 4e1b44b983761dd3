"""Compensation: exact cases by hand, every kind of layer, the guarantee on images left out, and real networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformerBlock

from compressor.core.errors import CompressorError
from compressor.pruning import calibration
from compressor.pruning.calibration import Reference
from compressor.pruning.compensate import DenseMoments, _Walk, compensate
from compressor.pruning.least_squares import Gram, Regression, Ridge
from compressor.pruning.moves import moved_back
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.replay import Recording
from compressor.pruning.sites import Geometry, find_sites, shortcuts_first
from compressor.pruning.space import PruningSpace
from compressor.pruning.verdict import NOT_CLOSER, closer, difference, judged, own_statistics
from tests.pruning.networks import Attentive, UNet, Zoo, filled


def images(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


class Redundant(nn.Module):
    """conv a: 3->6, whose channel 5 is 2 * channel 0 - channel 3; conv b reads them, with or without a bias."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, bias=False)
        self.b = nn.Conv2d(6, 4, 3, bias=bias)
        with torch.no_grad():
            self.a.weight[5] = 2 * self.a.weight[0] - self.a.weight[3]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize("method", ["layers", "moments"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_channel_that_the_others_combine_to_is_replaced_exactly(method: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = Redundant(bias).eval()
    space = PruningSpace(model, torch.zeros(1, 3, 10, 10))
    plan = ChannelPlan({"a": (0, 1, 2, 3, 4)})
    found = compensate(space, plan, [images(64, 3, 10, 10)], method)
    assert found.error_cut > 0.01
    assert list(found.refitted) == ["b"]
    # By hand: b reads channel 5 as 2 * channel 0 - channel 3.
    expected = model.b.weight[:, :5].clone()
    expected[:, 0] += 2 * model.b.weight[:, 5]
    expected[:, 3] -= model.b.weight[:, 5]
    torch.testing.assert_close(found.network.b.weight, expected, rtol=1e-4, atol=1e-5)
    x = images(8, 3, 10, 10, seed=1)
    torch.testing.assert_close(outputs(found.network, x), outputs(model, x), rtol=1e-4, atol=1e-5)


class Before(nn.Module):
    """conv a: 3->6 with constant channels of 1 to 3; the layer b reads them, and a batch norm its output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        with torch.no_grad():
            self.a.weight[4:] = 0
            self.a.bias[4:] = torch.tensor([2.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(self.a(x)))


def test_a_constant_goes_to_the_mean_of_the_batch_norm() -> None:
    torch.manual_seed(0)
    model = filled(Before())
    with torch.no_grad():
        model.a.weight[4:] = 0
        model.a.bias[4:] = torch.tensor([2.0, 3.0])
    space = PruningSpace(model, torch.zeros(1, 3, 6, 6))
    small = space.compensate(ChannelPlan({"a": (0, 1, 2, 3)}), [images(64, 3, 6, 6)])
    missing = model.b.weight[:, 4, 0, 0] * 2 + model.b.weight[:, 5, 0, 0] * 3
    torch.testing.assert_close(small.norm.running_mean, model.norm.running_mean - missing, rtol=1e-4, atol=1e-4)
    assert small.b.bias is None


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(6, 4, 3, stride=2, padding=1), (3, 12)),
    "conv2d dilated": (nn.Conv2d(6, 4, (3, 2), stride=(1, 2), padding=(1, 0), dilation=2), (3, 9, 11)),
    "conv2d same": (nn.Conv2d(6, 4, 4, padding="same"), (3, 9, 9)),
    "conv2d circular": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (3, 9, 9)),
    "conv3d": (nn.Conv3d(6, 4, 2), (3, 4, 5, 6)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (3, 8, 8)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (3, 8, 8)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), (3, 6, 6)),
    "transposed dilated": (nn.ConvTranspose2d(6, 4, 2, dilation=3), (3, 6, 6)),
    "transposed grouped": (nn.ConvTranspose2d(6, 4, 3, groups=2), (3, 6, 6)),
    "linear": (nn.Linear(6, 4), (5, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_matrix_is_the_layer(name: str) -> None:
    layer, shape = LAYERS[name]
    x = images(3, *(shape if name == "linear" else (6, *shape[1:])))
    recording = Recording(nn.Sequential(layer).eval(), (x,))
    call = next(each for each in recording.calls if each.name == "linear" or "conv" in each.name)
    geometry = Geometry.of(call, layer.weight)
    with torch.no_grad():
        y = layer(x)
        if name == "conv2d circular":
            x = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
        bias = layer.bias.reshape(geometry.groups, 1, -1)
        found = geometry.patches(x) @ geometry.matrix(layer.weight) + bias
        torch.testing.assert_close(found, geometry.rows(y), rtol=1e-4, atol=1e-5)
        places = torch.tensor([0, 3, geometry.positions(y) - 1])
        some = geometry.patches(x, places) @ geometry.matrix(layer.weight) + bias
        torch.testing.assert_close(some, geometry.rows(y, places), rtol=1e-4, atol=1e-5)
    assert torch.equal(geometry.weight(geometry.matrix(layer.weight), layer.weight), layer.weight)


def test_ridge_by_hand() -> None:
    # x is -1 or 1, y is 3x + 1: with variance 1 and strength 1, the weight goes half of the way from 1 to 3.
    x = torch.tensor([[[-1.0], [1.0]]])
    ridge = Ridge(Gram.of(x), constant=True)
    assert ridge.set(1.0)
    xy, y, old = (torch.tensor(value, dtype=torch.float64) for value in ([[[3.0]]], [[1.0]], [[[1.0]]]))
    weight, constant = ridge.solve(ridge.gap(xy, y, old), y, old)
    assert weight.item() == pytest.approx(2.0)
    assert constant.item() == pytest.approx(1.0)


def test_one_image_does_not_decide() -> None:
    exact, old = [[torch.zeros(8, 3)]], [[torch.ones(8, 3)]]
    new = [[torch.ones(8, 3)]]
    new[0][0][2] = 0.1
    assert not closer(exact, new, old)
    new[0][0][5] = 0.2
    assert closer(exact, new, old)
    assert not closer(exact, old, new)


@pytest.mark.parametrize("limits", [None, (0.0, 6.0)])
@pytest.mark.parametrize("constant", [True, False])
def test_the_span_of_few_samples_changes_nothing(constant: bool, limits: tuple[float, float] | None) -> None:
    x, old = images(1, 10, 40), images(1, 40, 3, seed=2).double()
    goal = x @ (old + 0.1 * x.mT[:, :, :3]).float() + 0.01 * images(1, 10, 3, seed=1)
    offset = torch.full((1, 1, 3), 0.1) * float(constant)
    parts = [(x[:, rows], goal[:, rows], offset) for rows in (slice(0, 8), slice(8, 10))]
    regression = Regression(parts[0], parts[1], limits, constant)
    found, expected = regression._in_span(old, (0.1,), 2), regression._fit(old, (0.1,), 2)
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.constant, expected.constant, rtol=1e-4, atol=1e-5)
    assert found.error == pytest.approx(expected.error, rel=1e-4)
    assert found.before == pytest.approx(expected.before, rel=1e-4)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Zoo(), (3, 32, 32)), (UNet(), (3, 16, 16)), (Attentive(), (10, 24))],
    ids=["zoo", "unet", "attention"],
)
@pytest.mark.parametrize("method", ["layers", "moments"])
def test_every_kind_of_layer_is_refitted_or_named(model: nn.Module, shape: tuple[int, ...], method: str) -> None:
    model = filled(model)
    space = PruningSpace(model, torch.zeros(1, *shape))
    plan = space.uniform(0.6)
    count = 320 if isinstance(model, Attentive) else 128  # fewer rows of an image
    found = compensate(space, plan, [(images(count, *shape), torch.zeros(count))], method)
    widths = space.widths(plan.widths)
    lost = {
        layer.name
        for layer in space.layers
        if layer.in_channels(widths[None])[0] < layer.in_channels(space.dense_widths[None])[0]
    }
    assert lost <= {*found.refitted, *found.left}
    assert not {*found.refitted} & {*found.left}
    assert found.error <= found.error_cut
    assert found.images == count
    x = images(16, *shape, seed=1)
    exact = [[outputs(model, x)]]
    cut, small = ([[outputs(network, x)]] for network in (space.apply(plan), found.network))
    assert difference(exact, small) < difference(exact, cut)
    if isinstance(model, Zoo):
        assert found.left["shared"] == "several calls share its parameters"


def test_same_seed_same_result_and_the_dense_network_is_unchanged() -> None:
    model = filled(UNet())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    space = PruningSpace(model, torch.zeros(1, 3, 16, 16))
    plan, batches = space.uniform(0.5), [images(24, 3, 16, 16), images(24, 3, 16, 16, seed=1)]
    small = [space.compensate(plan, batches, seed=seed).state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(small[0][name], small[1][name]) for name in small[0])
    assert not all(torch.equal(small[0][name], small[2][name]) for name in small[0])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_moments_are_shared_by_plans() -> None:
    model = filled(UNet())
    space = PruningSpace(model, torch.zeros(1, 3, 16, 16))
    batches = [images(48, 3, 16, 16)]
    moments = DenseMoments(space, batches)
    assert moments.bytes > 0
    assert moments.judged(space.uniform(0.5)).refitted
    for ratio in (0.5, 0.75):
        plan = space.uniform(ratio)
        own, shared = space.compensate(plan, batches, "moments"), moments.apply(plan)
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), shared.parameters(), strict=True))


@pytest.mark.parametrize("method", ["layers", "moments"])
def test_large_patches_fall_back_to_channels(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("compensate", "moments", "refit"):
        monkeypatch.setattr(f"compressor.pruning.{place}.LARGEST", 50)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.Conv2d(10, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 20), nn.Linear(20, 4)
    ).eval()
    with torch.no_grad():
        model[0].weight[9] = model[0].weight[0] + model[0].weight[1]
        model[0].bias[9] = 1 + model[0].bias[0] + model[0].bias[1]
        model[1].weight[3] = 2 * model[1].weight[0]
        model[1].bias[3] = 2 * model[1].bias[0]
    space = PruningSpace(model, torch.zeros(1, 3, 8, 8))
    found = compensate(space, ChannelPlan({"0": tuple(range(9))}), [images(64, 3, 8, 8)], method)
    assert next(iter(found.refitted)) == "1"
    assert found.error < 1e-6 * found.error_cut
    flat = compensate(space, ChannelPlan({"1": (0, 1, 2, 4, 5)}), [images(64, 3, 8, 8)], method)
    assert next(iter(flat.refitted)) == "4"
    assert flat.error < 1e-6 * flat.error_cut


class InPlace(nn.Module):
    """A residual block as torchvision writes it: the shortcut is computed after the branch, all in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.second, self.down = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.Conv2d(8, 12, 1, bias=False)
        self.norm, self.down_norm = nn.BatchNorm2d(12), nn.BatchNorm2d(12)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        out = self.norm(self.second(self.relu(self.first(x))))
        out += self.down_norm(self.down(x))
        return self.head(self.relu(out).mean((2, 3)))


def test_the_layer_that_ends_a_branch_is_fitted_to_the_sum() -> None:
    model = filled(InPlace())
    recording = Recording(model, (images(4, 3, 8, 8),))
    shortcuts_first(recording)
    assert recording.repeats((images(4, 3, 8, 8),))
    sites = {site.layer: site for site in find_sites(recording)[0]}
    assert [name for name in sites] == ["stem", "first", "down", "second", "head"]
    assert sites["second"].shortcut is not None
    assert sites["second"].limits == (0.0, float("inf"))
    assert sites["second"].constant == "norm.running_mean"
    assert sites["down"].shortcut is None
    assert sites["stem"].limits == (0.0, float("inf"))
    space = PruningSpace(model, torch.zeros(1, 3, 8, 8))
    found = compensate(space, space.uniform(0.5), [images(64, 3, 8, 8)])
    assert set(found.refitted) == {"first", "down", "second", "head"}
    assert found.error < 0.5 * found.error_cut


class Scaled(nn.Module):
    """A ConvNeXt block as timm writes it: the layer scale is reshaped, and multiplied after the permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 8)
        self.gamma = nn.Parameter(torch.linspace(0.2, 1.6, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.second(self.first(self.depthwise(x).permute(0, 2, 3, 1)).relu())
        x = x + y.permute(0, 3, 1, 2).mul(self.gamma.reshape(1, -1, 1, 1))
        return self.head(x.relu().mean((2, 3)))


BRANCHES: dict[str, tuple[nn.Module, tuple[int, ...], str, str | None]] = {
    "timm": (Scaled(), (3, 6, 6), "second", "gamma"),
    "convnext": (torchvision.models.convnext.CNBlock(8, 0.5, 0.0), (8, 6, 6), "block.5", "layer_scale"),
    "swin": (SwinTransformerBlock(8, 2, [4, 4], [2, 2]), (8, 12, 8), "attn.proj", None),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_is_followed_to_its_sum(name: str) -> None:
    model, shape, layer, gain = BRANCHES[name]
    x = images(3, *shape)
    recording = Recording(filled(model.eval()), (x,))
    assert shortcuts_first(recording) == list(range(len(recording.calls)))
    site = next(site for site in find_sites(recording)[0] if site.layer == layer)
    assert site.shortcut is not None
    assert site.gain == gain
    assert site.limits == ((0.0, float("inf")) if name == "timm" else None)
    with torch.no_grad():
        state = recording.start((x,))
        recording.advance(state, site.number)
        output, shortcut = recording.result(state, site.number), state.values[site.shortcut]
        sums: list[Tensor] = []
        end = recording.calls[site.end].outs[0]
        recording.advance(state, site.end + 1, lambda number, now: sums.append(now.values.get(end, output)))
        scale = 1.0 if gain is None else dict(model.named_parameters())[gain].flatten()
        back = [moved_back(recording, site.path, each, output.shape) for each in (sums[-1], shortcut)]
    torch.testing.assert_close(back[0] - back[1], output * scale, rtol=1e-4, atol=1e-5)


def test_a_branch_with_a_layer_scale_is_fitted_to_the_sum() -> None:
    model = filled(Scaled())
    space = PruningSpace(model, torch.zeros(1, 3, 8, 8))
    found = compensate(space, space.uniform(0.6), [images(128, 3, 8, 8)])
    assert {"first", "second", "head"} <= set(found.refitted)
    assert found.error < 0.5 * found.error_cut


class Turned(nn.Module):
    """Channels become the last axis: with a single channel left that needs no copy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv1d(3, 4, 1), nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.conv(x).transpose(1, 2).contiguous()))


def test_a_copy_that_the_slim_network_does_not_make() -> None:
    torch.manual_seed(0)
    space = PruningSpace(Turned().eval(), torch.zeros(1, 3, 7))
    found = compensate(space, space.plan([1, 6]), [images(64, 3, 7)])
    assert set(found.refitted) == {"first"}
    assert found.error < found.error_cut


def test_what_is_refused() -> None:
    space = PruningSpace(filled(UNet()), torch.zeros(1, 3, 16, 16))
    plan = space.uniform(0.5)
    with pytest.raises(CompressorError, match="no method 'magic'"):
        compensate(space, plan, [images(8, 3, 16, 16)], "magic")
    with pytest.raises(CompressorError, match="at least three images, not 0"):
        compensate(space, plan, [])
    with pytest.raises(CompressorError, match="Moments do not hold the images"):
        compensate(space, plan, DenseMoments(space, [images(8, 3, 16, 16)]))


def bottlenecks() -> nn.Module:
    block = torchvision.models.resnet.Bottleneck
    down = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16))
    return nn.Sequential(block(3, 4, downsample=down), block(16, 4), block(16, 4), nn.Conv2d(16, 4, 3))


@pytest.mark.parametrize(("network", "removed"), [(UNet, []), (bottlenecks, []), (bottlenecks, ["1"])])
@pytest.mark.parametrize("largest", [2400, 20])
def test_memory_limits_the_images(
    network: Callable[[], nn.Module], removed: list[str], largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = PruningSpace(filled(network()), torch.zeros(1, 3, 16, 16))
    plan = space.plan(space.uniform(0.9).widths, removed=removed)
    held: list[int] = []

    def and_look(walk: _Walk, *args: Any) -> tuple[Tensor, Tensor]:
        found = advance(walk, *args)
        tensors = [*walk.goals.values(), *walk.inputs.values(), *(chunk[0] for chunk in walk.images.chunks)]
        tensors += [each for states in walk.states for state in states for each in state.values.values()]
        memory = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        held.append(sum(memory.values()))
        return found

    advance = _Walk._advance
    monkeypatch.setattr(_Walk, "_advance", and_look)
    for place in ("calibration", "compensate", "refit"):
        monkeypatch.setattr(f"compressor.pruning.{place}.LARGEST", largest)
    monkeypatch.setattr(calibration, "GOAL_BYTES", 0)
    monkeypatch.setattr(calibration, "MEMORY", 2 * 2**20)
    found = compensate(space, plan, [images(96, 3, 16, 16)])
    assert found.images < 96
    assert 0.3 * 2**21 < max(held) <= 2**21


def test_plans_share_the_dense_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets the network that it gets alone, whether the dense network's values are kept or computed again."""
    space = PruningSpace(filled(UNet()), torch.zeros(1, 3, 16, 16))
    batches, plans = [images(24, 3, 16, 16)], [space.uniform(0.5), space.uniform(0.75)]
    alone = [compensate(space, plan, batches) for plan in plans]
    for goal_bytes in (0, 2**30):
        monkeypatch.setattr(calibration, "GOAL_BYTES", goal_bytes)
        shared = Reference(space, batches)
        assert (shared.goals is None) == (goal_bytes == 0)
        for plan, one in zip(plans, alone, strict=True):
            other = compensate(space, plan, shared)
            assert (other.refitted, other.error) == (one.refitted, one.error)
            state = other.network.state_dict()
            assert all(torch.equal(tensor, state[name]) for name, tensor in one.network.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_compensating_a_random_plan_does_not_make_outputs_worse(name: str) -> None:
    """On images that no fit saw."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=20).eval()
    space = PruningSpace(model, torch.zeros(1, 3, 32, 32))
    other = images(16, 3, 32, 32, seed=1)
    plan = space.plan(space.random_widths(np.random.default_rng(0)), importance="random", seed=0)
    made = space.compensate(plan, [images(24, 3, 32, 32)]), space.apply(plan)
    compensated, cut = (difference([[outputs(model, other)]], [[outputs(each, other)]]) for each in made)
    assert compensated <= cut


#: Of half of the multiply-adds, found by the knapsack agent.
WIDTHS = {
    "conv1": 16, "layer1.0.conv1": 2, "layer1.1.conv1": 8, "layer1.2.conv1": 4, "layer2.0.conv1": 20,
    "layer2.0.conv2": 7, "layer2.1.conv1": 21, "layer2.2.conv1": 17, "layer3.0.conv1": 49, "layer3.0.conv2": 13,
    "layer3.1.conv1": 46, "layer3.2.conv1": 44,
}  # fmt: skip


def test_a_real_network_at_half_of_its_multiply_adds(shared_data: Path, cifar_jpegs: Path) -> None:
    from compressor.data.load import load_data
    from compressor.models.cifar import cifar_resnet20
    from compressor.models.weights import load_weights
    from compressor.training.scoring import accuracy

    model = cifar_resnet20().eval()
    load_weights(model, shared_data / "resnet20_cifar10jpeg.pt", 10)
    data = load_data(f"folder:{cifar_jpegs}", seed=0)
    space = PruningSpace(model, torch.zeros(1, 3, 32, 32))
    plan = space.plan(WIDTHS)
    assert space.macs(space.widths(WIDTHS)) / space.macs(space.dense_widths) == pytest.approx(0.5, abs=0.001)
    batches, few = list(data.train.sample(64).batches(64)), data.test.sample(250)
    assert accuracy(space.apply(plan), few) < 0.35
    assert accuracy(compensate(space, plan, batches).network, few) > 0.78
    assert accuracy(space.compensate(plan, batches, "moments"), few) > 0.60


class Normalised(nn.Module):
    """conv a: 3->8 and a batch norm after the layer b that reads it; its channels 4 to 7 are a large constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.b(self.a(x)))).mean((2, 3)))


def test_a_sliced_network_with_statistics_of_its_own_is_not_made_worse() -> None:
    torch.manual_seed(0)
    model = filled(Normalised())
    with torch.no_grad():
        model.a.weight[4:] = 0
        model.a.bias[4:] = 5.0
    x = images(64, 3, 6, 6)
    model.norm.momentum = 1.0
    model.norm.train()
    outputs(model, x)  # the statistics are those of the images
    model.eval()
    space = PruningSpace(model, torch.zeros(1, 3, 6, 6))
    reference = Reference(space, [x])
    plan = ChannelPlan({"a": (0, 1, 2, 3)})
    worse = space.apply(plan)  # closer than the sliced network, but less than statistics of its own make that
    own = own_statistics(worse, reference.images, range(1))
    worse.norm.running_mean.lerp_(own.norm.running_mean, 0.5)
    found = judged(reference, plan, worse, {"b": 0.5}, {})
    assert found.statistics == "own"
    assert found.left == {"b": NOT_CLOSER}
    assert not found.refitted
    exact = [[outputs(model, x)]]
    cut, small = ([[outputs(network, x)]] for network in (space.apply(plan), found.network))
    assert difference(exact, small) < 0.1 * difference(exact, cut)
    assert found.error == found.error_cut < 0.1 * difference(exact, cut)
