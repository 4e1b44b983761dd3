"""Whole runs that remove blocks: what is recorded, delivered and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor import CompressorError, load, run_recipe
from compressor.latency.local import LocalCpu
from compressor.pruning.space import PruningSpace
from compressor.run.explain import explain_again
from compressor.run.job import Job
from tests.latency.conftest import MadeUpDevice, local_table
from tests.runs import IMAGE_SIZE, manifest_of, recipe

NAMES = ["body.0", "body.1", "body.2"]


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.first = nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.second = nn.Conv2d(8, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.two(F.relu(self.first(self.one(x))))))


class Deep(nn.Module):
    """Three blocks of equal cost, which are most of the network's."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.body = nn.Sequential(*(Block(16) for _ in range(3)))
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(F.relu(self.norm(self.stem(x)))).mean((2, 3)))
        return out


@pytest.mark.parametrize("agent", ["knapsack", "joint"])
def test_a_run_that_may_only_remove_blocks(agent: str, tmp_path: Path) -> None:
    fields = {
        "model": "tests.run.test_depth_run:Deep", "agent": agent, "epochs": 2, "budgets": {"flops": "60%"},
        "pruning": {"depth": "auto", "min_share": 1.0},
    }  # fmt: skip
    result = run_recipe(recipe(**fields), out=tmp_path / "run")
    assert result.exit_code == 0
    manifest = manifest_of(tmp_path / "run")
    (left,) = set(NAMES) - set(manifest["removed"])  # at 60 % one of the three can stay
    assert {group["name"]: group["kept"] for group in manifest["groups"]} == {
        "stem": 16, **{f"{name}.one": 8 if name == left else 0 for name in NAMES}
    }  # fmt: skip
    gone = [layer for layer in manifest["layers"] if layer["slim_macs"] == 0]
    assert [layer["slim_channels"] for layer in gone] == [[0, 0]] * 4
    assert manifest["checks"]["fvcore"]["confirmed"] is True
    assert manifest["budgets"][0]["measured"] == manifest["cost"]["slim"]["macs"]
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "2 blocks were removed whole: " + ", ".join(n for n in NAMES if n != left) in page
    again = load(tmp_path / "run", factory=Deep)
    assert not [key for key in again.state_dict() if key.startswith("body") and not key.startswith(left)]
    graph = onnx.load(tmp_path / "run/model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert (kinds.count("Conv"), kinds.count("Add")) == (3, 1)
    assert again(torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)).shape == (2, 10)
    if agent == "knapsack":
        list(explain_again(tmp_path / "run", factory="tests.run.test_depth_run:Deep"))
        lines = {line["name"]: line for line in manifest_of(tmp_path / "run")["explanation"]["lines"]}
        for name in NAMES:
            dense_ms, slim_ms = (lines[f"{name}.one"][which] for which in ("dense_ms", "slim_ms"))
            assert dense_ms > 0
            assert (slim_ms is None) == (name != left)


@pytest.mark.parametrize(
    ("fields", "depth"),
    [
        ({"budgets": {"latency": "100%"}}, "auto"),
        ({"budgets": {"latency": "100%"}, "pruning": {"depth": "off"}}, "off"),
        ({"budgets": {"flops": "60%"}}, "off"),
        ({"budgets": {"latency": "100%"}, "agent": "uniform"}, "off"),
        (
            {"budgets": {"latency": "100%"}, "agent": "constrained", "search": {"settings": {"action": "channel"}}},
            "off",
        ),
        ({"budgets": {"latency": "100%"}, "model": "tests.nets:tiny"}, "off"),  # it has no blocks
    ],
    ids=["latency", "off", "flops", "uniform", "single channels", "no blocks"],
)
def test_blocks_may_go_where_a_latency_is_a_budget(fields: dict[str, Any], depth: str) -> None:
    base = {"model": "tests.run.test_depth_run:Deep", "agent": "knapsack", "device": "jetson-orin-nano-8gb"}
    job = Job.prepare(recipe(**{**base, **fields}).resolved())
    assert job.recipe.pruning.depth == depth
    assert job.space.depth == (depth == "auto")
    assert not [note for note in job.notes if "blocks" in note]


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        ({"agent": "uniform"}, "smallest network with all blocks needs", "(--agent knapsack --set pruning.depth=auto)"),
        ({"pruning": {"depth": "off"}}, "with all blocks needs", "let whole blocks go (--set pruning.depth=auto)"),
        ({"agent": "uniform", "pruning": {"depth": "auto"}}, "No single ratio", "such as --agent knapsack"),
        (
            {
                "agent": "constrained",
                "search": {"settings": {"action": "channel"}},
                "pruning": {"depth": "auto"},
            },
            "single channels .* cannot remove blocks",
            "Set pruning.depth=off, or action=layer",
        ),
    ],
)
def test_a_budget_that_only_fewer_blocks_keep(
    fields: dict[str, Any], message: str, hint: str, tmp_path: Path
) -> None:
    kept = {"pruning": {"min_share": 1.0, **fields.get("pruning", {})}}
    base = {"model": "tests.run.test_depth_run:Deep", "agent": "knapsack", "budgets": {"latency": "70%"}}
    wanted = {**base, "device": "jetson-orin-nano-8gb", **fields, **kept}
    with pytest.raises(CompressorError, match=message) as refused:
        run_recipe(recipe(**wanted), out=tmp_path / "run")
    assert hint in refused.value.hint
    assert not (tmp_path / "run").exists()
    followed = {**wanted, "agent": "knapsack", "search": {}, "pruning": {"min_share": 1.0, "depth": "auto"}}
    assert Job.prepare(recipe(**followed).resolved()).space.depth


def test_blocks_stay_where_the_table_was_measured_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalCpu, "time_limit_s", 0.0)  # the fewest networks: what the table says is not asked
    wanted = recipe(model="tests.run.test_depth_run:Deep", agent="knapsack", budgets={"latency": "9ms"}).resolved()
    example = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    for depth in (False, True):
        space = PruningSpace(Deep(), example, depth=depth)
        job = Job.prepare(wanted, local_table(space, example, device=MadeUpDevice()))
        said = [note for note in job.notes if "was measured with all blocks" in note]
        assert (job.recipe.pruning.depth, job.space.depth) == (("auto", True) if depth else ("off", False))
        assert len(said) == (0 if depth else 1)
