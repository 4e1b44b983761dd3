"""The comparison of the agents: which cells there are, what they are called, and which may stand in one table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from rich.console import Console

from benchmarks import agents_store as store
from benchmarks.agents import cells, found, is_unmeasured, measure
from benchmarks.agents_page import Cell, page, summary
from benchmarks.compared import compared, packed, unpacked
from compressor.core.files import sha256_file
from compressor.search.records import Candidate, SearchResult


def options(folder: Path, **changed: object) -> argparse.Namespace:
    given = {
        "model": "cifar_resnet20", "seeds": [0, 1], "evaluations": [100, 400], "budgets": ["latency:30%"],
        "agents": ["uniform", "knapsack"], "brief": [0, 8], "epochs": 1, "search_images": 500,
        "batch_norm_batches": 10, "compensate": "off", "score": "accuracy", "image_size": None, "depth": "off",
        "results": folder / "results", "work": folder / "work", "data": "digits",
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changed})


def test_cells_and_their_names(tmp_path: Path) -> None:
    found = cells(options(tmp_path), "cifar_resnet20")
    names = [cell.name for cell in found]
    assert len(found) == len(set(names)) == 2 * (1 + 2 * 2)  # uniform pruning has one cell for each seed
    assert names[:3] == [
        "cifar_resnet20-latency-30-1-uniform-0",
        "cifar_resnet20-latency-30-100-knapsack-0",
        "cifar_resnet20-latency-30-100-knapsack-0-brief8",
    ]


def test_cells_of_other_settings_are_no_part_of_the_page(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"these")
    given = options(tmp_path, weights=str(weights))
    store.check(given)
    one = cells(given, "cifar_resnet20")[1]
    store.keep(given, one, cell("knapsack", 0.5))
    store.check(given)
    assert store.stored(given) == [cell("knapsack", 0.5)]
    with pytest.raises(SystemExit, match="was made with epochs 1, not 5: give another --results"):
        store.check(options(tmp_path, weights=str(weights), epochs=5))


def test_cells_of_other_weights_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"these")
    given = options(tmp_path, weights=str(weights))
    path = store.network_path(given, given.model)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"weights_sha256": sha256_file(weights), "dense_accuracy": 0.9}))
    store.check(given)
    assert store.dense_accuracies(given) == {"cifar_resnet20": 0.9}
    weights.write_bytes(b"others")
    with pytest.raises(SystemExit, match="was made with other weights than"):
        store.check(given)
    store.check(options(tmp_path, weights=str(weights), model="cifar_resnet56"))


def test_a_search_of_other_settings_is_not_taken_up(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"these")
    given = options(tmp_path, weights=str(weights))
    one = cells(given, "cifar_resnet20")[0]
    first = store.search_path(given, one)
    assert store.search_path(given, one) == first
    assert store.search_path(options(tmp_path, weights=str(weights), search_images=9), one) != first
    weights.write_bytes(b"others")
    assert store.search_path(given, one) != first
    store.forget_search(given, one)
    assert first.is_dir()


def test_commands_side_by_side_run_each_cell_once(tmp_path: Path) -> None:
    given = options(tmp_path)
    one, other = cells(given, "cifar_resnet20")[:2]
    with store.claimed(given, one) as ours, store.claimed(given, one) as theirs:
        assert ours
        assert not theirs
        with store.claimed(given, other) as third:
            assert third
        store.keep(given, one, cell("uniform", 0.5))
    with store.claimed(given, one) as again:
        assert not again  # it is there


def test_how_soon_plans_were_found() -> None:
    def candidate(width: int, accuracy: float, given_up: bool = False) -> Candidate:
        return Candidate((width,), accuracy, accuracy, {"params": float(width)}, "p", 0, given_up=given_up)

    scored = [
        candidate(9, 0.95), candidate(4, 0.3), candidate(3, 0.2), candidate(4, 0.3), candidate(2, 0.9, True),
        candidate(5, 0.5),
    ]  # fmt: skip
    result = SearchResult(None, {}, 0.5, 0.5, tuple(scored), 5, 1.0, {})  # type: ignore[arg-type]
    assert found(result, lambda rows: rows[:, 0] <= 5) == [[2, 0.3], [5, 0.5]]


def test_latencies_that_are_still_to_be_measured() -> None:
    assert is_unmeasured(cell("joint", 0.5, budget="latency:50%"))
    assert not is_unmeasured(cell("joint", 0.5, budget="latency:50%", measured_share=0.4))
    assert not is_unmeasured(cell("joint", 0.5))


def test_the_same_plan_is_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.41, 0.42])
    monkeypatch.setattr("benchmarks.agents.prepared", MagicMock())
    monkeypatch.setattr("benchmarks.agents.measured_share", lambda *_: next(shares))
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"these")
    given = options(tmp_path, weights=str(weights))
    plans = {"joint": 8, "stepwise": 8, "constrained": 7, "knapsack": 6}
    for agent, width in plans.items():
        done = 0.4 if agent == "knapsack" else None
        entry = cell(agent, 0.5, budget="latency:50%", widths={"a": width}, measured_share=done)
        store.keep(given, Cell("cifar_resnet20", "latency:50%", 100, agent, 0), entry)
    measure(given, Console(quiet=True))
    found = {each["agent"]: each["measured_share"] for each in store.stored(given)}
    assert found["joint"] == found["stepwise"] != found["constrained"]
    assert {found["joint"], found["constrained"]} == {0.41, 0.42}
    assert found["knapsack"] == 0.4


def cell(agent: str, after: float, seed: int = 0, **changed: object) -> dict[str, Any]:
    given = {
        "model": "cifar_resnet20", "budget": "params:50%", "evaluations": 100, "agent": agent, "seed": seed,
        "brief": 0, "epochs": 1, "search_images": 500, "batch_norm_batches": 10, "used": 100,
        "search_accuracy": 0.3, "before": 0.2, "after": after, "share": 0.3, "measured_share": None,
        "test_images": 10_000, "target_share": 0.3, "kept": True, "search_minutes": 2.0,
        "found": [[30, 0.2], [60, 0.3]], "widths": {"a": 8},
    }  # fmt: skip
    return {**given, **changed}


def test_a_row_has_mean_and_spread_over_the_seeds() -> None:
    row = summary([cell("joint", 0.5), cell("joint", 0.6, seed=1, kept=False)])
    assert (row["after"], row["kept"], row["used"], row["seeds"]) == ("55.0 ± 7.1", "no", "100", "2")
    latency = cell("joint", 0.5, budget="latency:30%", measured_share=0.29)
    assert summary([latency])["kept"] == "yes"
    assert summary([latency, {**latency, "measured_share": 0.301}])["kept"] == "by prediction"
    assert Cell("m", "params:50%", 4, "joint", 1, 16).name == "m-params-50-4-joint-1-brief16"


def test_a_gap_counts_the_seeds_that_both_have() -> None:
    base = {0: 0.80, 1: 0.50}
    found = compared({0: 0.83}, base, 10_000)
    assert found.gap == pytest.approx(3)
    assert found.noise == pytest.approx(200 * ((0.8 * 0.2 + 0.83 * 0.17) / 10_000) ** 0.5)
    assert found.verdict == "better than"
    found = compared({0: 0.81, 1: 0.61}, base, 10_000)
    assert found.gap == pytest.approx(6)
    assert found.noise > 30  # between the seeds
    assert found.verdict == "not distinguishable from"
    assert compared({2: 0.5}, base, 10_000).gap == pytest.approx(-15)  # no seed in common


def test_networks_that_err_on_the_same_images_are_told_apart() -> None:
    """8,000 of 10,000 images are right in one, these and 100 others in the other: 100 changes, all one way."""
    images = np.arange(10_000)
    first, second = images < 8_100, images < 8_000
    shares = {0: 0.81}, {0: 0.80}
    alone = compared(*shares, 10_000)
    assert alone.verdict == "not distinguishable from"
    assert alone.noise == pytest.approx(200 * ((0.81 * 0.19 + 0.8 * 0.2) / 10_000) ** 0.5)
    paired = compared(*shares, 10_000, ({0: first}, {0: second}))
    assert paired.verdict == "better than"
    assert paired.noise == pytest.approx(200 * (0.01 * 0.99 / 10_000) ** 0.5)
    assert (unpacked(packed(first), 10_000) == first).all()


def test_seeds_share_the_test_images_and_do_not_add_to_them() -> None:
    images = np.arange(10_000)
    first, second = images < 8_100, images < 8_000
    rights = {0: first, 1: first}, {0: second, 1: second}
    one = compared({0: 0.81}, {0: 0.80}, 10_000, ({0: first}, {0: second}))
    assert compared({0: 0.81, 1: 0.81}, {0: 0.80, 1: 0.80}, 10_000, rights).noise == pytest.approx(one.noise)


def test_the_page_tells_the_agents_apart_and_what_is_missing() -> None:
    found = [
        cell("uniform", 0.70, evaluations=1, used=1), cell("knapsack", 0.80), cell("joint", 0.81),
        cell("stepwise", 0.70, before=0.1, found=[[80, 0.25]]), cell("knapsack", 0.82, evaluations=400, used=400),
    ]  # fmt: skip
    missing = [
        Cell("cifar_resnet20", "params:50%", 400, agent, seed)
        for agent in ("joint", "random")
        for seed in (0, 1)
    ]
    text = page(
        found,
        {"cifar_resnet20": 0.8827},
        [*missing, Cell("cifar_vgg16_bn", "params:10%", 100, "joint", 0)],
        "python -m it",
    )
    first, second = text.split("## cifar_resnet20, 400 evaluations")
    assert "Dense, as given: 88.27%." in first
    assert "| params:50% | joint | 100 | 30.0 | 20.0 | 81.0 | 30.0% |  | yes | 2.0 | 1 |" in first
    assert "| params:50% | uniform | 1 |" in first
    assert "| params:50% | uniform | 1 |" in second
    assert (
        "- params:50%: joint is not distinguishable from the knapsack (+1.00 points, noise 1.12) after fine-tuning, "
        "and not distinguishable from the knapsack (+0.00 points, noise 1.13) before it. On the search split it "
        "reaches the knapsack's final accuracy after 60 plans (1 of 1 seeds)."
    ) in first
    assert (
        "- params:50%: stepwise is worse than the knapsack (-10.00 points, noise 1.22) after fine-tuning, and worse "
        "than the knapsack (-10.00 points, noise 1.00) before it. On the search split it does "
        "not reach the knapsack's final accuracy."
    ) in first
    assert "is worse" not in second
    assert "5 cells:" in second
    assert "- `cifar_resnet20`, 400 evaluations, params:50%: joint, random (seeds 0, 1)" in second
    assert "- `cifar_vgg16_bn`, 100 evaluations, params:10%: joint (seeds 0)" in second
    assert "python -m it" in second


def test_what_the_search_sees_is_compared_with_what_training_makes_of_it() -> None:
    def plan(width: int, before: float, after: float, **changed: object) -> dict[str, Any]:
        return cell("joint", after, before=before, widths={"a": width}, **changed)

    rising = [plan(width, 0.1 * width, 0.5 + 0.1 * (width % 5)) for width in range(1, 5)]
    text = page([*rising, plan(5, 0.5, 0.5), cell("uniform", 0.1, before=0.9)], {}, [], "it")
    # Of five plans the last falls from the first place to the last, which moves the other four by one.
    assert "| cifar_resnet20 | params:50% | 5 | +0.00 | 15.8 | 15.8 |" in text
    same = plan(5, 0.7, 0.5, evaluations=400)  # the plan of another search: the mean of both counts
    assert "| cifar_resnet20 | params:50% | 5 | +0.00 | 19.2 | 15.8 |" in page(
        [*rising, plan(5, 0.5, 0.5), same], {}, [], "it"
    )
    assert "| cifar_resnet20 | params:50% | 4 |" not in page(rising, {}, [], "it")  # too few
