"""The comparison of widths and depth reads the runs that it makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks import depth


def test_a_finished_run_becomes_a_row(finished: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(finished, work / "cifar_resnet20" / "knapsack-0-widths")
    given = {"--data": "digits", "--model": "cifar_resnet20", "--weights": "none", "--work": str(work)}
    options = depth.parsed([word for pair in given.items() for word in pair])
    found = depth.run(options, "knapsack", 0, "widths")
    manifest = json.loads((finished / "manifest.json").read_text())
    assert found["dense"] == manifest["accuracy"]["dense"]
    assert found["accuracy"] == manifest["accuracy"]["finetuned"]
    assert found["macs"] == manifest["cost"]["slim"]["macs"] / manifest["cost"]["dense"]["macs"]
    assert found["blocks"] == []
    assert 0 < found["channels"] < 1
