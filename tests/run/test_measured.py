"""What a run makes of a network that was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compressor import run_recipe
from compressor.budgets.base import Budget
from compressor.budgets.costs import ParamsBudget
from compressor.core.files import sha256_file
from compressor.core.manifest import Budget as BudgetRecord
from compressor.core.manifest import Cost, Export, Manifest, NetworkCost
from compressor.latency.networks import tag
from compressor.run.measure import _judged_budgets, timed_file
from tests.other_device import OtherDevice, Proportional
from tests.runs import recipe


@pytest.mark.parametrize(("share", "told"), [(0.9, False), (1.1, True)])
def test_a_network_that_saves_multiply_adds_and_no_time_says_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, told: bool
) -> None:
    dense_ms = Proportional().measure(tag(finished / "checkpoints/dense.onnx"), 1.0).median_ms
    OtherDevice(1.0).install_measuring(monkeypatch, slim_ms=[share * dense_ms])
    result = run_recipe(recipe(budgets={"flops": "50%"}, agent="uniform"), out=tmp_path / "run")
    assert result.exit_code == 0
    assert any("110% of the dense one's measured time" in note for note in result.manifest["notes"]) == told
    assert ("there was no latency budget" in (tmp_path / "run/report.html").read_text()) == told


@dataclass(frozen=True)
class Channels(Budget):
    target: float
    dense: float
    name: str = "onnx_bytes"  # as a count of the manifest
    unit: str = "channels"

    def predict(self, widths: Any) -> Any:
        return np.atleast_2d(widths).sum(axis=1).astype(np.float64)


def test_only_a_counted_budget_is_judged_by_the_files_counts() -> None:
    params = ParamsBudget(SimpleNamespace(params=lambda rows: rows.sum(axis=1)), 10.0, 40.0)  # type: ignore[arg-type]
    budgets = [Channels(20.0, 40.0), params]
    records = [
        BudgetRecord(name=each.name, unit=each.unit, target=each.target, dense=each.dense, how=each.how)
        for each in budgets
    ]
    cost = Cost(slim=NetworkCost(params=9, onnx_bytes=12_345))
    run: Any = SimpleNamespace(manifest=SimpleNamespace(budgets=records, cost=cost))
    space = SimpleNamespace(row=lambda plan: np.asarray(plan.widths))
    job: Any = SimpleNamespace(space=space, budgets=lambda: budgets, callers={})
    plan: Any = SimpleNamespace(widths=[4, 8])
    found = list(_judged_budgets(run, job, plan, None))
    assert [(each.measured, each.how, each.kept) for each in found] == [(12, "computed", True), (9, "counted", True)]


@pytest.mark.parametrize(
    ("precision", "entry", "named"),
    [
        ("fp32", None, None),
        ("int8", Export(file="model.int8.onnx"), None),  # as the probe, all in INT8
        ("int8", Export(file="model.int8.onnx", kept_float=["conv"]), "model.int8.onnx"),
        ("fp16", Export(file="model.fp16.onnx", kept_fp32=["conv"]), "model.fp16.onnx"),
        ("mixed", Export(file="model.mixed.onnx"), "model.mixed.onnx"),
    ],
)
def test_a_file_whose_widths_do_not_determine_its_time_is_named(
    tmp_path: Path, precision: str, entry: Export | None, named: str | None
) -> None:
    for name in ("model.onnx", "probe.onnx", *([] if entry is None else [entry.file])):
        (tmp_path / name).write_text(name)
    exports = {} if entry is None else {precision: entry}
    run: Any = SimpleNamespace(manifest=Manifest(exports=exports))
    job: Any = SimpleNamespace(recipe=SimpleNamespace(precision=precision))
    right = "" if named is None else sha256_file(tmp_path / named)
    assert timed_file(run, job, tmp_path / "model.onnx") == right
    probed = timed_file(run, job, tmp_path / "probe.onnx")
    assert probed == (sha256_file(tmp_path / "probe.onnx") if precision == "mixed" else "")
