"""Widths, groups, settings, modes and bad input of the pruning space."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.space import PruningSpace
from tests.pruning.networks import DataDependent, Zoo, filled, fvcore_macs


class Residual(nn.Module):
    """conv 3->8, then x + conv 6->8(conv 8->6(x)), pooled to 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.outer = nn.Conv2d(6, 8, 1, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.inner(x).relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture
def example() -> Tensor:
    return torch.randn(1, 3, 10, 10)


def test_groups_costs_and_layers_by_hand(example: Tensor) -> None:
    space = PruningSpace(Residual().eval(), example)
    assert [(g.name, g.width, g.coupled, g.members) for g in space.groups] == [
        ("stem", 8, True, ("stem", "outer")),
        ("inner", 6, False, ("inner",)),
    ]
    assert [s.name for s in space.skipped] == ["head"]
    # 100 positions: stem 27a, norm 2a, inner 9ab, outer ab; head 4a.
    assert space.macs([5, 3]) == 100 * (27 * 5 + 2 * 5 + 9 * 5 * 3 + 5 * 3) + 4 * 5
    assert space.params([5, 3]) == 27 * 5 + 2 * 5 + 9 * 5 * 3 + 5 * 3 + 4 * 5 + 4
    assert space.macs(np.array([[5, 3], [8, 6]])).tolist() == [space.macs([5, 3]), space.macs([8, 6])]
    assert [(layer.name, layer.kind, layer.kernel, layer.in_hw) for layer in space.layers] == [
        ("stem", "conv", (3, 3), (10, 10)),
        ("inner", "conv", (3, 3), (10, 10)),
        ("outer", "conv", (1, 1), (10, 10)),
        ("head", "linear", (1, 1), (1, 1)),
    ]
    assert space.layers[2].in_channels(np.array([[5, 3], [8, 6]])).tolist() == [3, 6]


def test_a_batch_is_cut_to_one_input(example: Tensor) -> None:
    model = Residual().eval()
    assert PruningSpace(model, example.repeat(4, 1, 1, 1)).macs([8, 6]) == fvcore_macs(model, example)


def test_granularity_minimum_and_dense_width(example: Tensor) -> None:
    space = PruningSpace(Residual().eval(), example, granularity=4)
    assert [space.choices(i).tolist() for i in range(2)] == [[4, 8], [4, 6]]
    assert space.uniform(0.5).widths == {"stem": 4, "inner": 4}
    each = PruningSpace(Residual().eval(), example, granularity={"inner": 2}, min_width={"stem": 3, "*": 0.5})
    assert [each.choices(i).tolist() for i in range(2)] == [[3, 4, 5, 6, 7, 8], [4, 6]]
    assert each.round(np.array([0.0, 5.1])).tolist() == [3, 6]
    assert each.smallest().widths == {"stem": 3, "inner": 4}
    default = PruningSpace(
        nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 2, 1)).eval(), example, granularity=8
    )
    assert default.min_widths.tolist() == [8]


