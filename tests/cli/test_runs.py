"""Runs in a folder: listed, compared and cleaned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compressor.cli.app import app
from compressor.core.errors import CompressorError
from compressor.core.files import sha256_file
from compressor.run.folder import RunFolder
from tests.runs import manifest_of


@pytest.fixture
def runs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `runs` with a finished run, another one with another seed, and one that was stopped at once."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    manifest = manifest_of(tmp_path / "runs" / "two")
    manifest["recipe"]["seed"] = 7
    manifest["accuracy"]["exported"] = 0.25
    (tmp_path / "runs" / "two" / "manifest.json").write_text(json.dumps(manifest))
    RunFolder.create(tmp_path / "runs" / "three", "model: resnet18\n").close()
    return tmp_path / "runs"


def command(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else " ".join(result.output.split())


def test_runs_are_listed(runs: Path) -> None:
    listed = {Path(each["run"]).name: each for each in json.loads(command("list", "--json"))}
    assert list(listed) == ["three", "one", "two"]
    one, accuracy = listed["one"], manifest_of(runs / "one")["accuracy"]
    assert (one["model"], one["data"], one["state"]) == ("tests.nets:tiny", "digits", "kept")
    assert one["score"] == accuracy["exported"]
    assert one["change"] == accuracy["exported"] - accuracy["dense"]
    assert one["size"] == sum(path.stat().st_size for path in (runs / "one").rglob("*") if path.is_file())
    assert (listed["two"]["score"], listed["three"]["state"]) == (0.25, "unfinished")
    lines = command("list").splitlines()
    assert lines[0].split()[:3] == ["run", "model", "data"]
    assert len(lines) == 4
    assert json.loads(command("list", runs / "one", "--json")) == [{**one, "run": str(runs / "one")}]


def test_a_damaged_run_does_not_hide_the_others(runs: Path) -> None:
    whole = command("list", "--json")
    (runs / "two" / "manifest.json").write_text("[1, 2")
    listed = {Path(each["run"]).name: each for each in json.loads(command("list", "--json"))}
    assert {name: each["state"] for name, each in listed.items()} == {
        "one": "kept", "two": "damaged", "three": "unfinished"
    }  # fmt: skip
    assert listed["one"] == next(each for each in json.loads(whole) if each["run"] == listed["one"]["run"])
    assert "manifest.json is not readable as JSON" in command("compare", "runs/one", "runs/two", code=2)
    for _ in range(2):  # its lock is free again
        with pytest.raises(CompressorError, match="is not readable as JSON"):
            RunFolder.open(runs / "two")


def test_a_network_that_was_changed_is_neither_exported_nor_measured(runs: Path) -> None:
    (runs / "one" / "model.onnx").write_bytes(b"junk")
    for arguments in (["export"], ["export", "--precision", "fp16"], ["measure"]):
        told = command(arguments[0], "runs/one", *arguments[1:], code=2)
        assert "runs/one/model.onnx is not the file that the run has written: its checksum differs" in told
        assert "compress --recipe runs/one/recipe.yaml" in told
    (runs / "two" / "recipe.yaml").write_text("model: [")
    for _ in range(2):  # its lock is free again
        assert "cannot be read as YAML" in command("export", "runs/two", code=2)


def test_a_run_of_more_threads_than_there_are_cores_is_not_measured_here(runs: Path) -> None:
    recipe = runs / "one" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("threads: 1\n", "threads: 2000\n"))
    for arguments in (["measure"], ["measure", "--explain"], ["export", "--precision", "mixed"]):
        told = command(arguments[0], "runs/one", *arguments[1:], code=2)
        assert "2000 threads were requested" in told


def test_a_damaged_list_of_targets_keeps_their_files(runs: Path) -> None:
    (runs / "front.json").write_text("nope")
    said = command("clean", "runs")
    assert said.count("front.json is not readable as JSON") == 2
    assert said.endswith("Freed 0 B.\n")
    assert list((runs / "one" / "checkpoints").glob("*.pt"))


def test_runs_are_compared(runs: Path) -> None:
    rows = {each[""]: each for each in json.loads(command("compare", "runs/one", "runs/two", "--json"))}
    assert (rows["seed"]["one"], rows["seed"]["two"]) == (0, 7)
    assert "epochs" not in rows  # the same in both
    assert rows["Parameters"]["one"] == rows["Parameters"]["two"]
    assert rows["Accuracy, of the exported ONNX"]["two"] == "25.00%"
    assert rows["Budget, parameters"]["one"].endswith(": kept")
    assert "Two runs are needed" in command("compare", "runs/one", code=2)


def test_a_file_beside_a_runs_own_is_compared(runs: Path) -> None:
    """One run was made for FP32 and has an INT8 file as well; the other delivers its INT8 file."""
    for name, precision, accuracy in (("one", "fp32", 0.75), ("two", "int8", 0.5)):
        manifest = manifest_of(runs / name)
        manifest["latency"]["precision"] = precision
        manifest["exports"] = {"int8": {"file": "model.int8.onnx", "accuracy": accuracy}}
        (runs / name / "manifest.json").write_text(json.dumps(manifest))
    rows = {each[""]: each for each in json.loads(command("compare", "runs/one", "runs/two", "--json"))}
    assert rows["Accuracy, of model.int8.onnx"] == {
        "": "Accuracy, of model.int8.onnx", "one": "75.00%", "two": "50.00%"
    }  # fmt: skip


def test_several_targets_are_compared_in_their_order(runs: Path) -> None:
    def order() -> list[str]:
        return [name for name in json.loads(command("compare", "runs", "--json"))[0] if name]

    assert order() == ["one", "three", "two"]
    targets = [{"folder": "two"}, {"folder": "one"}]
    (runs / "front.json").write_text(json.dumps({"schema": 1, "targets": targets}))
    assert order() == ["two", "one", "three"]  # a folder that is no target comes last


def test_a_finished_run_is_cleaned_and_stays_whole(runs: Path) -> None:
    folder, results = runs / "one", manifest_of(runs / "one")["files"]
    spare = sorted(path.name for path in (folder / "checkpoints").glob("*.pt"))
    assert spare
    would = {Path(each["run"]).name: each for each in json.loads(command("clean", "--dry-run", "--json"))}
    assert [Path(name).name for name in would["one"]["files"]] == spare
    assert (would["one"]["decision"], would["three"]["decision"]) == ("clean", "keep")
    assert would["one"]["reason"] == "finished; only a resume needs these files"
    assert would["three"]["reason"] == f"not finished; continue with: compress --resume {would['three']['run']}"
    assert (folder / "checkpoints" / spare[0]).exists()
    said = command("clean", folder, runs / "three")
    assert "not finished; continue with: compress --resume" in said
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["dense.onnx"]
    assert (runs / "three" / "recipe.yaml").exists()
    for name, checksum in results.items():
        assert sha256_file(folder / name) == checksum
    assert "nothing to remove" in command("clean", folder)
    (again,) = json.loads(command("clean", folder, "--json"))
    assert again == {"run": str(folder), "decision": "keep", "reason": "nothing to remove", "freed": 0, "files": []}
    result = CliRunner().invoke(app, ["--resume", str(folder)])
    assert result.exit_code == 0, result.output
    assert manifest_of(folder)["files"]["model.onnx"] == results["model.onnx"]


def test_decoded_images_are_removed_on_request(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    assert "Freed 0 B" in command("clean", "--decoded-images")
    kept = [tmp_path / "cache" / "decoded" / f"{digit * 32}.safetensors" for digit in "ab"]
    for path in (*kept, kept[0].with_name("notes.txt")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0" * 500)
    assert "Freed" in command("clean", runs / "one")
    (found,) = json.loads(command("clean", "--decoded-images", "--dry-run", "--json"))
    reason = "the next run decodes its images again"
    assert found == {
        "run": str(kept[0].parent), "decision": "clean", "reason": reason, "freed": 1000,
        "files": [path.name for path in kept],
    }  # fmt: skip
    assert "Freed 1.00 kB" in command("clean", "--decoded-images")
    assert [path.name for path in kept[0].parent.iterdir()] == ["notes.txt"]
    assert list((runs / "two" / "checkpoints").glob("*.pt"))  # of runs only those that are given
    command("clean", "--decoded-images", runs / "two")
    assert not list((runs / "two" / "checkpoints").glob("*.pt"))


def test_folders_without_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "There is no run in runs" in command("list", code=2)
    assert "/no/such is not a folder" in command("clean", "/no/such", code=2)
