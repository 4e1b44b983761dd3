"""The joint agent: SAC chooses widths while the weights train towards the favored structure (arXiv 2403.19490)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressor.search.base import IDLE, Agent
from compressor.search.candidate import SearchResult
from compressor.search.joint.published import ALIGNMENT, PUBLISHED
from compressor.search.joint.search import JointSearch
from compressor.search.joint.settings import ENVIRONMENT_MODEL, LEARNED, JointSettings, plan_episodes
from compressor.search.registry import register_agent
from compressor.search.schedule import JOINT_EPOCHS_TO_LEARN

if TYPE_CHECKING:
    from compressor.search.session import SearchSession


@register_agent
class JointAgent(Agent):
    """Trains and prunes together: a soft actor-critic chooses the ratios, with the accuracy as reward.

    The phases, each resumable at the end of a step: warm-up epochs; episodes that fill the replay, with fixed weights;
    joint epochs, each after a round of episodes and with a regularizer that pulls the weights towards the structure
    favored then; aligned epochs, with that structure fixed; and the final choice among the best few, the deterministic
    policy's and the uniform plan, all scored again on the final weights.

    Without a trainer, or with `joint_training` off, the weights stay fixed between the rounds of episodes.
    """

    name = "joint"
    source = "arXiv 2403.19490"
    published = PUBLISHED
    trains_jointly = True
    Settings = JointSettings

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._model_is_idle = ""
        if self.context_size and (reason := self._nothing_to_tell_apart()):
            self._model_is_idle, self.context_size = reason, 0

    def _nothing_to_tell_apart(self) -> str:
        """Return why the environment model has nothing to learn from; "" if it has."""
        if self.settings.proposer != "learned":
            return f"proposer is {self.settings.proposer!r}: no policy reads it"
        if not self.settings.joint_training:
            return "joint_training is off: the weights rest between the rounds of episodes"
        epochs = self.schedule.joint if self.trainer is not None else 0
        if epochs < JOINT_EPOCHS_TO_LEARN:
            had = f"the search has {epochs or 'no'} joint epoch{'' if epochs == 1 else 's'}"
            return f"it learns how rewards change from one joint epoch to the next, and {had}"
        return ""

    def idle(self) -> dict[str, str]:
        found = {}
        if self._model_is_idle:
            found[ENVIRONMENT_MODEL] = self._model_is_idle
        if self.alignment is not None and not (self.settings.joint_training and self._trained_towards):
            found[ALIGNMENT] = "no epoch of training follows the choice of a structure"
        return found

    def unread_settings(self) -> dict[str, str]:
        found: dict[str, str] = self.settings.unread(environment_model=bool(self.context_size))
        return found

    @property
    def _trained_towards(self) -> int:
        """Return the number of epochs that pull the weights towards a structure."""
        return 0 if self.trainer is None else self.schedule.joint + self.schedule.aligned

    def effects(self, result: SearchResult) -> dict[str, str]:
        told = {name: f"{IDLE}{reason}" for name, reason in self.idle().items()}
        if learned := result.learned.get(ENVIRONMENT_MODEL):
            updates, states, first, last = (learned[key] for key in LEARNED)
            told[ENVIRONMENT_MODEL] = (
                f"{int(updates)} updates on rewards of {int(states)} states of the weights; squared error of scaled "
                f"rewards {first:.2f} at first, {last:.2f} at last"
            )
        elif self.context_size:
            told[ENVIRONMENT_MODEL] = f"{IDLE}no round of episodes followed the first joint epoch"
        pulled = [each["regulariser"] for each in result.training if each["phase"] in ("joint", "aligned")]
        if pulled and self.alignment is not None and ALIGNMENT not in told:
            epochs = f"{len(pulled)} epoch{'' if len(pulled) == 1 else 's'}"
            told[ALIGNMENT] = (
                f"{epochs}; mean penalty {pulled[0]:.3g} in the first, {pulled[-1]:.3g} in the last"
            )
        return told

    @property
    def epochs_before(self) -> int:
        return self.schedule.warmup if self.settings.joint_training else self.schedule.total

    def _search(self, run: SearchSession) -> SearchResult:
        search = JointSearch(run, self.settings, self.alignment)
        if run.place.round:  # a budget was tightened: the weights stay, and the search reuses what it has learned
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