def test_frozen_and_inner_groups_are_named(example: Tensor) -> None:
    inner = PruningSpace(Residual().eval(), example, scope="inner")
    assert [g.name for g in inner.groups] == ["inner"]
    assert {s.name: s.reason for s in inner.skipped}["stem"].startswith("it runs through residual additions")
    # A pattern of a member freezes its group.
    frozen = PruningSpace(Residual().eval(), example, frozen=["out*"])
    assert [g.name for g in frozen.groups] == ["inner"]
    assert {s.name: s.reason for s in frozen.skipped}["stem"] == "frozen by the caller"
    assert frozen.macs([3]) == inner.macs([3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_channels_last_and_modes(dtype: torch.dtype, example: Tensor) -> None:
    model = Residual().to(dtype).to(memory_format=torch.channels_last).train()
    with torch.no_grad():
        space = PruningSpace(model, example.to(dtype))
        small = space.apply(space.uniform(0.5))
    assert model.training
    assert small.training
    assert small.outer.weight.dtype == dtype
    assert small.inner.weight.is_contiguous(memory_format=torch.channels_last)
    assert not small.inner.weight.is_contiguous()
    assert small.stem.weight.requires_grad
    assert small.stem.weight.is_leaf
    assert small.eval()(example.to(dtype)).shape == (1, 4)


class OnlyReal(nn.Module):
    """Makes a CPU tensor without saying so and reads a parameter's value: impossible on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) * torch.arange(x.shape[-1]).float()
        return self.head(x * float(self.scale.detach()) if self.scale > 0 else x)


def test_networks_that_cannot_run_on_the_meta_device(example: Tensor) -> None:
    model = OnlyReal().eval()
    space = PruningSpace(model, example)
    small = space.apply(space.uniform(0.5))
    assert space.groups[0].width == 8
    assert small(example).shape == (1, 2, 10, 10)
    assert space.macs([4]) == fvcore_macs(small, example)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(example: Tensor) -> None:
    model = filled(Residual()).cuda()
    space = PruningSpace(model, example.cuda())
    small = space.apply(space.plan([4, 3], "fpgm"))
    assert small(example.cuda()).is_cuda


def test_the_model_keeps_hooks_modes_and_gradients(example: Tensor) -> None:
    model = Residual()
    model.inner.eval()
    seen: list[int] = []
    model.stem.register_forward_hook(lambda *_: seen.append(1))
    model(example).sum().backward()
    gradient = model.stem.weight.grad.clone()
    space = PruningSpace(model, example)
    small = space.apply(space.uniform(0.5))
    assert seen == [1]
    assert (model.training, model.inner.training, small.inner.training) == (True, False, False)
    assert torch.equal(model.stem.weight.grad, gradient)
    assert small.stem.weight.grad is None
    assert not small.stem._forward_hooks
    assert torch.equal(model.norm.num_batches_tracked, torch.tensor(1))


def test_the_slim_network_shares_nothing(example: Tensor) -> None:
    model = filled(Residual())
    space = PruningSpace(model, example)
    small = space.apply(space.dense())
    memory = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert not memory & {p.data_ptr() for p in [*small.parameters(), *small.buffers()]}
    small(example).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_weights_of_another_copy(example: Tensor) -> None:
    space = PruningSpace(filled(Residual(), 0), example)
    other = filled(Residual(), 1)
    plan = space.plan([3, 2])
    assert torch.equal(
        space.apply(plan, other).outer.weight,
        other.outer.weight[list(plan.keep["stem"])][:, list(plan.keep["inner"])],
    )


def test_many_applies_leave_nothing_behind(example: Tensor) -> None:
    space = PruningSpace(Zoo().eval(), torch.randn(1, 3, 32, 32))
    plan = space.uniform(0.5)
    space.apply(plan)
    gc.collect()
    before = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    for _ in range(200):
        space.apply(plan)
    gc.collect()
    assert sum(issubclass(type(o), Tensor) for o in gc.get_objects()) <= before


def test_shared_memory_between_parameters_is_named(example: Tensor) -> None:
    model = Residual().eval()
    twin = nn.Conv2d(8, 6, 3, padding=1, bias=False)
    model.inner.weight = nn.Parameter(model.inner.weight.detach())
    twin.weight = nn.Parameter(model.inner.weight.detach())
    model.outer = nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), twin, nn.Conv2d(6, 8, 1, bias=False))
    space = PruningSpace(model, example)
    reasons = {s.name: s.reason for s in space.skipped}
    assert "shares its memory" in reasons["inner"]
    assert space.apply(space.uniform(0.5))(example).shape == (1, 4)


def test_plan_round_trip_and_checksum(example: Tensor) -> None:
    space = PruningSpace(Residual().eval(), example)
    plan = space.plan({"inner": 2})
    assert plan.widths == {"stem": 8, "inner": 2}
    again = ChannelPlan.from_json(plan.to_json())
    assert again == plan
    assert (again.checksum, hash(again)) == (plan.checksum, hash(plan))
    assert space.plan({"inner": 3}).checksum != plan.checksum
    for text in ("", "[]", '{"keep": {"a": [1.5]}}', '{"keep": {"a": [2, 1]}}', '{"keep": {"a": []}}'):
        with pytest.raises(CompressorError):
            ChannelPlan.from_json(text)


# -------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("widths", "words"),
    [
        ({"inner": 0}, "below the smallest width"),
        ({"inner": 7}, "above the dense width 6"),
        ({"stem": 5}, "not a multiple of the granularity 4"),
        ({"innr": 4}, "no group 'innr'"),
        ([8], "1 widths for 2 groups"),
        ([8, 4.0], "must be a whole number"),
        ([8, True], "must be a whole number"),
    ],
)
def test_bad_widths(widths: object, words: str, example: Tensor) -> None:
    space = PruningSpace(Residual().eval(), example, granularity=4)
    with pytest.raises(CompressorError, match=words):
        space.plan(widths)  # type: ignore[arg-type]


def test_bad_ratio_and_rounding(example: Tensor) -> None:
    space = PruningSpace(Residual().eval(), example)
    for ratio in (0.0, 1.1, -1.0, float("nan")):
        with pytest.raises(CompressorError, match="ratio to keep"):
            space.uniform(ratio)
    with pytest.raises(CompressorError, match="finite numbers"):
        space.round(np.array([1.0, np.nan]))
    with pytest.raises(CompressorError, match="one column for each"):
        space.macs([1, 2, 3])


def test_bad_models_and_inputs(example: Tensor) -> None:
    model = Residual().eval()
    with pytest.raises(
        CompressorError, match=r"fails on the example input \(\(1, 5, 10, 10\).*stem.*expected"
    ):
        PruningSpace(model, torch.randn(1, 5, 10, 10))
    with pytest.raises(CompressorError, match="on meta, the model on cpu"):
        PruningSpace(model, example.to("meta"))
    with pytest.raises(CompressorError, match=r"meta device.*stem\.weight"):
        PruningSpace(Residual().to("meta"), example)
    with pytest.raises(CompressorError, match=r"depends on its data.*DataDependent"):
        PruningSpace(DataDependent(), torch.randn(1, 3, 8, 8))
    with pytest.raises(CompressorError, match=r"must be a torch\.nn\.Module"):
        PruningSpace("resnet18", example)  # type: ignore[arg-type]
    with pytest.raises(CompressorError, match="no parameters"):
        PruningSpace(nn.ReLU(), example)
    with pytest.raises(CompressorError, match="must contain a tensor"):
        PruningSpace(model, (1, 2))
    with pytest.raises(CompressorError, match="lazy"):
        PruningSpace(nn.Sequential(nn.LazyConv2d(3, 1)), example)


def test_bad_settings(example: Tensor) -> None:
    model = Residual().eval()
    with pytest.raises(CompressorError, match="'nothing' of frozen groups matches nothing"):
        PruningSpace(model, example, frozen=["nothing"])
    with pytest.raises(CompressorError, match="matches no group"):
        PruningSpace(model, example, granularity={"nothing": 4})
    with pytest.raises(CompressorError, match="granularity must be"):
        PruningSpace(model, example, granularity=0)
    with pytest.raises(CompressorError, match="not a share"):
        PruningSpace(model, example, min_width=1.5)
    with pytest.raises(CompressorError, match="scope must be"):
        PruningSpace(model, example, scope="outer")  # type: ignore[arg-type]


def test_a_plan_of_another_space(example: Tensor) -> None:
    space = PruningSpace(Residual().eval(), example)
    with pytest.raises(CompressorError, match=r"disagree about tensor 'act\.weight'"):
        space.apply(space.dense(), Zoo())
    with pytest.raises(CompressorError, match="group 'other'"):
        space.apply(ChannelPlan({"other": (0,)}))
    with pytest.raises(CompressorError, match="keeps channel 9"):
        space.apply(ChannelPlan({"stem": (0, 9)}))


class Caching(nn.Module):
    """Heads in an attribute, and a table of biases that the first run keeps (as LeViT does)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 3)
        self.bias = nn.Parameter(torch.randn(4, 5, 5))
        self.bias_cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.bias_cache:
            self.bias_cache["bias"] = self.bias * 2
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) + self.bias_cache["bias"]).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(b, n, -1))


