"""The commands of the page: whole paths, and flags that the command line knows."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from compressor.cli.app import app
from compressor.core.manifest import Manifest
from compressor.report.next_steps import next_steps, repeat_command, resume_command

RUN = Path("/home/me/my runs/it's one")


def commands(picture: str | None = None, **fields: Any) -> list[str]:
    content = {"status": "finished", "files": {"infer.py": "00"}, "latency": {"measured_ms": 1.0, "device": "local"}}
    manifest = Manifest.tolerant({**content, **fields})
    return [step.command for step in next_steps(manifest, RUN, picture)]


def test_a_finished_run_is_used_explained_and_exported() -> None:
    run, found = shlex.quote(str(RUN)), commands("pictures/3.jpg")
    picture = shlex.quote(f"{RUN}/pictures/3.jpg")
    assert found == [
        f"compress predict {run} {picture}",
        f"python {shlex.quote(f'{RUN}/infer.py')} {picture}",
        f"compress measure {run} --explain",
        f"compress export {run} --precision int8",
    ]
    assert shlex.split(found[0]) == ["compress", "predict", str(RUN), f"{RUN}/pictures/3.jpg"]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"latency": {"device": "jetson-orin-nano-8gb"}}, " --target jetson-orin-nano-8gb --bundle "),
        ({"epochs": 20, "accuracy": {"dense": 0.9, "finetuned": 0.8}}, "/recipe.yaml' --epochs 40"),
        ({"epochs": 0, "accuracy": {"dense": 0.9, "finetuned": 0.8}}, "/recipe.yaml' --epochs 2"),
        ({"recipe": {"task": "detection"}}, " PHOTO.jpg --runtime torch"),
        ({"data": "python"}, "compress measure '/home/me/my runs/"),
    ],
)
def test_what_else_a_run_suggests(fields: dict[str, Any], wanted: str) -> None:
    assert sum(wanted in command for command in commands(**fields)) == 1


def test_nothing_is_suggested_that_is_done() -> None:
    done = commands(explanation={"where": "here"}, files={"model.int8.onnx": "00"}, epochs=9, accuracy={"dense": 1.0})
    assert done == [f"compress predict {shlex.quote(str(RUN))} PHOTO.jpg"]
    assert commands(status="running") == []


@pytest.mark.parametrize("device", ["local", "jetson-orin-nano-8gb"])
def test_the_command_line_knows_every_flag(device: str) -> None:
    found = commands(
        latency={"measured_ms": 1.0, "device": device}, epochs=3, files={},
        accuracy={"dense": 0.9, "finetuned": 0.5}, recipe={"task": "detection"},
    )  # fmt: skip
    found += [repeat_command(RUN), resume_command(RUN)]
    group: Any = typer.main.get_command(app)
    for command in found:
        program, *arguments = shlex.split(command)
        assert program == "compress"
        if arguments[0] in group.commands:
            group.commands[arguments[0]].make_context(arguments[0], arguments[1:])
        else:
            group.make_context(program, arguments)
