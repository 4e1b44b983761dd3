"""The agents on a small real network: real space, budgets, training, evaluation and alignment."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressor.budgets.base import parse_budget
from compressor.budgets.limits import resolve
from compressor.core.records import EpisodeLog
from compressor.data import load_data
from compressor.pruning.space import PruningSpace
from compressor.search.base import create_agent
from compressor.search.environment import PruningEnv
from compressor.search.evaluate import Evaluator, Scoring
from compressor.search.records import Limits, SearchResult
from compressor.search.schedule import Schedule
from compressor.training.classification import Classification
from compressor.training.loop import Trainer, TrainSettings
from compressor.training.losses import Alignment
from tests.search.bench import FragileCheckpoint


class Residual(nn.Module):
    """Two convolutions around a shortcut, and a head: one coupled group and one inner one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=4, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()
        )
        self.inner = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.head = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.outer(self.inner(x)))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def digits() -> Any:
    return load_data("digits", seed=0)


SMALL = {
    "fill_episodes": 8,
    "episodes_per_epoch": 5,
    "hidden": 32,
    "updates_per_episode": 2,
    "decoder_updates": 5,
}


def search(
    digits: Any,
    folder: Path,
    name: str = "joint",
    share: str = "50%",
    context: int = 8,
    copies: bool = False,
) -> tuple[SearchResult, Any]:
    torch.manual_seed(0)
    model = Residual()
    space = PruningSpace(model, torch.zeros(1, 3, 32, 32))
    budgets = resolve([parse_budget("macs", share), parse_budget("params", "70%")], space)
    evaluator = Evaluator(space, Classification.of(digits), Scoring(bn_batches=2))
    batch = next(iter(digits.train.batches(64)))
    env = PruningEnv(space, budgets, evaluator, context_size=context, importance_data=[batch])
    agent = create_agent(
        name,
        seed=1,
        trainer=Trainer(
            model,
            Classification.of(digits),
            TrainSettings(batch_size=64, learning_rate=0.1),
            epochs=3,
            seed=1,
        ),
        schedule=Schedule(1, 1, 1),
        settings=SMALL if name == "joint" else {},
        alignment=partial(Alignment, space, beta=1e-3),
        curves=folder / "curves",
    )
    log, checkpoint = EpisodeLog(folder / "episodes.jsonl"), FragileCheckpoint(folder / "agent.pt", copies=copies)
    limits = Limits() if name == "joint" else Limits(max_evaluations=16)
    return agent.search(env, evaluator, limits, log=log, checkpoint=checkpoint), env


def test_joint_on_a_real_network(digits: Any, tmp_path: Path) -> None:
    result, env = search(digits, tmp_path / "whole", copies=True)
    widths = list(result.widths.values())
    for budget in env.budgets:
        assert budget.predict(np.array([widths]))[0] <= budget.target
    assert result.accuracy > 0.3  # three epochs of a tiny network; chance is 0.1
    assert result.best.widths == dict(result.widths)
    assert list((tmp_path / "whole" / "curves").glob("events*"))
    for save in (2, 5):  # killed there
        again, _ = search(digits, tmp_path / f"whole-{save}")
        assert again.candidates == result.candidates
        assert again.best == result.best
    tightened, env = search(digits, tmp_path / "whole", share="45%")
    assert env.bounds.feasible(np.array([list(tightened.widths.values())]))[0]
    assert tightened.evaluations <= 8


@pytest.mark.parametrize("name", ["knapsack", "uniform"])
def test_others_on_a_real_network(digits: Any, tmp_path: Path, name: str) -> None:
    result, env = search(digits, tmp_path, name=name, context=0)
    assert env.bounds.feasible(np.array([list(result.widths.values())]))[0]
    assert result.timing["training"] > 0


def test_observations_of_a_real_network(digits: Any) -> None:
    space = PruningSpace(Residual(), torch.zeros(1, 3, 32, 32))
    env = PruningEnv(space, resolve([parse_budget("macs", "50%")], space), lambda plan: 0.5)
    seen, _ = env.reset()
    # The stem: 3 channels in, 12 of at most 16 out, the longest stride, the largest kernel.
    assert seen[:5].tolist() == pytest.approx([0.0, 3 / 16, 12 / 16, 1.0, 1.0])
    assert seen[5:8].sum() == pytest.approx(1.0)
