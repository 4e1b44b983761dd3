"""The slim network in other precisions: each file is compared with the FP32 one, and scored, before it is kept."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.core.files import replacing
from compressor.core.manifest import Engine, Export
from compressor.core.metrics import PYTHON
from compressor.core.progress import say
from compressor.report.next_steps import resume_command
from compressor.run.device import int8_runtime, provider_of, request_of
from compressor.run.folder import RunFolder
from compressor.run.onnx_files import (
    COMPARED_IMAGES,
    MODEL,
    build_engine_of,
    drawn,
    export_fp32,
    file_of,
    one_array,
    record,
    scored,
)
from export.convert.calibrated import LEVELS, ONNXRUNTIME, TENSORRT
from export.convert.trees import tensors_in
from export.errors import DropError

if TYPE_CHECKING:
    from torch import nn

    from compressor.latency.precisions import PrecisionTimer
    from compressor.pruning.plan import ChannelPlan
    from compressor.run.job import Job
    from compressor.training.task import Task

CALIBRATION_IMAGES = 256
JUDGING_IMAGES = 2000


class LossError(CompressorError):
    """A file in another precision loses more than is allowed."""


@dataclass(frozen=True)
class Conversion:
    """What a file in another precision is made from, and how.

    Attributes:
        run: Run whose network it is; its manifest gets the file.
        task: Task of the run.
        network: Network that the FP32 file was exported from.
        source, target: FP32 file and new file.
        precision: "fp16", "int8" or "mixed".
        max_drop_points: Percentage points of accuracy that the file may lose; of other scores, per cent of their value.
        goals: What the test score compares with; see `Task.test_goals`.
        rounding: How INT8 weights are rounded: to the "nearest", or for the "outputs" of their layers.
        rest: Precision of the layers that INT8 leaves out: "fp32" or "fp16".
        runtime: What an INT8 file is for; see `export.convert.calibrated.FORMS`.
        method: How INT8 ranges are calibrated: "minmax", "entropy" or "percentile".
        timer: Device on which mixed precision is chosen, instead of `rest` and `runtime`; needed for that only.
    """

    run: RunFolder
    task: Task
    network: nn.Module
    source: Path
    target: Path
    precision: str
    max_drop_points: float
    goals: Any
    rounding: str
    rest: str
    runtime: str
    method: str = "minmax"
    timer: PrecisionTimer | None = None

    @property
    def seed(self) -> int:
        """Seed of the inputs that are drawn."""
        return int(self.run.manifest.seed or 0)

    @property
    def allow_more(self) -> str:
        """How to allow a larger drop: in the run that writes the file, or in `compress export` of a finished run."""
        if self.run.finished("export"):
            floats = ", or use --precision fp16" if (self.precision, self.runtime) == ("int8", TENSORRT) else ""
            return f"Allow more with --max-drop{floats}."
        if self.run.manifest.data == PYTHON:
            return f'Allow more: the same call with out="{self.run.path}", resume=True and export={{"max_drop": N}}'
        return f"Allow more: {resume_command(self.run.path)} --set export.max_drop=N"

    def calibration(self) -> Any:
        """Draw the inputs (N, ...) that INT8 ranges are calibrated with.

        Raises:
            CompressorError: The network has several inputs.
        """
        return one_array(drawn(self.task, self.task.calibration, CALIBRATION_IMAGES, self.seed), "INT8")

    def judge(self) -> Callable[[Path], float]:
        """Return the function that scores a file on the search split, 0 to 1."""
        return self.task.file_judge(JUDGING_IMAGES, self.seed, self.network)

    def scored(self, path: Path) -> tuple[float | None, int | None]:
        """Return a file's score on the test split, and the number of inputs."""
        return scored(path, self.task, self.network, self.goals)


def export(run: RunFolder, job: Job, plan: ChannelPlan, slim: nn.Module) -> None:
    """Write the slim network's ONNX files, in FP32 and in the other precisions of the recipe, and their engines."""
    export_fp32(run, job, plan, slim)
    recipe, provider = job.recipe, provider_of(job.recipe)
    runtime = int8_runtime(recipe)
    for precision in dict.fromkeys([recipe.precision, *recipe.export.precisions]):
        if precision == "fp32":
            continue
        conversion = Conversion(
            run=run,
            task=job.task,
            network=slim,
            source=run.file(MODEL),
            target=run.file(file_of(precision)),
            precision=precision,
            max_drop_points=recipe.export.max_drop,
            goals=job.goals,
            rounding=recipe.export.rounding,
            rest="fp32" if runtime == ONNXRUNTIME else "fp16",
            runtime=runtime,
            timer=provider.precision_timer(request_of(recipe)) if precision == "mixed" else None,
        )
        manifest, file = run.manifest, conversion.target.name
        manifest.notes = [note for note in manifest.notes if not note.startswith(f"{file}: ")]  # of an earlier plan
        try:
            for line in write_precision(conversion, engine=provider.is_here):
                say(line)
        except LossError as error:
            if precision == recipe.precision:
                raise
            _leave_out(run, precision, error.message)


