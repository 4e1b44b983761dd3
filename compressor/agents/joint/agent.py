"""The joint agent: SAC decides widths while the weights train towards what it favours (arXiv 2403.19490)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.agents.base import Agent, Limits, SearchResult
from compressor.agents.joint.search import JointSearch
from compressor.agents.joint.settings import JointSettings, plan_episodes
from compressor.agents.search_run import SearchRun

if TYPE_CHECKING:
    from compressor.env.environment import PruningEnv
    from compressor.run_dir import Checkpoint, EpisodeLog
    from compressor.training.evaluate import Evaluator


class JointAgent(Agent):
    """Trains and prunes at once: a soft actor-critic chooses the ratios, rewarded with the accuracy.

    The phases, each resumable where a step of it ends: warm-up epochs; random episodes that fill the replay,
        with the
    weights at rest; joint epochs, each after a round of episodes and with a regulariser that pulls the
    weights towards the structure favoured then; aligned epochs, with that structure fixed; and the final
    choice among the best few, the deterministic policy's and the uniform plan, all scored again on the final
    weights.

    Without a trainer, or with `joint_training` off, the weights rest between the rounds of episodes, which follow one
    another.
    """

    name = "joint"
    trains_jointly = True
    Settings = JointSettings

    def search(
        self,
        env: PruningEnv,
        evaluator: Evaluator,
        limits: Limits,
        *,
        log: EpisodeLog,
        checkpoint: Checkpoint,
    ) -> SearchResult:
        run = SearchRun(self, env, evaluator, limits, log, checkpoint)
        if (result := run.result()) is not None:
            return result
        search = JointSearch(run, self.settings, self.alignment)
        if run.place.round:  # a budget was tightened: the weights stay, and what was learned serves
            search.play_again()
            return search.choose()

        joint, schedule = self.settings.joint_training, self.schedule
        plan = plan_episodes(self.settings, schedule.joint, limits, len(env.bounds.dense))
        run.train("warmup", schedule.warmup if joint else schedule.total, "Training before the search")
        search.measure_groups(plan.points)
        search.fill_replay(plan.fill, plan.reserve)
        for block in run.remaining("joint", plan.rounds * plan.blocks):
            search.play(plan.block_episodes(block), plan.reserve)
            search.learn()
            if plan.ends_round(block):
                search.favour(plan.reserve)
                if schedule.joint and joint:
                    search.train_joint_epoch()
            run.done("joint")
        if joint:
            search.align_to_favoured()
            run.train("aligned", schedule.aligned, "Training towards the chosen structure")
        return search.choose()
