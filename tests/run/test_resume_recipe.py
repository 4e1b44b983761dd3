"""Whether a run may go on with another recipe than it was begun with."""

from __future__ import annotations

import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import compressor
from compressor import CompressorError, run_recipe
from compressor.cli.app import app
from compressor.core.records import EpisodeLog
from compressor.recipe import load_recipe
from compressor.run.exports import Request, export_format
from compressor.run.pipeline import resume
from tests.run.test_own import FAST as OWN
from tests.run.test_own import Own, pictures, share
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


# ---------------------------------------------------------------- a file that loses more than is allowed
LOSSY: dict[str, Any] = {"agent": "uniform", "budgets": {"params": "70%"}, "epochs": 2}
MORE = {"export": {"max_drop": 99}}


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in other precisions than FP32 have nothing right."""
    monkeypatch.setattr("compressor.run.conversions.scored", lambda *_: (0.0, 359))


def test_the_advice_of_a_run_whose_file_loses_too_much_helps(lossy: None, tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    with pytest.raises(CompressorError, match=r"model\.int8\.onnx: it loses .* at most 1 is allowed") as lost:
        run_recipe(recipe(**LOSSY, precision="int8"), out=folder)
    assert lost.value.hint == f"Allow more: compress --resume '{folder}' --set export.max_drop=N"
    with pytest.raises(CompressorError, match="has not finished its export") as early:
        list(export_format(folder, Request()))
    assert "compress --resume" in early.value.hint
    again = CliRunner().invoke(app, [*shlex.split(lost.value.hint)[3:5], "--set", "export.max_drop=99"])
    assert again.exit_code == 0, again.output
    manifest = manifest_of(folder)
    assert manifest["exports"]["int8"]["accuracy"] == 0.0
    assert manifest["recipe"]["export"]["max_drop"] == 99
    assert load_recipe(folder / "recipe.yaml").export.max_drop == 99
    with pytest.raises(CompressorError, match=r"export\.max_drop is 99\.0, not 50\.0"):
        resume(folder, {"export": {"max_drop": 50}})  # it has finished


def test_a_further_precision_that_loses_too_much_is_left_out(
    lossy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("compressor.run.pipeline.measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(**LOSSY, export={"engine": False, "precisions": ["int8"]}), out=folder)
    shutil.copytree(folder, tmp_path / "other")
    assert resume(folder).exit_code == 0
    (note,) = (each for each in manifest_of(folder)["notes"] if "model.int8.onnx" in each)
    assert note.startswith("model.int8.onnx: it loses ")
    assert note.endswith(f"It is left out; to allow more: compress export {folder} --precision int8 --max-drop N")
    assert not (folder / "model.int8.onnx").exists()
    assert resume(tmp_path / "other", MORE).exit_code == 0
    manifest = manifest_of(tmp_path / "other")  # its export had finished: it is repeated
    assert manifest["exports"]["int8"]["file"] == "model.int8.onnx"
    assert not any("model.int8.onnx" in each for each in manifest["notes"])


def test_a_target_whose_file_loses_too_much_goes_on(lossy: None, tmp_path: Path) -> None:
    wanted = recipe(**{**LOSSY, "budgets": {"params": "80%,60%"}}, precision="int8")
    with pytest.raises(CompressorError, match="it loses") as lost:
        run_recipe(wanted, out=tmp_path / "run")
    assert f"--resume {tmp_path / 'run/params-80'} --set" in lost.value.hint
    result = resume(tmp_path / "run/params-80", MORE)
    assert [each.manifest["exports"]["int8"]["accuracy"] for each in result.runs] == [0.0, 0.0]
    assert load_recipe(tmp_path / "run/recipe.yaml").export.max_drop == 99
    with pytest.raises(CompressorError, match=r"export\.max_drop is 99\.0, not 50\.0"):
        resume(tmp_path / "run", {"export": {"max_drop": 50}})


def test_a_python_program_allows_more_by_the_same_call(lossy: None, tmp_path: Path) -> None:
    rest = {**OWN, "precision": "int8", "evaluate": share(1), "calibration": [pictures(64)], "epochs": 0}
    call = partial(compressor.compress, Own(), torch.zeros(1, 1, 8, 8), out=tmp_path / "run")
    with pytest.raises(CompressorError, match="it loses") as lost:
        call(**rest)
    said = f'Allow more: the same call with out="{tmp_path / "run"}", resume=True and export={{"max_drop": N}}'
    assert lost.value.hint == said
    result = call(**{**rest, **MORE}, resume=True)
    assert result.manifest["exports"]["int8"]["accuracy"] == 0.0
