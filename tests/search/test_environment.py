"""The environment keeps gymnasium's rules, scores once, and describes groups with right numbers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check

from compressor.core.errors import CompressorError
from compressor.search.environment import FEATURES, PruningEnv
from tests.search.fake_space import FakeEvaluator, FakeSpace, macs_budget


@pytest.fixture
def space() -> FakeSpace:
    return FakeSpace([16, 32, 8], granularity=4)


def make(space: FakeSpace, share: float = 0.5, context: int = 0) -> PruningEnv:
    return PruningEnv(
        space, [macs_budget(space, share)], FakeEvaluator(space, [1, 2, 3]), context_size=context
    )


@pytest.mark.parametrize("context", [0, 5])
def test_checkers_pass(space: FakeSpace, context: int) -> None:
    from stable_baselines3.common.env_checker import check_env as sb3_check

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # both advise another range of actions
        gymnasium_check(make(space, context=context), skip_render_check=True)
        sb3_check(make(space, context=context))


def test_an_episode(space: FakeSpace) -> None:
    env = make(space)
    seen, _ = env.reset(seed=1)
    assert seen.shape == (9,)
    assert seen.dtype == np.float32
    rewards, actions, done = [], [], False
    while not done:
        seen, reward, done, truncated, info = env.step(np.array([0.4], dtype=np.float32))
        assert not truncated
        assert 0.0 <= info["action"] < 1.0
        rewards.append(reward)
        actions.append(info["action"])
    assert rewards[:2] == [0.0, 0.0]
    score = info["score"]
    assert rewards[2] == score.reward == score.accuracy > 0
    assert score.costs["macs"] <= env.budgets[0].target
    assert len(score.widths) == 3
    with pytest.raises(CompressorError, match="episode has ended"):
        env.step(np.array([0.4], dtype=np.float32))


def test_the_clipped_action_is_told() -> None:
    space = FakeSpace([8])
    env = PruningEnv(space, [macs_budget(space, 0.5)], FakeEvaluator(space, [1]))
    env.reset()
    _, _, _, _, info = env.step(np.array([0.95], dtype=np.float32))
    assert (info["action"], info["width"]) == (0.5, 4)


def test_observation_by_hand() -> None:
    # MACs / 576 of the chain 3 -> a -> b -> 10 are 3 a + a b + 10 b; dense (8, 4): 24 + 32 + 40 = 96.
    space = FakeSpace([8, 4])
    env = PruningEnv(space, [macs_budget(space, 0.9)], FakeEvaluator(space, [1, 1]))
    first, _ = env.reset()
    # Least (1, 1): 14. With a dense and b least: 24 + 8 + 10 = 42.
    expected = [0.0, 3 / 8, 1.0, 1 / 2, 1.0, (42 - 14) / 96, 14 / 96, (96 - 42) / 96, 0.0]
    assert first == pytest.approx(expected, abs=1e-6)
    second, _, _, _, info = env.step(np.array([0.25], dtype=np.float32))
    assert info["width"] == 6
    # a = 6: with b least 18 + 6 + 10 = 34, with b dense 18 + 24 + 40 = 82; nothing comes after it.
    expected = [0.5, 6 / 8, 4 / 8, 1.0, 1.0, (82 - 34) / 96, 34 / 96, 0.0, 0.25]
    assert second == pytest.approx(expected, abs=1e-6)
    assert len(FEATURES) == 9


def test_context_is_appended(space: FakeSpace) -> None:
    env = make(space, context=2)
    env.context = np.array([0.5, -3.0], dtype=np.float32)
    seen, _ = env.reset()
    assert seen[-2:].tolist() == [0.5, -3.0]
    assert env.observation_space.contains(seen)


def test_known_widths_are_not_evaluated_twice(space: FakeSpace) -> None:
    env = make(space)
    first = env.score([8, 16, 8])
    again = env.score([8, 16, 8])
    assert (env.evaluations, again.accuracy, again.seconds) == (1, first.accuracy, 0.0)
    env.weights_moved()
    env.score([8, 16, 8])
    assert env.evaluations == 2
    assert space.ranked == 2  # once for each state of the weights


def test_saliency_is_computed_once_for_each_state_of_the_weights(space: FakeSpace) -> None:
    env = make(space)
    first = env.saliency()
    assert env.saliency() is first
    assert space.ranked == 1
    env.weights_moved()
    env.saliency()
    assert space.ranked == 2


def test_state_brings_back_what_is_known(space: FakeSpace) -> None:
    env = make(space)
    accuracy = env.score([8, 16, 8]).accuracy
    other = make(space)
    other.restore(env.state())
    assert other.score([8, 16, 8]).accuracy == accuracy
    assert other.evaluations == 1


def test_no_groups() -> None:
    with pytest.raises(CompressorError, match="no group of channels"):
        PruningEnv(FakeSpace([]), [], lambda plan: 1.0)
