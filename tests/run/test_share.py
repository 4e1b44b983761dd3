"""What is shared of a run: the model card, and the files that are pushed; with a hub of the test's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from compressor.cli.app import app
from compressor.core.files import sha256_file
from tests.runs import manifest_of

pytest.importorskip("huggingface_hub")

SECRET = "/home/someone/my data/birds"


def command(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else " ".join(result.output.split())


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run, as if its data were in a folder with a name that is nobody's business."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    manifest = manifest_of(folder)
    manifest["data"] = f"folder:{SECRET}"
    manifest["notes"] = [f"{SECRET} has no train/ and test/: 8 of its images form the test split.", "a | b <script>"]
    how = json.loads((folder / "preprocess.json").read_text())
    how["scored"]["data"] = f"folder:{SECRET}"
    (folder / "preprocess.json").write_text(json.dumps(how))
    manifest["files"]["preprocess.json"] = sha256_file(folder / "preprocess.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


class Hub:
    """What the hub was asked for."""

    def __init__(self, private: bool = True) -> None:
        self.private, self.created, self.files = private, {}, {}  # type: dict[str, Any], dict[str, bytes]

    def create_repo(self, name: str, **how: Any) -> None:
        self.created = {"name": name, **how}

    def model_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def create_commit(self, name: str, operations: list[Any], commit_message: str) -> SimpleNamespace:
        for each in operations:
            with each.as_file() as file:
                self.files[each.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub.test/{name}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: found)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_test")
    return found


def test_a_card_has_the_numbers_of_the_run_and_no_paths(run: Path) -> None:
    from compressor.core.manifest import Export, Manifest
    from compressor.report.card import model_card
    from compressor.report.comparison import comparison

    card = command("card", run)
    assert card.startswith("---\nlibrary_name: onnx\npipeline_tag: image-classification\n")
    for row in comparison(Manifest.read(run / "manifest.json")):
        assert f"| {row.label} | {row.dense} | {row.slim} | {row.change} |" in card
    assert "# tests.nets:tiny, compressed" in card
    assert "`model.onnx` holds the network, `preprocess.json` how a picture becomes its input." in card
    int8 = Manifest.read(run / "manifest.json")
    int8.latency = int8.latency.model_copy(update={"precision": "int8"})
    int8.exports = {"int8": Export(file="model.int8.onnx")}
    assert "`model.int8.onnx` holds the network that was timed" in model_card(int8, {})
    int8.latency = int8.latency.model_copy(update={"measured_ms": None})  # as for a board that is not here
    assert "`model.int8.onnx` holds the network as it is delivered, `model.onnx` the same" in model_card(int8, {})
    assert "Budget kept: " in card
    assert "birds has no train/ and test/: 8 of its images form the test split." in card
    assert "- a \\| b &lt;script>" in card
    assert f"| `model.onnx` | {(run / 'model.onnx').stat().st_size / 1000:.1f} kB |" in card
    assert "someone" not in card
    assert str(run.parent) not in card
    assert not (run / "README.md").exists()


def test_a_run_is_pushed_as_one_private_commit(run: Path, hub: Hub) -> None:
    listed = json.loads(command("push", run, "me/birds", "--dry-run", "--json"))
    assert (listed["repository"], listed["commit"], hub.created) == ("me/birds", None, {})
    assert "Pushed" in command("push", run, "me/birds")
    assert hub.created == {"name": "me/birds", "private": True, "exist_ok": True}
    use = {"infer.py", "infer_tensorrt.py", "labels.txt", "preprocess.json"}
    names = {"README.md", "channels.json", "model.onnx", "model.safetensors", *use}
    assert set(hub.files) == names == {each["file"] for each in listed["files"]}
    assert {each["file"]: each["size"] for each in listed["files"]} == {
        name: len(content) for name, content in hub.files.items()
    }
    for name in names - {"README.md", "preprocess.json"}:
        assert hub.files[name] == (run / name).read_bytes()
    assert json.loads(hub.files["preprocess.json"])["scored"]["data"] == "folder:birds"
    assert not [name for name, content in hub.files.items() if b"someone" in content]
    assert hub.files["README.md"].decode() == command("card", run)
    manifest = manifest_of(run)
    manifest["files"] |= {name: "0" * 64 for name in ("../model.onnx", "/model.onnx", "notes.txt", "answers.json")}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert json.loads(command("push", run, "me/birds", "--dry-run", "--json"))["files"] == listed["files"]
    (run.parent / "mine.md").write_text("# Birds\n")
    command("push", run, "me/birds", "--public", "--card", run.parent / "mine.md")
    assert (hub.created["private"], hub.files["README.md"]) == (False, b"# Birds\n")


def test_nothing_becomes_public_by_accident(run: Path, hub: Hub) -> None:
    hub.private = False
    assert "me/birds is public" in command("push", run, "me/birds", code=2)
    assert hub.files == {}
    command("push", run, "me/birds", "--public")
    assert "model.onnx" in hub.files


@pytest.mark.parametrize("error", [ConnectionError("no route to host\nand more"), RuntimeError(), ValueError("401")])
def test_a_hub_that_fails_is_one_message(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "create_repo", fail)
    said = command("push", run, "me/birds", code=2)
    assert f"me/birds cannot be pushed: {str(error).partition(chr(10))[0] or 'RuntimeError'}." in said
    assert "Traceback" not in said


def test_what_is_refused_before_anything_is_sent(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not the name of a repository" in command("push", run, "birds", code=2)
    assert "is not a run's folder" in command("card", run.parent, code=2)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.get_token", lambda: None)
        assert "hf auth login" in command("push", run, "me/birds", code=2)
    with monkeypatch.context() as patch:
        patch.setattr("compressor.run.share.find_spec", lambda name: None)
        assert "pip install 'compressor[hub]'" in command("push", run, "me/birds", "--dry-run", code=2)
    with (run / "model.onnx").open("ab") as file:
        file.write(b"more")
    assert "is not the file that the run has written" in command("push", run, "me/birds", code=2)
    (run / "model.onnx").unlink()
    assert "has no model.onnx, which the run has written" in command("card", run, code=2)
    manifest = manifest_of(run)
    manifest["status"] = "running"
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "is not finished" in command("push", run, "me/birds", code=2)
    (run / "front.json").write_text("{}")
    assert "holds the runs of several targets" in command("push", run, "me/birds", code=2)
    assert hub.files == {}
