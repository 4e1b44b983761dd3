"""Runs agents on a fake space, with files in a folder, and kills them."""

from __future__ import annotations

import shutil
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
    """Dies right after its n-th save, or copies its folder after each: all that a kill there would leave.

    A kill whose search is resumed takes as long as the whole search, and a copy only what is left of it.
    """

    def __init__(self, path: Path, saves: int | None = None, *, copies: bool = False) -> None:
        super().__init__(path)
        self.left = saves
        self.copies = copies
        self.saved = 0

    def save(self, state: Any) -> None:
        super().save(state)
        self.saved += 1
        if self.copies:
            shutil.copytree(self.path.parent, self.copied(self.saved))
        if self.left is not None and self.saved >= self.left:
            raise Killed

    def copied(self, save: int) -> Path:
        """The folder as it was right after the n-th save."""
        return self.path.parent.with_name(f"{self.path.parent.name}-{save}")


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
        copies: bool = False,
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
        self.checkpoint = FragileCheckpoint(self.folder / "agent.pt", kill_after, copies=copies)
        try:
            return agent.search(env, evaluator, limits or Limits(), log=log, checkpoint=self.checkpoint)
        finally:
            self.log_lines = list(log.records())

    def stopped(self, save: int) -> Bench:
        """A bench with the files as they were after the n-th save of the last search, which made copies."""
        return Bench(self.checkpoint.copied(save))
