"""Progress without a terminal, what `--quiet` and `--log` leave and keep, names that are never broken, completion."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compressor.cli import completion, display
from compressor.cli.app import app
from compressor.cli.display import LineDisplay
from compressor.core.progress import Both, bar, say, shown_on, stage
from compressor.core.tables import Cell, Table


def test_lines_tell_how_far_a_task_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "INTERVAL_S", 0.05)
    lines: list[str] = []
    shown = LineDisplay(lines.append)
    with shown_on(shown):
        stage("Searching (stage 2 of 7)")
        time.sleep(0.12)
        with bar("Playing", total=4) as task:
            time.sleep(0.12)
            task.advance(1, note="accuracy 0.5")
            with bar("Scoring", total=2):  # a part of the first, which is not finished
                time.sleep(0.12)
            task.advance(3)
            time.sleep(0.12)
        say("done")
    shown.close()
    known = len(lines)
    time.sleep(0.12)
    assert len(lines) == known  # nothing is running
    assert lines[0] == "Searching (stage 2 of 7)"
    assert re.fullmatch(r"  Searching \(stage 2 of 7\): 0\.\d s so far", lines[1])
    assert any(re.fullmatch(r"  Playing: 0 of 4 in 0\.\d s, time left not known yet", line) for line in lines)
    assert any(re.fullmatch(r"  Playing: 1 of 4 in 0\.\d s, about 0\.\d s left; accuracy 0\.5", line) for line in lines)
    assert any(re.fullmatch(r"  Playing: 4 in 0\.\d s, time left not known yet; .*", line) for line in lines)
    assert not any("Scoring" in line for line in lines)
    assert re.fullmatch(r"  Playing: accuracy 0\.5 \(0\.\d s\)", lines[-2])
    assert lines[-1] == "done"


def test_two_displays_show_the_same() -> None:
    first: list[str] = []
    second: list[str] = []
    with shown_on(Both(LineDisplay(first.append), LineDisplay(second.append))):
        with bar("Working", total=1) as task:
            task.advance(1)
        say("a line")
    assert first[1:] == second[1:] == ["a line"]
    assert first[0].startswith("  Working (")
    assert len(second) == 2


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.21, "3.2 s"), (75, "1 min 15 s"), (3600 * 2 + 300, "2 h 5 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert display._duration(seconds) == words


def test_a_log_has_what_quiet_leaves_out(finished: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    loud = CliRunner().invoke(app, ["--resume", str(finished)])
    quiet = CliRunner().invoke(app, ["--resume", str(finished), "--quiet", "--log", str(log)])
    assert (loud.exit_code, quiet.exit_code) == (0, 0)
    assert "Writing the report (stage 7 of 7)" in loud.stderr
    assert (quiet.stderr, quiet.stdout) == ("", loud.stdout)
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    text = [line[20:] for line in lines]
    assert "Writing the report (stage 7 of 7)" in text
    assert all(line in text for line in loud.stdout.splitlines())
    CliRunner().invoke(app, ["--log", str(log), "report", "/no/such/run"])  # before the command's name as well
    assert log.read_text().splitlines()[len(lines)][20:].startswith("Error: ")
    refused = CliRunner().invoke(app, ["devices", "--log", str(tmp_path / "no" / "log.txt")])
    assert refused.exit_code == 2
    assert "log.txt cannot be written" in " ".join(refused.stderr.split())


def test_results_are_json(finished: Path) -> None:
    result = CliRunner().invoke(app, ["--resume", str(finished), "--json"])
    found = json.loads(result.stdout)
    assert (found["directory"], found["exit_code"]) == (str(finished), 0)
    assert {each["name"] for each in found["budgets"]} == {"flops", "params"} or len(found["budgets"]) == 2
    recipes = json.loads(CliRunner().invoke(app, ["recipes", "--json"]).stdout)
    studies = {each["recipe"] for each in recipes if each["study"]}
    assert "joint/paper" in studies
    assert "mobilenet_v3_small_jetson" not in studies
    devices = json.loads(CliRunner().invoke(app, ["devices", "--json"]).stdout)
    assert devices[0]["device"] == "local"


def test_no_name_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERMINAL_WIDTH", "40")
    for command in ("export", "profile", "doctor"):
        text = CliRunner().invoke(app, [command, "--help"]).stdout
        assert "─" not in text
        if command == "export":
            assert "--version-compatible" in text.split()
            assert "--optimisation-level" in text.split()
    recipes = CliRunner().invoke(app, ["recipes"]).stdout
    assert re.search(r"^mobilenet_v3_large_jetson +mobilenet_v3_large +imagenet ", recipes, re.MULTILINE)
    listed, studies = recipes.split("Studies of the agents")
    assert "joint/paper" not in listed
    assert "joint/paper" in studies


def test_a_table_is_rows_and_records() -> None:
    table = Table("name", "ms", right=("ms",))
    table.add("conv1", Cell(0.5, "0.50"))
    table.add("classifier", None)
    assert list(table.lines()) == ["name          ms", "conv1       0.50", "classifier"]
    assert table.records() == [{"name": "conv1", "ms": 0.5}, {"name": "classifier", "ms": None}]


def test_names_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert completion.agents("jo") == ["joint"]
    assert "resnet50" in completion.recipes("res")
    assert completion.devices("jetson-orin-nano") == ["jetson-orin-nano-4gb", "jetson-orin-nano-8gb"]
    first = completion.models("mobilenet_v3_s")
    assert first == ["mobilenet_v3_small"]
    monkeypatch.setattr("compressor.models.names.torchvision_names", lambda *_: [])  # the second time it is not asked
    assert completion.models("mobilenet_v3_s") == first
    assert "cifar_resnet20" in completion.models("cifar_")
