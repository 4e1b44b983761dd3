"""The model of the changing reward learns, and only what it should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compressor.core.errors import CompressorError
from compressor.search.environment import PruningEnv
from compressor.search.joint_learner import Learner
from compressor.search.joint_settings import ENVIRONMENT_MODEL, JointSettings
from compressor.search.records import Candidate, Episode, Transition
from compressor.search.schedule import Schedule
from tests.search.bench import Bench
from tests.search.fake_space import FakeEvaluator, FakeSpace, macs_budget

SMALL: dict[str, Any] = {
    "warm_start": False,
    "fill_episodes": 12, "episodes_per_epoch": 6, "updates_per_episode": 1, "hidden": 32, "decoder_updates": 20,
    "proposals": 64,
}  # fmt: skip


def learner_with_epochs(epochs: int, context: int = 8, **settings: Any) -> Learner:
    """A learner that has seen the same two-step episodes earn 0.1 more in each epoch."""
    space = FakeSpace([8, 8])
    env = PruningEnv(space, [macs_budget(space, 0.5)], FakeEvaluator(space, [1, 1]), context_size=context)
    learner = Learner(env, JointSettings(**{**SMALL, **settings}), seed=0)
    generator = np.random.default_rng(0)
    for epoch in range(epochs):
        learner.begin_epoch(epoch)
        for _ in range(20):
            seen = [np.concatenate([generator.random(9), env.context]).astype(np.float32) for _ in range(3)]
            candidate = Candidate((4, 4), 0.0, 0.1 * epoch, {}, "fill", epoch)
            steps = (
                Transition(seen[0], 0.5, seen[1], 0.0, False, 0.5),
                Transition(seen[1], 0.5, seen[2], 0.1 * epoch, True, 0.5),
            )
            learner.remember(Episode(steps, candidate))
    learner.sac.replay_buffer.standardise()
    return learner


def test_gradients_reach_embeddings_and_gru_but_not_the_policy() -> None:
    learner = learner_with_epochs(4)
    model = learner.model
    assert model is not None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    policy = {name: value.clone() for name, value in learner.sac.policy.state_dict().items()}
    with learner.randomness.active():
        model.learn(learner.sac.replay_buffer, updates=5, batch=32)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"embeddings.{epoch}" for epoch in range(4)} <= moved
    assert {"gru.weight_ih_l0", "gru.weight_hh_l0", "decoder.0.weight"} <= moved
    assert all(torch.equal(value, policy[name]) for name, value in learner.sac.policy.state_dict().items())
    with learner.randomness.active():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        learner.sac.train(3, 16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_decoder_tells_epochs_apart() -> None:
    learner = learner_with_epochs(4)
    assert learner.model is not None
    with learner.randomness.active():
        first = learner.model.learn(learner.sac.replay_buffer, updates=1, batch=64)[0]
        for _ in range(10):
            last = np.mean(learner.model.learn(learner.sac.replay_buffer, updates=40, batch=64))
    assert first > 0.5  # the scaled rewards have a variance of 1
    assert last < 0.1


def test_replayed_transitions_get_the_state_of_their_epoch_as_it_is_now() -> None:
    learner = learner_with_epochs(3)
    assert learner.model is not None
    replay = learner.sac.replay_buffer
    drawn = np.array([0, 50, 119])  # of epochs 0, 1, 2
    old = replay._get_samples(drawn).observations[:, -8:]
    learner.learn(10)
    new = replay._get_samples(drawn)
    expected = torch.from_numpy(learner.model.plain_contexts())
    assert torch.equal(new.observations[:, -8:], expected)
    assert torch.equal(new.next_observations[:, -8:], expected)
    assert not torch.allclose(old, expected)
    assert learner._env.context == pytest.approx(expected[2].numpy())


def test_whole_returns_and_bootstrapped_ones() -> None:
    replay = learner_with_epochs(2).sac.replay_buffer
    whole = replay._get_samples(np.array([78, 79]))  # the two steps of the last episode, which earned 0.1
    assert whole.dones[:, 0].tolist() == [1.0, 1.0]
    assert whole.rewards[:, 0].tolist() == pytest.approx([1.0, 1.0])  # a standard deviation above the mean
    replay = learner_with_epochs(2, returns="bootstrapped").sac.replay_buffer
    plain = replay._get_samples(np.array([78, 79]))
    assert plain.dones[:, 0].tolist() == [0.0, 1.0]
    assert plain.rewards[:, 0].tolist() == pytest.approx([0.0, 1.0])


def test_no_room_for_a_state_means_no_model() -> None:
    assert learner_with_epochs(2, context=0).model is None


def test_killed_with_the_model_it_ends_the_same(new_bench: Any) -> None:
    options: dict[str, Any] = {
        "train": True,
        "schedule": Schedule(0, 3, 1),
        "settings": SMALL,
        "context_size": 16,
    }
    bench = new_bench("whole")
    whole = bench.search("joint", copies=True, **options)
    without = new_bench("without").search("joint", **{**options, "context_size": 0})
    assert whole.candidates != without.candidates
    for save in range(2, bench.checkpoint.saved, 3):
        again = bench.stopped(save).search("joint", **options)
        assert again.candidates == whole.candidates
        assert again.learned == whole.learned
    # 20 updates, where the publication has 100, in the second round and in the third: three states of the weights.
    learned = whole.learned[ENVIRONMENT_MODEL]
    assert (learned["updates"], learned["weights"]) == (40, 3)
    assert without.learned == {}


def test_a_state_with_another_model_is_refused(bench: Bench) -> None:
    bench.search("joint", settings=SMALL, context_size=16)
    with pytest.raises(CompressorError, match="has a context of 16 numbers, the environment one of 0"):
        bench.search("joint", settings=SMALL, share=0.4)


def test_actions_beyond_the_bounds_are_stored_as_asked_and_as_moved() -> None:
    learner = learner_with_epochs(1)
    replay = learner.sac.replay_buffer
    step = Transition(np.zeros(17, np.float32), 0.5, np.zeros(17, np.float32), 1.0, True, 0.75)
    before = replay.size()
    learner.remember(Episode((step,), Candidate((4, 4), 0.9, 0.9, {}, "joint", 0)))
    assert replay.size() == before + 2
    assert replay.actions[before : before + 2, 0, 0].tolist() == pytest.approx(
        [0.0, 0.5], abs=1e-6
    )  # of [-1, 1]
    assert replay.returns[before : before + 2, 0].tolist() == pytest.approx([0.9, 0.9])


def test_every_episode_is_remembered_with_the_epoch_of_its_weights(
    new_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered: list[tuple[int, int]] = []
    remember = Learner.remember

    def noted(self: Learner, episode: Episode) -> None:
        remembered.append((episode.candidate.epoch, self._epoch))
        remember(self, episode)

    monkeypatch.setattr(Learner, "remember", noted)
    schedule = Schedule(1, 2, 2)
    new_bench("run").search("joint", train=True, schedule=schedule, settings=SMALL, context_size=16)
    assert {epoch for epoch, _ in remembered} == {
        1,
        2,
        5,
    }  # after the warm-up, a joint epoch, and all of them
    assert all(epoch == theirs + schedule.warmup for epoch, theirs in remembered)