def _leave_out(run: RunFolder, precision: str, why: str) -> None:
    """Go on without a file that the recipe asks for beside the run's own, and without that of an earlier plan."""
    for path in (run.file(file_of(precision)), *run.path.glob(f"engines/model.{precision}.*")):
        path.unlink(missing_ok=True)
    run.manifest.exports = {name: entry for name, entry in run.manifest.exports.items() if name != precision}
    more = f"compress export {shlex.quote(str(run.path))} --precision {precision} --max-drop N"
    if run.manifest.data == PYTHON:
        more = 'a run with export={"max_drop": N}'
    run.note(f"{why} It is left out; to allow more: {more}")


def write_precision(conversion: Conversion, *, engine: bool) -> Iterator[str]:
    """Write the run's network in another precision, check it on the test split, and build its engine.

    INT8 keeps the most sensitive layers in floating point until the accuracy on the search split is within the allowed
    drop; mixed precision chooses by measured times as well (`run.mixed`). The test split selects nothing: a file that
    loses more there is rejected.

    Args:
        conversion: What the file is made from, and how.
        engine: Whether to build its engine; a file for ONNX Runtime gets none.

    Yields:
        Lines for the user.

    Raises:
        LossError: The drop is larger than allowed; nothing is written.
        CompressorError, ExportError: The precision is unknown, or the file is not usable; nothing is written.
    """
    run, task, target = conversion.run, conversion.task, conversion.target
    if conversion.precision not in _CONVERTED:
        raise CompressorError(
            f"--precision {conversion.precision} is not exported.",
            "Choose fp16, int8 or mixed; the run has model.onnx in fp32.",
        )
    exact = run.manifest.accuracy.exported if conversion.source == run.file(MODEL) else None
    if exact is None:
        exact = conversion.scored(conversion.source)[0]
    with replacing(target) as trial:
        try:
            facts = _CONVERTED[conversion.precision](conversion, trial)
        except DropError as error:
            raise LossError(f"{target.name}: {error.message}", conversion.allow_more) from None
        facts["accuracy"], facts["images"] = conversion.scored(trial)
        if lost := _lost(conversion, facts, exact):
            raise LossError(f"{target.name}: {lost}", conversion.allow_more)
        facts["parity"] = _parity(conversion, trial)
    yield f"Wrote {target}: {facts.pop('words')}."
    if exact is not None and facts["accuracy"] is not None:
        metric, images = task.metric, facts["images"]
        of = "" if images is None else f" on {images} test images"
        yield f"{metric.title}{of}: {metric.text(facts['accuracy'])} (FP32 {metric.text(exact)})."
    entry = Export(file=target.name, bytes=target.stat().st_size, **facts)
    built: list[Engine] = []
    if engine and entry.runtime != ONNXRUNTIME:
        built, note = build_engine_of(run, target)
        yield note
    record(run, entry, built)


def _half(conversion: Conversion, trial: Path) -> dict[str, Any]:
    """Write the FP16 file; like `_int8` and `_mixed`, return the fields of its `Export`, and `words` for the user."""
    from export.convert.half import convert_half

    task = conversion.task
    inputs = tensors_in(drawn(task, task.search or task.calibration, CALIBRATION_IMAGES, conversion.seed))
    half = convert_half(conversion.source, trial, inputs=inputs[0].numpy() if len(inputs) == 1 else None)
    return {
        "kept_fp32": [kept.node for kept in half.kept],
        "words": f"{half.converted} nodes in half precision, {len(half.kept)} kept in FP32",
    }


