"""The command line: help at once, and one clear message with exit code 2 for whatever the user can fix."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from compressor.cli.app import app
from compressor.run.folder import RunFolder

TINY = ["--model", "tests.nets:tiny", "--flops", "60%", "--epochs", "2"]


def refused(*arguments: str) -> str:
    """What the command prints where it must end with exit code 2 and leave no new run."""
    before = sorted(Path("runs").glob("*")) if Path("runs").exists() else []
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    after = sorted(Path("runs").glob("*")) if Path("runs").exists() else []
    assert after == before
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    "where", [["--device", "ssh://me@orin"], ["--bundle", "carry"], ["--import", "carry"]]
)
def test_a_time_limit_is_for_this_machine_only(where: list[str]) -> None:
    assert "--time-limit is for this machine and for registered devices; another device measures all" in refused(
        "profile", "--time-limit", "5min", *where
    )


def test_help_is_fast_and_imports_no_torch() -> None:
    script = (
        "import sys; from compressor.cli.app import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    )
    fastest = min(_seconds([sys.executable, "-c", script, "--help"]) for _ in range(5))
    bare = min(_seconds([sys.executable, "-c", "import typer, rich.console"]) for _ in range(5))
    # Most of the time is Python's own and Typer's; the ratio holds on a busy machine too.
    assert fastest < 4 * bare


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (["--latency", "5"], "has no unit"),
        (["--latency=-1ms"], "not above zero"),
        (["--latency", "0%"], "not above zero"),
        (["--latency", "5 parsecs"], "parsecs"),
        (["--latency", "nan%"], "not a finite number"),
        (["--flops", "150%"], "more than the dense network"),
        (["--params", "many"], "not understood"),
        (["--budget", "nonsense"], "package.module:function<=VALUE"),
        (["--flops", "0.01%"], "cannot be reached"),
        (["--budget", "no.such.module:cost<=1"], "cannot be imported"),
    ],
)
def test_a_budget_that_cannot_be(budget: list[str], expected: str) -> None:
    assert expected in refused("--model", "tests.nets:tiny", "--epochs", "2", *budget)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "resnet5O", "--flops", "50%"], "resnet50"),
        (["--model", "no.such.package:net", "--flops", "50%"], "no.such.package"),
        (["--model", "tests.nets:no_channels", "--flops", "50%"], "can be pruned"),
        (["--model", "resnet18", "--device", "jetson-orin-nano", "--latency", "5ms"], "jetson-orin-nano-8gb"),
        (["--model", "resnet18", "--data", "digit", "--flops", "50%"], "digits"),
        (["--recipe", "resnet5", "--flops", "50%"], "resnet50"),
        ([*TINY, "--agent", "smart"], "no agent called 'smart'"),
        ([*TINY, "--agent", "smart:Agent"], "'agent' is 'smart:Agent'"),
        ([*TINY, "--set", "training.batch_sise=3"], "batch_size"),
        ([*TINY, "--set", "nonsense"], "FIELD=VALUE"),
        ([*TINY, "--data", "folder:/no/such/folder"], "does not exist"),
        ([*TINY, "--weights", "/no/such/file.pt"], "/no/such/file.pt"),
        (["--resume", "/no/such/run"], "not a run's folder"),
        (["--resume", ".", "--out", "x"], "Leave out"),
        (["--resume", ".", "--dry-run"], "--resume continues a run, and --dry-run runs nothing."),
        ([], "Usage"),
    ],
)
def test_input_that_cannot_be(arguments: list[str], expected: str) -> None:
    assert expected in refused(*arguments)


def test_a_recipe_with_a_wrong_field_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: resnet18\nepochs: [1]\n")
    message = refused("--recipe", str(file))
    assert "mine.yaml" in message
    assert "'epochs'" in message


def test_folders_of_images_that_are_no_data(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused(*TINY, "--data", f"folder:{empty}").replace(" ", "")
    for split in ("train", "test"):
        (tmp_path / "one" / split / "cat").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "one" / split / "cat" / "a.png")
    assert "one class" in refused(*TINY, "--data", f"folder:{tmp_path / 'one'}")


def test_weights_that_are_no_weights(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {marker}",)

    malicious = tmp_path / "evil.pt"
    malicious.write_bytes(pickle.dumps({"stem.0.weight": Evil()}, protocol=2))
    assert "evil.pt" in refused(*TINY, "--weights", str(malicious))
    assert not marker.exists()
    other = tmp_path / "other.pt"
    torch.save({"stem.0.weight": torch.zeros(16, 3, 3, 3), "spare": torch.zeros(1)}, other)
    message = refused(*TINY, "--weights", str(other))
    assert "21 of 26 keys" in message
    assert "spare" in message


def test_run_folders_that_are_taken(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    assert "not an empty folder" in refused(*TINY, "--out", str(taken))
    assert (taken / "notes.txt").read_text() == "mine"
    run = RunFolder.create(tmp_path / "run", "model: tests.nets:tiny\nbudgets: {flops: 60%}\nepochs: 2\n")
    assert "Another process" in refused("--resume", str(tmp_path / "run"))
    run.close()
    assert "--resume" in refused(*TINY, "--out", str(tmp_path / "run"))
    message = refused("--resume", str(tmp_path / "run"), "--epochs", "3")
    assert "another recipe" in message
    assert "epochs is 2, not 3" in message


def test_recipes_are_listed_with_their_schema() -> None:
    listed = CliRunner().invoke(app, ["recipes"])
    assert listed.exit_code == 0
    assert "mobilenet_v3_small_jetson" in listed.output
    schema = CliRunner().invoke(app, ["recipes", "--schema"])
    assert json.loads(schema.output)["properties"]["model"]["description"]


def test_devices_are_listed_as_measured_or_estimated() -> None:
    listed = CliRunner().invoke(app, ["devices"])
    assert listed.exit_code == 0
    assert "local" in listed.output
    lines = [line for line in listed.output.splitlines() if line.strip().startswith("jetson")]
    assert lines
    assert all("estimated" in line for line in lines)


def test_a_dry_run_shows_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*TINY, "--dry-run", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "model: tests.nets:tiny" in result.output
    assert "conv1" in result.output
    assert "60.0% of it" in result.output
    assert not (tmp_path / "run").exists()
