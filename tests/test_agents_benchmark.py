"""The comparison of the agents: which cells there are, what they are called, and which may stand in one table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.agents import Cell, cells, check_settings, path_of, summary


def options(folder: Path, **changed: object) -> argparse.Namespace:
    given = {
        "model": "cifar_resnet20", "seeds": [0, 1], "evaluations": [100, 400], "budgets": ["latency:30%"],
        "agents": ["uniform", "knapsack"], "brief": [0, 8], "epochs": 1, "search_images": 500,
        "batch_norm_batches": 10, "out": folder,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changed})


def test_cells_and_their_names(tmp_path: Path) -> None:
    found = cells(options(tmp_path))
    names = [cell.name for cell in found]
    assert len(found) == len(set(names)) == 2 * (1 + 2 * 2)  # uniform pruning has one cell for each seed
    assert names[:3] == [
        "cifar_resnet20-latency-30-1-uniform-0",
        "cifar_resnet20-latency-30-100-knapsack-0",
        "cifar_resnet20-latency-30-100-knapsack-0-brief8",
    ]


def test_cells_of_other_settings_are_no_part_of_the_table(tmp_path: Path) -> None:
    given = options(tmp_path)
    wanted = cells(given)
    path_of(given, wanted[1]).write_text(json.dumps({"epochs": 1, "search_images": 500}))
    check_settings(given, wanted)
    with pytest.raises(SystemExit, match="was made with epochs 1, not 5: give another --out"):
        check_settings(options(tmp_path, epochs=5), wanted)


def test_a_row_has_mean_and_spread_over_the_seeds() -> None:
    entries = [
        {"used": 100, "before": 0.2, "after": after, "share": 0.3, "measured_share": None, "kept": kept,
         "search_minutes": 2.0}
        for after, kept in ((0.5, True), (0.6, False))
    ]  # fmt: skip
    row = summary(entries)
    assert (row["after"], row["kept"], row["used"], row["seeds"]) == ("55.00% ±7.07", "no", "100", "2")
    assert summary([])["after"] == "-"
    assert Cell("m", "params:50%", 4, "joint", 1, 16).name == "m-params-50-4-joint-1-brief16"
