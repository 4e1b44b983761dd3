"""What to do with a run's network next: commands with whole paths, which can be copied from the page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compressor.core.manifest import Manifest
from compressor.core.metrics import PYTHON
from compressor.core.records import RECIPE
from compressor.report.judgement import measured_to_the_end
from export.device.bundle import TARGETS

WORTH_ANOTHER_RUN = 0.01
"""Loss of accuracy from which more training, or the removal of blocks, is suggested."""

PHOTO = "PHOTO.jpg"


@dataclass(frozen=True)
class Step:
    """A command, and what it is for."""

    purpose: str
    command: str


def resume_command(folder: Path) -> str:
    """Return the command that continues a run, or several targets, in a folder given by its whole path."""
    return f"compress --resume {shlex.quote(str(folder))}"


def repeat_command(folder: Path) -> str:
    """Return the command that runs the recipe of a folder again."""
    return f"compress --recipe {shlex.quote(str(folder / RECIPE))}"


def next_steps(manifest: Manifest, folder: Path, picture: str | None) -> list[Step]:
    """Return the commands for a finished run; none for another.

    Args:
        manifest: Its manifest.
        folder: Whole path of its folder.
        picture: A picture of the test split in the folder, which can be shown to the network; None without any.
    """
    if not measured_to_the_end(manifest):
        return []
    run = shlex.quote(str(folder))
    if manifest.data == PYTHON:  # other commands need the network and the data of the program
        return [Step("Measure both networks again", f"compress measure {run}")]
    return list(_of_finished(manifest, folder, run, picture))


def _of_finished(manifest: Manifest, folder: Path, run: str, picture: str | None) -> Iterator[Step]:
    photo = PHOTO if picture is None else shlex.quote(str(folder / picture))
    runtime = " --runtime torch" if manifest.recipe.get("task") == "detection" else ""
    yield Step("Ask the slim network about a picture", f"compress predict {run} {photo}{runtime}")
    if "infer.py" in manifest.files:
        script = shlex.quote(str(folder / "infer.py"))
        yield Step("The same without this package: numpy, Pillow and ONNX Runtime", f"python {script} {photo}")
    if manifest.explanation is None and manifest.latency.measured_ms is not None:
        yield Step("See where the time goes, operator by operator", f"compress measure {run} --explain")
    if "model.int8.onnx" not in manifest.files:
        yield Step("Export it in INT8, if that loses little", f"compress export {run} --precision int8")
    device = manifest.latency.device
    if device in TARGETS:
        bundle = shlex.quote(str(folder / f"{device}.tar.gz"))
        yield Step(
            f"Pack it for the {TARGETS[device].title}", f"compress export {run} --target {device} --bundle {bundle}"
        )
    if _lost(manifest) > WORTH_ANOTHER_RUN:
        again = repeat_command(folder)
        if manifest.epochs is not None and manifest.accuracy.discarded is None:
            epochs = 2 * manifest.epochs or 2
            yield Step("Run it again with more training, in a new folder", f"{again} --epochs {epochs}")


def _lost(manifest: Manifest) -> float:
    """Return the share that the deployed network lost; 0 if it is not known."""
    accuracy, slim = manifest.accuracy, manifest.deployed_score
    return 0.0 if not accuracy.share or accuracy.dense is None or slim is None else accuracy.dense - slim
