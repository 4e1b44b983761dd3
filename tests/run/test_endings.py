"""How a command ends: exit codes by the budgets, and after signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compressor.cli.app import app
from compressor.core.manifest import Manifest
from compressor.run.finish import exit_code, open_words

KEPT, MISSED = {"kept": True, "verdict": "kept"}, {"kept": False, "verdict": "missed"}
PREDICTED, UNDECIDED = {"kept": None, "verdict": "predicted"}, {"kept": None, "verdict": "undecided"}


@pytest.mark.parametrize(
    ("budgets", "code", "accepting"),
    [
        ([], 0, 0),
        ([KEPT, KEPT], 0, 0),
        ([KEPT, MISSED], 3, 3),
        ([KEPT, PREDICTED], 4, 0),
        ([KEPT, UNDECIDED], 4, 4),
        ([PREDICTED, UNDECIDED], 4, 4),
        ([PREDICTED, UNDECIDED, MISSED], 3, 3),
        ([{"kept": None, "measured": None, "target": 1.0}], 4, 0),  # of an earlier version
    ],
)
def test_exit_codes_follow_the_budgets(budgets: list[dict[str, Any]], code: int, accepting: int) -> None:
    judged = Manifest.tolerant({"budgets": budgets}).budgets
    assert exit_code(judged) == code
    assert exit_code(judged, accept_predicted=True) == accepting


@pytest.mark.parametrize(
    ("budgets", "helps", "does_not"),
    [
        ([KEPT, PREDICTED], "--accept-predicted makes it 0", "new run"),
        ([KEPT, UNDECIDED], "a longer measurement, in a new run.", "--accept-predicted"),
        ([PREDICTED, UNDECIDED], "a longer measurement, in a new run.", "--accept-predicted"),
    ],
)
def test_what_helps_after_exit_code_4(budgets: list[dict[str, Any]], helps: str, does_not: str) -> None:
    said = open_words(Manifest.tolerant({"budgets": budgets}).budgets)
    assert said.startswith("Exit code 4: no budget is missed, but not every one is met as measured. ")
    assert helps in said
    assert does_not not in said


def test_what_is_only_predicted_ends_with_4_unless_that_is_accepted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start = [
        "--model", "tests.nets:tiny", "--device", "jetson-orin-nano-8gb", "--latency", "99%", "--epochs", "1",
        "--agent", "uniform", "--set", "search.batch_norm_batches=1", "--set", "export.max_drop=99",
        "--out", str(folder),
    ]  # fmt: skip
    code, said = _run(*start)
    assert code == 4
    _builds_no_engine_here(folder, said)
    assert "Only predicted: latency" in said
    assert "--accept-predicted makes it 0" in said
    code, said = _run("--resume", str(folder), "--accept-predicted")
    assert code == 0
    assert "--accept-predicted" not in said.replace("contract.accept_predicted", "")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["exit_code"] == 0
    change = "Resumed with other settings: contract.accept_predicted was False and is True now."
    assert change in manifest["notes"]


def _builds_no_engine_here(folder: Path, said: str) -> None:
    """An engine of this machine is no use to the board; the run ends with the command that makes the board's bundle."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["engines"] == []
    assert (
        manifest["engine_note"] == "An engine for jetson-orin-nano-8gb is built there, not on this machine."
    )
    assert not list(folder.glob("engines/*.engine"))
    command = f"compress export {folder} --target jetson-orin-nano-8gb --bundle jetson-orin-nano-8gb.tar.gz"
    assert manifest["notes"][-1].endswith(command)
    assert command in said
    assert command in " ".join((folder / "report.html").read_text().split())
    bundle = folder.parent / "jetson-orin-nano-8gb.tar.gz"
    code, _ = _run("export", str(folder), "--target", "jetson-orin-nano-8gb", "--bundle", str(bundle))
    assert (code, bundle.exists()) == (0, True)


def _run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, " ".join(result.output.split())


SAVES_FOR_LONG = """
import time
from compressor.core.errors import CompressorError
from compressor.core.processes import stoppable
from compressor.cli.terminal import friendly
with stoppable(), friendly():
    try:
        print("works", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("saves", flush=True)
        time.sleep({seconds})
        {then}
"""


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (signal.SIGINT, "raise"),
        (signal.SIGTERM, "raise"),
        (signal.SIGTERM, "raise ValueError('a library made something else of it')"),
        (signal.SIGINT, "raise CompressorError('a child has died')"),
    ],
)
def test_a_signal_ends_a_command_with_its_code_and_no_traceback(first: signal.Signals, then: str) -> None:
    process = _started(SAVES_FOR_LONG.format(seconds=0, then=then))
    process.send_signal(first)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + first
    assert said == "saves\n"
    assert "Traceback" not in errors
    assert ("Stopped." in errors) == ("ValueError" not in then)


def test_a_second_signal_ends_it_at_once() -> None:
    process = _started(SAVES_FOR_LONG.format(seconds=60, then="raise"))
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "saves\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip() == "Stopped at once."


def _started(script: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "works\n"
    return process
