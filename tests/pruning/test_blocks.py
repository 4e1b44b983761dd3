"""Blocks that are removed whole: which are found, what the networks without them are, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.latency.table import LatencyTable
from compressor.pruning.artefact import CHANNELS, load, save
from compressor.pruning.blocks import CHANGED, HOLDS_BLOCK, LOOSE, READ_ELSEWHERE, SHARED
from compressor.pruning.checks import checks
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.removal import Nothing
from compressor.pruning.space import PruningSpace
from export.convert.to_onnx import export_onnx
from tests.pruning.networks import assert_is_dense_with_zeros, filled


class Branch(nn.Module):
    """x + conv(relu(norm(conv(x)))); the activation after it is optional."""

    def __init__(self, channels: int, inner: int, act: bool = False) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(channels, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.two, self.act = nn.Conv2d(inner, channels, 1), act

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.two(F.relu(self.norm(self.one(x))))
        return F.silu(x) if self.act else x


class Told(Branch):
    """A branch that returns what it added as well."""

    def forward(self, x: Tensor) -> Any:
        y = self.two(F.relu(self.norm(self.one(x))))
        return x + y, y


class Outer(nn.Module):
    """A branch with a block in it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before, self.block = nn.Conv2d(channels, channels, 1), Branch(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(self.before(x))


class Traps(nn.Module):
    """Two blocks that can go, and one of each kind that cannot. 3xHxW to 5 classes."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.plain, self.active = Branch(8, 6), Branch(8, 10, act=True)
        self.told, self.twice, self.outer = Told(8, 6), Branch(8, 6), Outer(8)
        self.shortcut, self.beside = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.loose_one, self.loose_two = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1)
        self.tapped = Branch(8, 7)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.active(self.plain(self.stem(x)))
        x, y = self.told(x)
        x = self.twice(self.twice(x * y.sigmoid()))
        x = self.outer(x)
        x = self.shortcut(x) + self.beside(x)
        x = x + self.loose_two(F.relu(self.loose_one(x)))
        kept = x
        x = self.tapped(x)
        x = F.relu_(x)
        return self.head((x + kept.mean()).mean((2, 3)))


@pytest.fixture(scope="module")
def traps() -> PruningSpace:
    torch.manual_seed(0)
    return PruningSpace(filled(Traps()), torch.randn(1, 3, 12, 12))


def test_what_can_go_and_why_the_rest_stays(traps: PruningSpace) -> None:
    assert [(block.name, dict(block.replaced)) for block in traps.blocks] == [
        ("plain", {"plain": "identity"}),
        ("active", {"active": "silu"}),
        ("outer.block", {"outer.block": "identity"}),
    ]
    names = [group.name for group in traps.groups]
    assert [[names[group] for group in block.groups] for block in traps.blocks] == [
        ["plain.one"], ["active.one"], ["outer.block.one"],
    ]  # fmt: skip
    assert [[traps.layers[i].name for i in block.layers] for block in traps.blocks[:1]] == [
        ["plain.one", "plain.two"]
    ]
    reasons = {each.name: each.reason for each in traps.blocks_left}
    assert reasons["told.one"] == READ_ELSEWHERE
    assert reasons["twice.one"] == SHARED
    assert reasons["tapped.one"] == CHANGED
    assert reasons["loose_two"] == LOOSE
    assert reasons["outer"] == HOLDS_BLOCK.format("outer.block")
    with pytest.raises(CompressorError, match=READ_ELSEWHERE):
        traps.plan({}, removed=["told.one"])
    with pytest.raises(CompressorError, match=r"no block 'plan'.*\n?.*plain") as error:
        traps.plan({}, removed=["plan"])
    assert "plain" in str(error.value.hint)


def test_costs_by_hand() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 1), Branch(8, 6), nn.Conv2d(8, 2, 1)))
    space = PruningSpace(model, torch.randn(1, 3, 5, 5))
    plan = space.plan({"0": 4, "1.one": 3}, removed=["1"])
    assert plan.removed == ("1",)
    assert plan.widths == {"0": 4, "1.one": 6}  # what goes is not pruned besides
    assert space.row(plan).tolist() == [4, 6, 0]
    # 25 positions; the stem 3a, the block 9ab + 2b + ab, the head 2a
    assert space.macs([4, 6, 0]) == 25 * (3 * 4 + 2 * 4)
    assert space.macs([4, 3, 1]) == space.macs([4, 3]) == 25 * (3 * 4 + 9 * 4 * 3 + 2 * 3 + 4 * 3 + 2 * 4)
    assert space.params([4, 6, 0]) == 3 * 4 + 4 + 2 * 4 + 2
    assert space.macs(np.array([[4, 6, 0], [4, 3, 1]])).tolist() == [space.macs([4, 6, 0]), space.macs([4, 3])]
    assert space.layer_macs([4, 6, 0]).tolist() == [300, 0, 0, 200]
    assert {name: int(terms) for name, terms in space.other_macs([4, 6, 0]).items()} == {"batch_norm": 0}
    with pytest.raises(CompressorError, match="one column for each of the 2 groups"):
        space.macs([4, 6, 1, 1])
    assert space.settled(np.array([[4, 3, 0], [4, 3, 1]])).tolist() == [[4, 6, 0], [4, 3, 1]]


def _vit() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=6, init_values=0.1)


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=7)


RESNET = ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]
EFFICIENTNET = [f"features.{each}" for each in ("2.1", "3.1", "4.1", "4.2", "5.1", "5.2", "6.1", "6.2", "6.3")]
VIT = [f"blocks.{index}.{part}" for index in range(3) for part in ("attn", "mlp")]


@pytest.mark.parametrize(
    ("name", "blocks", "removed"),
    [
        ("resnet18", RESNET, ["layer1.0", "layer1.1", "layer3.1"]),
        ("efficientnet_b0", EFFICIENTNET, ["features.2.1", "features.6.3"]),
        ("vit", VIT, ["blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "blocks.2.attn"]),
        ("traps", ["plain", "active", "outer.block"], ["active", "outer.block"]),
    ],
)
def test_a_network_without_blocks(name: str, blocks: list[str], removed: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = {"vit": _vit, "traps": Traps}.get(name, lambda: _torchvision(name))()
    example = torch.randn(1, 3, 64, 64)
    space = PruningSpace(filled(model), example)
    assert [block.name for block in space.blocks] == blocks
    random = np.random.default_rng(0)
    plan = space.plan(space.random_widths(random), "random", removed=removed)
    small, row = space.apply(plan), space.row(plan)
    gone = space.replaced(plan)
    # costs are those of the network that is built
    assert sum(parameter.numel() for parameter in small.parameters()) == space.params(row)
    own = PruningSpace(small, example)
    assert own.activations(own.dense_widths) == space.activations(row)
    # nothing is left of the blocks, and the rest computes what it did
    assert not [key for key in small.state_dict() if any(key.startswith(f"{path}.") for path in gone)]
    assert set(small.state_dict()) < set(model.state_dict())
    whole = space.plan({}, removed=removed)
    assert_is_dense_with_zeros(space.apply(whole), space, whole, example, rtol=1e-4, atol=1e-5)
    found = checks(space, plan, small)
    assert found["fvcore"]["confirmed"] is True
    assert f"removal of {len(removed)} blocks" in found["torch_pruning"]["words"]
    # it trains, is saved and loaded
    small.train()(torch.cat([example, example])).sum().backward()
    small.eval()
    factory = Traps if name == "traps" else None if name != "vit" else lambda num_classes=6: _vit()
    save(small, plan, tmp_path, factory=factory)
    again = load(tmp_path, factory=factory)
    torch.testing.assert_close(again(example), small(example))
    assert ChannelPlan.from_json(json.dumps(json.loads((tmp_path / CHANNELS).read_text())["plan"])) == plan
    # the file for the device has one node for each layer that is left, and no addition for a block
    dense = _nodes(space.apply(space.plan(space.widths(plan.widths))), example, tmp_path / "dense.onnx")
    slim = _nodes(small, example, tmp_path / "slim.onnx")
    layers = sum(space.present(row[None])[0].tolist())
    assert slim["Conv"] + slim["Gemm"] + slim["MatMul"] - slim["attention"] == layers
    additions = [dense["Add"] - slim["Add"], len(removed)]
    assert additions[0] == additions[1] if name != "vit" else additions[0] >= additions[1]


def _nodes(model: nn.Module, example: Tensor, path: Path) -> dict[str, int]:
    export_onnx(model, (example,), path, compare=False)
    graph = onnx.load(path).graph
    kinds = [node.op_type for node in graph.node]
    weights = {each.name for each in graph.initializer}
    found = {kind: kinds.count(kind) for kind in ("Conv", "Gemm", "MatMul", "Add")}
    found["attention"] = sum(n.op_type == "MatMul" and not weights & set(n.input) for n in graph.node)
    return found


def test_a_removed_layer_takes_no_time() -> None:
    """The prediction is that of the network without the blocks, by an estimated and by a measured table's formula."""
    example = torch.randn(1, 3, 64, 64)
    space = PruningSpace(filled(_torchvision("resnet18")), example)
    table = LatencyTable.load("jetson-orin-nano-8gb", precision="fp16")
    plan = space.plan(space.round(0.5 * space.dense_widths), removed=["layer1.1", "layer3.1"])
    own = PruningSpace(space.apply(plan), example)
    expected = float(table.curve(own)(own.dense_widths[None])[0])
    assert table.predict(space, plan) == pytest.approx(expected, rel=1e-6)
    both = np.stack([space.row(plan), np.append(space.widths(plan.widths), np.ones(5, dtype=np.int64))])
    operators = table.curve(space).operators(both)
    assert (operators[0, space.blocks[1].layers] == 0).all()
    assert (operators[1] > 0).all()


def test_plans_with_removed_blocks(traps: PruningSpace) -> None:
    plan = traps.plan({"stem": 5}, removed=["plain"])
    assert plan != traps.plan({"stem": 5})
    assert ChannelPlan.from_json(plan.to_json()) == plan
    assert "removed" not in traps.dense().to_json()  # as it was written before there were blocks
    assert traps.plan([*traps.widths(plan.widths), 0, 1, 1]) == plan
    with pytest.raises(CompressorError, match="3 blocks"):
        traps.plan([*traps.widths(plan.widths), 0, 1])
    with pytest.raises(CompressorError, match="list of names"):
        ChannelPlan.from_json('{"keep": {"stem": [0]}, "removed": "plain"}')
    masks = traps.keep_masks(plan)
    assert not masks["plain.two.weight"].any()
    assert masks["active.two.bias"].sum() == 5


@pytest.mark.parametrize(
    ("key", "value"), [("replaced", {}), ("replaced", {"plain": "os.system"}), ("replaced", {"none": "identity"})]
)
def test_changed_files_are_refused(traps: PruningSpace, tmp_path: Path, key: str, value: object) -> None:
    plan = traps.plan({}, removed=["plain"])
    save(traps.apply(plan), plan, tmp_path, factory=Traps)
    content = json.loads((tmp_path / CHANNELS).read_text())
    assert content[key] == {"plain": "identity"}
    (tmp_path / CHANNELS).write_text(json.dumps({**content, key: value}))
    with pytest.raises(CompressorError):
        load(tmp_path, factory=Traps)


def test_what_takes_the_place_of_a_module() -> None:
    first, second = Nothing(2)(torch.ones(1), mask=None)
    x = torch.ones(3)
    assert x + first is x
    assert second + x is x
    x += first
    assert x.tolist() == [1.0, 1.0, 1.0]
