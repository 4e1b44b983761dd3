"""Plans near the best, and the model of the reward that picks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.core.agents import agent_class
from compressor.core.records import Checkpoint, EpisodeLog
from compressor.search.allocation import Allocator, Sensitivity
from compressor.search.base import Agent, create_agent
from compressor.search.environment import PruningEnv
from compressor.search.neighbours import PICKED, NearBest, RewardModel, expected_improvement
from compressor.search.proposals import near_rows
from compressor.search.records import Limits, SearchResult
from compressor.search.session import SearchSession
from tests.search.fake_space import FakeEvaluator, FakeSpace, FakeTrainer, macs_budget

NO_TREND = np.zeros(200)
GROUPS = [16, 24, 32, 16, 48, 32, 24, 64]


class Coupled(FakeEvaluator):
    """Neighbouring groups are worth the product of their ratios: no sum of groups tells what a plan is worth."""

    def __call__(self, plan: Any, *, floor: float | None = None) -> float:
        self.evaluations += 1
        ratios = np.sqrt(np.array(list(plan.widths.values())) / self.dense)
        pairs = ratios * np.roll(ratios, 1)
        return float((self.worth * pairs).sum())


def environment(share: float = 0.4) -> tuple[PruningEnv, FakeEvaluator]:
    space = FakeSpace(GROUPS, granularity=2)
    evaluator = Coupled(space, [5.0, 1.0, 1.0, 4.0, 1.0, 6.0, 1.0, 2.0])
    return PruningEnv(space, [macs_budget(space, share)], evaluator), evaluator  # type: ignore[arg-type]


def started(folder: Path, agent: Agent, known: int = 12) -> SearchSession:
    """A search with some random plans scored."""
    env, evaluator = environment()
    run = SearchSession(
        agent,
        env,
        evaluator,  # type: ignore[arg-type]
        Limits(),
        EpisodeLog(folder / "log.jsonl"),
        Checkpoint(folder / "state.pt"),
    )
    for widths in near_rows(env, env.bounds.dense[None], np.random.default_rng(0), 0.5, 4 * known)[:known]:
        run.score(widths, "random")
    return run


def near_best(run: SearchSession, proposals: int = 64) -> NearBest:
    allocator = Allocator(run.env)
    return NearBest(run, allocator, Sensitivity(run, allocator.levels), 0.3, proposals)


def test_expected_improvement_by_hand() -> None:
    mean, deviation = np.array([0.5, 0.4, 0.3]), np.array([0.0, 0.1, 10.0])
    gains = expected_improvement(mean, deviation, 0.5)
    assert gains[0] == pytest.approx(0.0, abs=1e-9)
    assert gains[1] == pytest.approx(-0.1 * 0.158655 + 0.1 * 0.241971, abs=1e-5)  # z = -1
    assert gains.argmax() == 2


@pytest.mark.parametrize("seed", range(4))
def test_what_it_picks_is_among_the_best(seed: int) -> None:
    generator = np.random.default_rng(seed)

    def worth(plans: Any) -> Any:
        return plans[:, 0] * plans[:, 1] - (plans[:, 2] - 0.6) ** 2 + 0.2 * plans[:, 4]

    seen, proposals = generator.random((60, 6)), generator.random((200, 6))
    model = RewardModel()
    model.learn(seen, NO_TREND[:60], worth(seen), kind=0)
    picked = model.pick(proposals, NO_TREND, float(worth(seen).max()), 4)
    assert len(set(picked)) == 4
    truth = worth(proposals)
    ranks = (-truth).argsort().argsort()
    assert ranks[picked[0]] < 5
    assert truth[picked].mean() > np.quantile(truth, 0.95)
    again = RewardModel()
    again.learn(seen, NO_TREND[:60], worth(seen), kind=0)
    assert again.pick(proposals, NO_TREND, float(worth(seen).max()), 4) == picked


def test_what_it_says_follows_from_what_it_was_given_last() -> None:
    generator = np.random.default_rng(1)
    seen, proposals = generator.random((70, 5)), generator.random((30, 5))
    rewards, trend = seen.prod(axis=1), generator.random(100)
    at_once, little_by_little = RewardModel(), RewardModel()
    at_once.learn(seen, trend[:70], rewards, kind=3)
    for number in (10, 25, 40, 70):
        little_by_little.learn(seen[:number], trend[:number], rewards[:number], kind=3)
    picked = [model.pick(proposals, trend[70:], None, 5) for model in (at_once, little_by_little)]
    assert picked[0] == picked[1]


def test_rows_near_are_legal_and_use_the_budget() -> None:
    env, _ = environment()
    start = near_rows(env, env.bounds.dense[None], np.random.default_rng(4), 0.5, 1)[0]
    rows = near_rows(env, start[None], np.random.default_rng(5), 0.3, 200)
    assert len(rows) > 100
    assert env.bounds.feasible(rows).all()
    for group, choices in enumerate(env.bounds.choices):
        assert np.isin(rows[:, group], choices).all()
    excess = env.bounds.excess(rows)
    assert np.median(excess) > 0.95
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_it_hands_out_new_plans_and_goes_on_where_it_stood(tmp_path: Path) -> None:
    run = started(tmp_path, create_agent("random"))
    near = near_best(run)
    best = np.array(max(run.candidates, key=lambda each: each.reward).widths)
    first = near.next(best)
    assert len(near.coming) == PICKED - 1
    assert not run.env.known(first)
    state = near.state()
    taken = [near.next(best).tolist() for _ in range(2)]
    again = near_best(run)
    again.restore(state)
    assert [again.next(best).tolist() for _ in range(2)] == taken
    run.score(near.coming[0], "near")  # scored meanwhile: it is not handed out again
    scored = run.candidates[-1].widths
    assert near.next(best).tolist() != list(scored)


def test_weights_that_moved_ask_for_new_picks(tmp_path: Path) -> None:
    run = started(tmp_path, create_agent("joint", trainer=FakeTrainer()))  # type: ignore[arg-type]
    near = near_best(run)
    best = np.array(run.candidates[0].widths)
    near.next(best)
    assert near.coming
    run.train_epoch("joint")
    found = near.next(best)  # learned from the candidates of the epoch before
    assert len(near.coming) == PICKED - 1
    assert run.env.bounds.feasible(found[None])[0]


def test_what_breaks_the_budgets_is_not_what_there_is_to_improve_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(tmp_path, create_agent("random"))
    best = max(run.candidates, key=lambda each: each.reward)
    run.score(run.env.bounds.dense, "policy")  # an episode that may leave the budgets
    assert run.candidates[-1].reward > best.reward
    asked: list[float | None] = []
    pick = RewardModel.pick

    def spied(model: RewardModel, proposals: Any, trend: Any, incumbent: float | None, number: int) -> list[int]:
        asked.append(incumbent)
        return pick(model, proposals, trend, incumbent, number)

    monkeypatch.setattr(RewardModel, "pick", spied)
    near_best(run).next(np.array(best.widths))
    assert asked == [pytest.approx(np.log(best.reward), abs=0.02)]  # what is expected of the best known plan


def test_where_no_gain_is_expected_the_highest_mean_is_picked() -> None:
    generator = np.random.default_rng(2)
    seen = generator.random((40, 3))
    model = RewardModel()
    model.learn(seen, NO_TREND[:40], seen[:, 0], kind=0)
    proposals = np.sort(generator.random((50, 3)), axis=0)
    assert set(model.pick(proposals, NO_TREND[:50], 1e6, 2)) == {49, 48}


def test_the_trend_says_what_the_inputs_have_not_shown_yet() -> None:
    generator = np.random.default_rng(3)
    seen, proposals = generator.random((20, 8)), generator.random((200, 8))
    picked = []
    for trend in (lambda plans: plans.sum(axis=1), lambda plans: 0.0 * plans[:, 0]):
        model = RewardModel()
        model.learn(seen, trend(seen), 3.0 * seen.sum(axis=1) + 0.1 * seen[:, 0], kind=0)
        picked.append(model.rank(proposals, trend(proposals), None))
    ranks = (-proposals.sum(axis=1)).argsort().argsort()
    assert ranks[picked[0][:10]].max() < 15
    assert ranks[picked[0][:10]].sum() < ranks[picked[1][:10]].sum()


def test_effects_of_groups_add_up_in_the_logarithm(tmp_path: Path) -> None:
    run = started(tmp_path, create_agent("random"))
    sensitivity = Sensitivity(run, Allocator(run.env).levels)
    rows = np.array([GROUPS, [8, *GROUPS[1:]], [8, 12, *GROUPS[2:]], [1, *GROUPS[1:]]])
    assert sensitivity.sum(rows).tolist() == [0.0] * 4  # nothing is measured yet
    sensitivity.losses = [[[0.5, 0.2]], [[0.5, 0.5]], *([[0.5, 0.0]] for _ in GROUPS[2:])]
    expected = [0.0, np.log(0.8), np.log(0.8) + np.log(0.5), np.log(1 - 0.2 * (15 / 8) ** 2)]
    assert sensitivity.sum(rows) == pytest.approx(expected, abs=0.01)


def test_what_is_expected_of_a_known_plan_has_less_noise_than_its_score() -> None:
    generator = np.random.default_rng(4)
    plans = generator.random((80, 4))
    truth = plans @ np.array([1.0, 0.5, 0.2, 0.0])
    rewards = truth + 0.1 * generator.standard_normal(80)
    model = RewardModel()
    model.learn(plans, NO_TREND[:80], rewards, kind=0)
    expected = model.expected(plans, NO_TREND[:80])
    assert np.abs(expected - truth).mean() < 0.5 * np.abs(rewards - truth).mean()
    best = rewards.argmax()
    assert truth[best] < expected[best] < rewards[best]  # a part of the best score is chance


def test_with_little_known_or_one_proposal_chance_decides(tmp_path: Path) -> None:
    few = near_best(started(tmp_path / "few", create_agent("random"), known=3))
    one = near_best(started(tmp_path / "one", create_agent("random")), proposals=1)
    for near in (few, one):
        found = near.next(near._env.bounds.cheapest)
        assert near._env.bounds.feasible(found[None])[0]
        assert not near.coming


def found(name: str, seed: int, proposals: int, folder: Path) -> SearchResult:
    env, evaluator = environment()
    settings: dict[str, Any] = {"proposals": proposals}
    if name == "joint":
        settings |= {"hidden": 16, "updates_per_episode": 1}
    return create_agent(name, seed=seed, settings=settings).search(
        env,
        evaluator,  # type: ignore[arg-type]
        Limits(max_evaluations=45, use_all=True),
        log=EpisodeLog(folder / "log.jsonl"),
        checkpoint=Checkpoint(folder / "state.pt"),
    )


@pytest.mark.parametrize("name", ["joint", "constrained", "stepwise"])
def test_the_models_picks_beat_chance(name: str, tmp_path: Path) -> None:
    """Over seeds, at equal evaluations, where groups interact."""
    guided, blind = (
        np.mean([found(name, seed, number, tmp_path / f"{number}-{seed}").reward for seed in range(2)])
        for number in (64, 1)
    )
    assert guided > blind


@pytest.mark.parametrize("name", ["joint", "constrained", "stepwise"])
def test_bad_numbers_of_proposals(name: str) -> None:
    with pytest.raises(Exception, match="proposals is 0, expected"):
        create_agent(name, settings={"proposals": 0})
    assert agent_class(name).Settings().proposals > 1
