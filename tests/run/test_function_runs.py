"""Whole runs within budgets that are Python functions: noisy ones, and what a resumed run asks anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor import CompressorError, load, run_recipe
from compressor.run.pipeline import resume
from tests.runs import manifest_of, recipe

COSTS = """
import os
import random
from pathlib import Path

LOG = Path(os.environ["COSTS_LOG"])

def channels(module):
    with LOG.open("a") as file:
        file.write("called\\n")
    breaks = LOG.parent / "breaks"
    if breaks.exists() and len(LOG.read_text().splitlines()) > int(breaks.read_text()):
        raise RuntimeError("the meter is away")
    return sum(each.out_channels for each in module.modules() if hasattr(each, "out_channels"))

def noisy(module):
    return channels(module) * random.uniform(0.97, 1.03)
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where each call of the function leaves a line."""
    folder = tmp_path / "costs"
    folder.mkdir()
    (folder / "noisycosts.py").write_text(COSTS)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("COSTS_LOG", str(folder / "calls"))
    return folder / "calls"


def test_a_noisy_function_is_kept_and_not_asked_again(log: Path, tmp_path: Path) -> None:
    asked = recipe(agent="random", budgets={"functions": ["noisycosts:noisy<=75%"]})
    result = run_recipe(asked, out=tmp_path / "run")
    (budget,) = result.manifest["budgets"]
    slim = load(tmp_path / "run", factory=asked.model)
    channels = sum(each.out_channels for each in slim.modules() if hasattr(each, "out_channels"))
    assert channels <= 1.03 / 0.97 * 0.75 * 96  # the target is a share of a noisy value, too
    assert 0.97 * channels <= budget["measured"] <= 1.03 * channels
    assert result.exit_code == (0 if budget["measured"] <= budget["target"] else 3)
    calls = len(log.read_text().splitlines())
    assert calls > 6
    again = resume(tmp_path / "run")
    assert again.exit_code == result.exit_code
    assert len(log.read_text().splitlines()) == calls


def test_a_function_that_fails_in_the_middle_and_is_mended(log: Path, tmp_path: Path) -> None:
    asked = recipe(agent="knapsack", epochs=1, budgets={"functions": ["noisycosts:channels<=75%"]})
    whole = run_recipe(asked, out=tmp_path / "whole")
    calls = len(log.read_text().splitlines())
    log.unlink()
    breaks = log.parent / "breaks"
    breaks.write_text(str(calls - 3))
    with pytest.raises(CompressorError, match="the meter is away") as raised:
        run_recipe(asked, out=tmp_path / "run")
    assert "compress --resume RUN" in raised.value.hint
    assert manifest_of(tmp_path / "run")["status"] != "finished"
    breaks.unlink()
    asked_before = len(log.read_text().splitlines())
    again = resume(tmp_path / "run")
    assert len(log.read_text().splitlines()) - asked_before < calls / 3  # what was saved is not asked again
    assert again.exit_code == whole.exit_code == 0
    assert again.manifest["groups"] == whole.manifest["groups"]
