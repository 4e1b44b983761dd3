"""Whether a run may go on with another recipe than it was begun with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from compressor import CompressorError, run_recipe
from compressor.core.records import EpisodeLog
from compressor.run.pipeline import resume
from tests.runs import manifest_of, recipe


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its search."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    append = EpisodeLog.append

    def fragile(log: EpisodeLog, line: Any) -> None:
        append(log, line)
        if len(log) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpisodeLog, "append", fragile)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(agent="knapsack", budgets={"params": "50%"}), out=folder)
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("params: 50%", "params: 40%", "budgets.params is 50%, not 40%"),
        ("flops: null", "flops: 50%", "budgets.flops is None, not 50%"),
        ("epochs: 3", "epochs: 4", "epochs is 3, not 4"),
        ("agent: knapsack", "agent: random", "agent is knapsack, not random"),
    ],
)
def test_a_recipe_that_was_edited_is_refused_and_nothing_is_lost(
    run: Path, old: str, new: str, said: str
) -> None:
    text = (run / "recipe.yaml").read_text()
    assert old in text
    (run / "recipe.yaml").write_text(text.replace(old, new))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CompressorError, match="started with another recipe") as refused:
        resume(run)
    assert said in refused.value.message
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (run / "recipe.yaml").write_text(text)
    assert resume(run).manifest["budgets"][0]["kept"]


def test_workers_may_be_others(run: Path) -> None:
    result = resume(run, {"search": {"workers": 1, "evaluation_seconds": 900.0}})
    assert result.exit_code == 0
    manifest = manifest_of(run)
    assert manifest["recipe"]["search"]["evaluation_seconds"] == 900
    changed = "search.evaluation_seconds was 1800.0 and is 900.0 now"
    assert any(changed in note for note in manifest["notes"])
    assert resume(run).exit_code == 0  # the recipe on the disk is the one it goes by now


def test_workers_that_cannot_be_had_leave_the_run_as_it_was(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CompressorError):
        resume(run, {"search": {"workers": "ray://nohost.invalid:1"}})
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == before


def test_other_options_are_refused_by_their_names(run: Path) -> None:
    with pytest.raises(CompressorError, match=r"search\.max_evaluations is 6, not 9") as refused:
        resume(run, {"search": {"max_evaluations": 9, "workers": 2}})
    assert "workers" not in refused.value.message


def test_a_damaged_recipe_in_the_manifest_is_no_traceback(run: Path) -> None:
    text = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(text.replace('"agent": "knapsack"', '"agent": 7'))
    with pytest.raises(CompressorError, match=r"manifest\.json: .*agent"):
        resume(run)
