"""Runs agents on a fake space, with files in a folder, and kills them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.core.records import Checkpoint, EpisodeLog
from compressor.search.base import create_agent
from compressor.search.environment import PruningEnv
from compressor.search.records import Limits, SearchResult
from tests.search.fake_space import FakeEvaluator, FakeSpace, FakeTrainer, macs_budget

WORTH = [5.0, 1.0, 1.0, 4.0]


def brief(name: str) -> dict[str, Any]:
    """Settings of an agent whose learning does not matter to a test: few updates of small networks, few proposals."""
    learning = {"hidden": 32, "proposals": 128}
    return {
        "constrained": learning, "joint": {**learning, "updates_per_episode": 1}, "stepwise": learning,
    }.get(name, {})  # fmt: skip


class Killed(Exception):
    """Stands for a kill: nothing of the search goes on after it."""


class FragileCheckpoint(Checkpoint):
    """Dies right after its n-th save."""

    def __init__(self, path: Path, saves: int | None = None) -> None:
        super().__init__(path)
        self.left = saves
        self.saved = 0

    def save(self, state: Any) -> None:
        super().save(state)
        self.saved += 1
        if self.left is not None and self.saved >= self.left:
            raise Killed


class Bench:
    """Runs agents on new objects each time, as a new process would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log_lines: list[dict[str, Any]] = []

    def search(
        self,
        name: str,
        *,
        limits: Limits | None = None,
        share: float = 0.5,
        train: bool = False,
        kill_after: int | None = None,
        space: FakeSpace | None = None,
        fail_after: int | None = None,
        **options: Any,
    ) -> SearchResult:
        space = space or FakeSpace([16, 24, 16, 32], granularity=2)
        trainer = FakeTrainer() if train else None
        evaluator = FakeEvaluator(space, WORTH[: len(space.groups)], trainer)
        evaluator.fail_after = fail_after
        context = options.pop("context_size", 0)
        env = PruningEnv(space, [macs_budget(space, share)], evaluator, context_size=context)
        agent = create_agent(name, trainer=trainer, **options)
        self.trainer, self.evaluator, self.env = trainer, evaluator, env
        log = EpisodeLog(self.folder / "episodes.jsonl")
        self.checkpoint = FragileCheckpoint(self.folder / "agent.pt", kill_after)
        try:
            return agent.search(env, evaluator, limits or Limits(), log=log, checkpoint=self.checkpoint)
        finally:
            self.log_lines = list(log.records())
