"""The study of what needs a GPU or a board: its items, their commands and results, and how a stopped one continues."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from benchmarks import agents, engines, gpu_items, latency_accuracy, latency_targets, on_gpu, peers
from benchmarks.gpu_items import NEEDS, Item, items
from compressor.cli import app


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    weights = tmp_path / "resnet20.pt"
    weights.write_bytes(b"weights")
    given = ["--data", "folder:/data/c 10", "--weights", str(weights), "--board", "ssh://me@orin"]
    return on_gpu.parsed([*given, "--results", str(tmp_path / "results")])


PARSERS: dict[str, Any] = {
    "latency_accuracy": latency_accuracy.parsed, "latency_targets": latency_targets.parsed, "engines": engines.parsed,
    "peers": peers.parsed,
}  # fmt: skip


def test_each_command_is_one_that_its_program_takes(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = items(options)
    assert len({item.name for item in found}) == len(found)
    command: Any = get_command(app)
    for item in found:
        assert item.needs
        assert set(item.needs) <= NEEDS.keys()
        program, *arguments = item.command
        if program == "python":
            assert arguments[0] == "-m"
            name = arguments[1].removeprefix("benchmarks.")
            if name == "agents":  # reads sys.argv
                monkeypatch.setattr(sys, "argv", ["agents", *arguments[2:]])
                assert agents.parsed().epochs == 60
            else:
                assert PARSERS[name](arguments[2:])
        elif arguments[0] == "export":
            assert command.commands["export"].make_context("export", arguments[1:])
        else:
            given = command.make_context("compress", arguments).params
            assert str(given["out_dir"]) == str(item.run)


def test_the_list_works_without_a_gpu(
    options: argparse.Namespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert on_gpu.main(["--list", "--only", "tables/tensorrt/fp16", "board/*", "--results", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "tables/tensorrt/fp16: about 1.5 h (an estimate)\n" in text
    assert "    COMPRESSOR_BACKEND=tensorrt python -m benchmarks.latency_accuracy resnet50@224" in text
    assert "    left out: it needs a board with TensorRT: --board ssh://user@host\n" in text
    assert not list(tmp_path.glob("results*"))


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_items, "find_device", lambda: None)
    assert on_gpu.main(["--results", str(tmp_path / "none")]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("There is no NVIDIA GPU on this machine, and nothing was run. It needs an NVIDIA GPU with ")
    assert not (tmp_path / "none").exists()
    assert on_gpu.main(["--only", "speed*"]) == 2
    assert "No item is called speed*. There are: engines/tensorrt, " in capsys.readouterr().out


def stand_in(name: str, folder: Path, code: str, **changed: Any) -> Item:
    """An item that writes a line into a file each time, and then runs some code."""
    log = folder / f"{name}.runs"
    counted = f"open({str(log)!r}, 'a').write('run\\n'); {code}"
    return Item(name, "None.", 1, ("data",), ("python", "-c", counted), partial(_runs, log), **changed)


def _runs(path: Path) -> str:
    return f"{path.read_text().count('run')} runs"


def test_a_second_call_continues_with_what_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = tmp_path / "open"
    needy = Item("needy", "None.", 1, ("board",), ("compress",), str)
    made = [
        stand_in("first", tmp_path, "pass"),
        stand_in("second", tmp_path, f"import os, sys; sys.exit(None if os.path.exists({str(gate)!r}) else 'shut')"),
        needy,
        stand_in("third", tmp_path, "raise SystemExit(3)", ends=(0, 3)),
    ]
    monkeypatch.setattr(on_gpu, "items", lambda options: made)
    results = tmp_path / "results"
    call = ["--data", "digits", "--results", str(results)]
    assert on_gpu.main([*call, "--minutes", "-1"]) == 0
    assert "| first | not run yet |  |" in (results / "table.md").read_text()
    assert on_gpu.main(call) == 1
    first = (results / "table.md").read_text()
    assert "| second | failed: shut |  |" in first
    assert "| needy | left out: it needs a board with TensorRT: --board ssh://user@host |  |" in first
    assert "| third | 1 runs | 0 |" in first  # any end of a run counts
    gate.touch()
    assert on_gpu.main(call) == 0
    last = (results / "table.md").read_text()
    assert "| first | 1 runs | 0 |" in last  # is not run again
    assert "| second | 2 runs | 0 |" in last
    capsys.readouterr()
    made[0] = stand_in("first", tmp_path, "another")
    assert on_gpu.main(call) == 2
    assert "first in" in (said := capsys.readouterr().out)
    assert "was begun by" in said


def test_a_run_that_was_begun_is_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    item = Item("a", "None.", 1, (), ("compress", "--out", str(run)), str, run=run, backend="tensorrt")
    assert item.due == item.command
    run.mkdir()
    (run / "recipe.yaml").touch()
    assert item.due == ("compress", "--resume", str(run))
    assert item.typed(item.due) == f"COMPRESSOR_BACKEND=tensorrt compress --resume {run}"


def test_results_are_read_from_what_the_items_write(options: argparse.Namespace) -> None:
    by_name = {item.name: item for item in items(options)}
    results = options.results

    def written(place: str, content: Any) -> None:
        (results / place).parent.mkdir(parents=True, exist_ok=True)
        (results / place).write_text(json.dumps(content))

    ran = {"file": 2e-4, "alike": True}
    precisions = {"fp32": ran, "fp16": {**ran, "alike": False}, "int8": {"failed": "no"}}
    written("engines-rtx.json", [{"precisions": precisions}])
    assert by_name["engines/rtx"].found() == (
        "2 of 3 engines run, 1 as their files within 2e-04 of the largest output"
    )
    rows = [{"network": "a", "table": {"mape": 0.041}, "stated": {"mape": 0.03}}]
    written("tables-tensorrt-int8.json", {"results": rows})
    assert by_name["tables/tensorrt/int8"].found() == "mean error on unseen networks: a 4.1% (states 3.0%)"
    written("targets/table.json", [{"ratio": 0.96, "kept": True}, {"ratio": 1.02, "kept": False}])
    assert by_name["targets"].found() == "1 of 2 kept, on average 1.0% below the target"
    budget = {"name": "energy", "unit": "mJ", "dense": 10.0, "target": 7.0, "measured": 6.5, "verdict": "kept"}
    written("energy/manifest.json", {"budgets": [budget], "exit_code": 0})
    assert by_name["energy"].found() == (
        "6.5 mJ, 65.0% of the dense network's (target 7): kept; exit code 0"
    )
    for seed, after in enumerate((0.8, 0.9)):
        written(f"agents/cells/{seed}.json", {"budget": "flops:50%", "agent": "joint", "after": after})
    assert by_name["training/agents"].found() == "flops:50% joint 85.00% (2 seeds)"
    cells = {"m/dense": 0.9, "m/50%/joint/0/search": None, "m/50%/joint/0/plain": 0.8, "m/50%/joint/1/plain": 0.9}
    lines = [json.dumps({"cell": name, "after": after}) for name, after in cells.items()]
    (results / "peers.jsonl").write_text("\n".join(lines))
    assert by_name["training/peers"].found() == "m 50% joint plain 85.00%"
    networks = [{"status": "ok"}, {"status": "build-failed"}]
    written("board/manifest.json", {"devices": [{"target": "jetson", "networks": networks}]})
    assert by_name["board/bundle"].found() == "1 of 2 engines built, measured and verified on jetson"
    plans = [
        {"int8": 3, "ratio": 0.7, "chosen": True}, {"int8": 4, "ratio": 0.8, "chosen": False},
    ]  # fmt: skip
    entry = {"plans": plans, "rest": "fp16", "layers": [{"float_ms": None}] * 4}
    written("mixed-rtx/manifest.json", {"exports": {"mixed": entry}})
    written("board/manifest.json", {"exports": {"mixed.tensorrt": {**entry, "layers": [{"float_ms": 0.1}] * 4}}})
    words = "3 of 4 layers in INT8 take 0.700 of FP16's time, 4 take 0.800; layers"
    assert by_name["mixed/rtx"].found() == f"{words} could not be timed one by one"
    assert by_name["board/mixed"].found() == f"{words} were timed one by one"