def _int8(conversion: Conversion, trial: Path) -> dict[str, Any]:
    from export.convert.quantize import quantize_within

    calibration = conversion.calibration()
    ranges = conversion.run.manifest.trained_ranges
    within = quantize_within(
        conversion.source,
        trial,
        calibration,
        conversion.judge(),
        max_drop=conversion.max_drop_points / 100,
        method=conversion.method,
        rest=conversion.rest,
        runtime=conversion.runtime,
        rounding=conversion.rounding,
        trained={name: (low, high) for name, (low, high) in ranges.items()},
    )
    kept, counts = list(within.quant.kept), conversion.task.spread(CALIBRATION_IMAGES, conversion.seed)
    spread = f", {min(counts.values())} to {max(counts.values())} of each class" if counts else ""
    bits = " (weights of 7 bits, as this CPU's sums of 8 bits saturate)" if within.quant.levels < LEVELS else ""
    by_training = f", {within.quant.trained} ranges of the training, the others" if within.quant.trained else ""
    return {
        "kept_float": kept,
        "calibration": conversion.method,
        "calibration_images": len(calibration),
        "calibration_classes": counts,
        "rest": conversion.rest,
        "runtime": conversion.runtime,
        "rounding": conversion.rounding,
        "trained_ranges": within.quant.trained,
        "weight_levels": within.quant.levels,
        "words": f"{len(within.quant.quantised)} nodes in INT8{bits}, {len(kept)} kept in floats{by_training}, "
        f"calibrated on {len(calibration)} training images{spread}",
    }


def _mixed(conversion: Conversion, trial: Path) -> dict[str, Any]:
    from compressor.run.mixed import write_mixed

    timer = conversion.timer
    assert timer is not None  # mixed precision is chosen by times
    made = write_mixed(
        conversion.source,
        trial,
        conversion.calibration(),
        conversion.judge(),
        timer,
        max_drop=conversion.max_drop_points / 100,
        method=conversion.method,
        rounding=conversion.rounding,
    )
    kept = [layer.name for layer in made.layers if layer.precision != "int8"]
    plan, floats = made.chosen, timer.floats.upper()
    most_int8 = max(made.plans, key=lambda each: each.int8)
    beside = f", and that with {most_int8.int8} in INT8 {most_int8.ratio:.3f}" if most_int8 != plan else ""
    return {
        "kept_float": kept,
        "calibration": conversion.method,
        "calibration_images": made.images,
        "rest": timer.floats,
        "runtime": timer.runtime,
        "rounding": made.rounding,
        "timed_on": timer.where,
        "rule": made.rule,
        "plans": list(made.plans),
        "layers": list(made.layers),
        "words": f"{plan.int8} nodes in INT8, {len(kept)} in {floats}; measured in turns on {timer.where}, it takes "
        f"{plan.ratio:.3f} of the {floats} network's time{beside}; of {len(made.plans)} plans it is {made.rule}",
    }


_CONVERTED = {"fp16": _half, "int8": _int8, "mixed": _mixed}


def _lost(conversion: Conversion, facts: dict[str, Any], exact: float | None) -> str:
    """Describe how much of its score a file has lost compared with FP32, if that is more than allowed; else ""."""
    if exact is None or facts["accuracy"] is None:
        return ""
    metric, most = conversion.task.metric, conversion.max_drop_points
    drop = 100 * (exact - facts["accuracy"]) / (1 if metric.share else max(abs(exact), 1e-12))
    if drop <= most + 1e-9:
        return ""
    of = "" if facts["images"] is None else f" on {facts['images']} test images"
    unit = "points" if metric.share else "per cent"
    return (
        f"it loses {drop:.2f} {unit} of {metric.name}{of} ({metric.text(exact)} in FP32, "
        f"{metric.text(facts['accuracy'])}); at most {most:g} is allowed."
    )


def _parity(conversion: Conversion, trial: Path) -> dict[str, Any]:
    """Return how a file's outputs differ from those of the FP32 file; its classes may as far as its score may.

    Raises:
        CompressorError: They differ too much.
    """
    from export.convert.ort import onnx_outputs
    from export.convert.parity import AGREEMENTS, TOLERANCES, compare_outputs, require
    from export.errors import ExportError

    precision = conversion.precision
    inputs = drawn(conversion.task, conversion.task.real, COMPARED_IMAGES, conversion.seed)
    images = [tensor.numpy() for tensor in tensors_in(inputs)]
    right, judged = (onnx_outputs(file, images)[0] for file in (conversion.source, trial))
    parity = compare_outputs(right, judged, tolerance=TOLERANCES[precision])
    least = min(AGREEMENTS[precision], 1 - 1 / len(images[0])) - conversion.max_drop_points / 100
    try:
        require(parity, precision.upper(), min_agreement=least)
    except ExportError as error:
        problem = f"{conversion.target.name}: {error.message}"
        if parity.max_abs <= parity.allowed:  # only the first classes differ
            raise LossError(problem, conversion.allow_more) from None
        raise CompressorError(problem, error.hint) from None
    return parity.to_dict()
