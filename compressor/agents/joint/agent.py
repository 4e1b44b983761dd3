"""The joint agent: SAC decides widths while the weights train towards what it favours (arXiv 2403.19490)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.agents.base import Agent, SearchResult
from compressor.agents.joint.search import JointSearch
from compressor.agents.joint.settings import JointSettings, plan_episodes

if TYPE_CHECKING:
    from compressor.agents.search_run import SearchRun


class JointAgent(Agent):
    """Trains and prunes at once: a soft actor-critic chooses the ratios, rewarded with the accuracy.

    The phases, each resumable where a step of it ends: warm-up epochs; episodes that fill the replay, with the weights
    at rest; joint epochs, each after a round of episodes and with a regulariser that pulls the weights towards
    the structure favoured then; aligned epochs, with that structure fixed; and the final choice among the best few,
    the deterministic policy's and the uniform plan, all scored again on the final weights.

    Without a trainer, or with `joint_training` off, the weights rest between the rounds of episodes, which follow one
    another.
    """

    name = "joint"
    trains_jointly = True
    Settings = JointSettings

    @property
    def epochs_before(self) -> int:
        return self.schedule.warmup if self.settings.joint_training else self.schedule.total

    def _search(self, run: SearchRun) -> SearchResult:
        search = JointSearch(run, self.settings, self.alignment)
        if run.place.round:  # a budget was tightened: the weights stay, and what was learned serves
            search.play_again()
            return search.choose()

        joint, schedule = self.settings.joint_training, self.schedule
        plan = plan_episodes(self.settings, schedule.joint, run.limits, len(run.env.bounds.dense))
        search.measure_groups(plan.points)
        search.fill_replay(plan.fill, plan.reserve)
        for block in run.remaining("joint", plan.rounds * plan.blocks):
            if run.late:
                break
            search.play(plan.block_episodes(block), plan.reserve)
            search.learn()
            if plan.ends_round(block):
                search.favour(plan.reserve)
                if schedule.joint and joint:
                    search.train_joint_epoch()
            run.done("joint")
        if joint:
            search.train_aligned()
        if run.limits.use_all:
            search.play_out(plan.rounds * plan.blocks)
        return search.choose()