def test_caches_of_the_dense_network_stay_behind() -> None:
    model, example = Caching().eval(), torch.randn(1, 5, 16)
    with torch.no_grad():
        model(example)
        space = PruningSpace(model, example)
        assert [(g.name, g.width, g.unit) for g in space.groups] == [("qkv", 4, 12)]
        small = space.apply(space.plan([2]))
        kept = list(space.plan([2]).keep["qkv"])
        assert small(example).shape == (1, 5, 3)
    assert small.heads == 2
    assert torch.equal(small.bias_cache["bias"], model.bias_cache["bias"][kept])


class Parts(nn.Module):
    """Channels split by sizes that are attributes, one of them a share of another."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.sizes = 12, [5, 7]
        self.first, self.second = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1)
        self.gated, self.rest = nn.Conv2d(6, 4, 1), nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).split(self.width // 2, dim=1)
        c, d = torch.split(self.second(x), self.sizes, dim=1)
        return self.gated(a * b) + self.rest(d) + c.mean()


def test_split_sizes_in_attributes_follow(example: Tensor) -> None:
    model = filled(Parts())
    space = PruningSpace(model, example)
    assert [(g.name, g.width, g.unit) for g in space.groups] == [
        ("first", 6, 2),
        ("second", 5, 1),
        ("second/2", 7, 1),
    ]
    small = space.apply(space.plan([4, 2, 3]))
    assert (small.width, small.sizes, model.sizes) == (8, [2, 3], [5, 7])
    assert small(example).shape == model(example).shape


class Grouped(nn.Module):
    """One grouped convolution that loses whole groups (8 of 2 channels), one whose groups lose channels (2 of 16), a
    depthwise one, a transposed one, and one whose padding is given by name, which fvcore does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1, bias=False)
        self.rows = nn.Conv2d(16, 16, 3, padding=1, groups=8, bias=False)
        self.widen = nn.Conv2d(16, 32, 1, bias=False)
        self.columns = nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=False)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.up = nn.ConvTranspose2d(32, 8, 2, stride=2, bias=False)
        self.same = nn.Conv2d(8, 4, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.columns(self.widen(self.rows(self.stem(x))))
        return self.head(self.norm(self.same(self.up(self.deep(x)))).mean((2, 3)))


def test_macs_of_each_layer_by_hand_and_as_fvcore_counts_them(example: Tensor) -> None:
    from fvcore.nn import FlopCountAnalysis

    from compressor.pruning.counts import operator_cost, positions_of

    space = PruningSpace(Grouped().eval(), example)
    widths = space.widths({"stem": 4, "widen": 8, "columns": 8, "up": 6, "same": 2})
    small = space.apply(space.plan(widths))
    assert (small.rows.groups, small.columns.groups, small.deep.groups) == (4, 2, 16)
    found = dict(zip([layer.name for layer in space.layers], space.layer_macs(widths).tolist(), strict=True))
    assert found == {
        "stem": 100 * 3 * 8,
        "rows": 100 * 9 * 2 * 8,
        "widen": 100 * 8 * 16,
        "columns": 100 * 9 * 8 * 16,
        "deep": 100 * 9 * 16,
        "up": 100 * 4 * 16 * 6,
        "same": 400 * 9 * 6 * 2,
        "head": 2 * 2,
    }
    assert space.other_macs(widths) == {
        "batch_norm": 2 * 400 * 2,
        "layers that fvcore does not count": -found["same"],
    }
    assert sum(found.values()) + sum(space.other_macs(widths).values()) == space.macs(widths)
    counted = FlopCountAnalysis(small, example).unsupported_ops_warnings(False).by_module()
    assert {name: counted[name] for name in found} == {**found, "same": 0}
    for layer in space.layers:
        weight = small.get_submodule(layer.name).weight
        c_in, c_out = layer.in_channels(widths), layer.out_channels(widths)
        assert layer.weights(c_in, c_out) == weight.numel(), layer.name
        positions = positions_of(layer.kind, layer.in_hw, layer.out_hw)
        in_pixels, out_pixels = np.prod(layer.in_hw), np.prod(layer.out_hw)
        cost = operator_cost(
            c_in, c_out, taps=layer.taps, positions=positions, in_pixels=in_pixels, out_pixels=out_pixels,
            groups=layer.groups, group_size=layer.group_size,
        )  # fmt: skip
        assert (cost.macs, cost.weights) == (found[layer.name], weight.numel())
        assert cost.moved == weight.numel() + c_in * in_pixels + c_out * out_pixels
    assert [layer.group_size for layer in space.layers] == [0, 2, 0, 0, 1, 0, 0, 0]


def test_windows_and_tokens_count_to_each_layer() -> None:
    from torchvision.models import swin_t

    space = PruningSpace(swin_t(weights=None).eval(), torch.zeros(1, 3, 64, 64))
    qkv = next(layer for layer in space.layers if layer.name.endswith("attn"))
    assert qkv.in_hw == (9 * 49, 1)  # 16 x 16 places are padded to 3 x 3 windows of 7 x 7
    half = space.round(0.5 * space.dense_widths)
    assert space.layer_macs(half).sum() + sum(space.other_macs(half).values()) == space.macs(half)
