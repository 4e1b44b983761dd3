"""The slim network's ONNX files: exported, compared with PyTorch, scored on real images, and built as engines.

A file in another precision is compared and scored as well before it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.files import cache_folder, replacing, sha256_file
from compressor.core.manifest import Checks, Cost, Engine, Export, Layer, NetworkCost, OtherMacs, Parity
from compressor.core.progress import bar, say
from compressor.latency.operators import channels
from compressor.run.device import int8_runtime, opset_of, provider_of, request_of
from compressor.run.folder import RunFolder, refuse_changed, refuse_front
from compressor.training.feeds import inputs_in, joined, random_inputs
from export.convert.calibrated import ONNXRUNTIME
from export.convert.trees import tensors_in

if TYPE_CHECKING:
    from torch import nn

    from compressor.latency.precisions import PrecisionTimer
    from compressor.latency.provider import TableProvider
    from compressor.pruning.plan import ChannelPlan
    from compressor.recipe import Recipe
    from compressor.run.job import Job
    from compressor.training.feeds import Feed
    from compressor.training.task import Task
    from export.engine.engine import BuildSettings

MODEL = "model.onnx"
DENSE = "checkpoints/dense.onnx"
PROBE = "checkpoints/probe.onnx"
COMPARED = "checkpoints/compared.onnx"
COMPARED_IMAGES = 64  # number of images for comparing an exported file with the network
CALIBRATION_IMAGES = 256
JUDGING_IMAGES = 2000


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


def file_of(precision: str) -> str:
    """Return the name of a run's own ONNX file in a precision."""
    return MODEL if precision == "fp32" else f"model.{precision}.onnx"


def open_exported(folder: Path, *also: str) -> RunFolder:
    """Open and lock a run that has exported its slim network.

    Args:
        folder: Folder of the run.
        also: Further files that must exist.

    Raises:
        CompressorError: The folder holds no run, the run has not exported them yet, or its network's file was changed.
    """
    refuse_front(folder)
    run = RunFolder.open(folder)
    missing = next((name for name in (MODEL, *also) if not run.file(name).exists()), None)
    if missing is None and run.finished("export"):
        try:
            refuse_changed(run.file(MODEL), run.manifest)
        except CompressorError:
            run.close()
            raise
        return run
    run.close()
    raise CompressorError(
        f"The run in {folder} has exported no {missing or MODEL} yet.", f"Finish it first: compress --resume {folder}"
    )


def export(run: RunFolder, job: Job, plan: ChannelPlan, slim: nn.Module) -> None:
    """Write the ONNX file, compare it with PyTorch on test images, score it, and build an engine."""
    from compressor.pruning.checks import checks
    from export.convert.to_onnx import check_parity

    recipe, space, manifest = job.recipe, job.space, run.manifest
    manifest.checks = Checks.model_validate(checks(space, plan, slim))
    run.save()
    metadata = metadata_of(recipe, job.task, run, plan.checksum)
    info = write_onnx(job, slim, run.file(MODEL), metadata=metadata)
    inputs = drawn(job.task, job.task.real, COMPARED_IMAGES, recipe.seed)
    parity = check_parity(slim, run.file(MODEL), inputs, tolerance=recipe.export.tolerance)
    exported, count = scored(run.file(MODEL), job.task, slim, job.goals)
    manifest.parity = Parity(
        max_abs=parity.max_abs,
        mean_abs=parity.mean_abs,
        top1_agreement=parity.top1_agreement,
        tolerance=recipe.export.tolerance,
        images=len(tensors_in(inputs)[0]),
    )
    dense, widths = space.dense_row, space.row(plan)
    manifest.cost = Cost(
        dense=NetworkCost(
            macs=int(space.macs(dense)),
            params=int(space.params(dense)),
            onnx_bytes=run.file(DENSE).stat().st_size,
        ),
        slim=NetworkCost(
            macs=int(space.macs(widths)),
            params=sum(parameter.numel() for parameter in slim.parameters()),
            onnx_bytes=info.size,
            safetensors_bytes=run.file("model.safetensors").stat().st_size,
        ),
    )
    both = np.stack([dense, widths])
    manifest.layers = _layers(job, both)
    manifest.other_macs = [
        OtherMacs(name=name, dense_macs=int(dense), slim_macs=int(slim))
        for name, (dense, slim) in space.other_macs(both).items()
    ]
    run.note_accuracy(exported=exported, exported_images=count)
    provider = provider_of(recipe)
    manifest.engines = []
    if not recipe.export.engine:
        manifest.engine_note = "The recipe asks for none."
    elif provider.is_here:
        manifest.engines, note = build_engine_of(run, run.file(MODEL))
        say(note)
        manifest.engine_note = None if manifest.engines else note
    else:
        manifest.engine_note = engine_elsewhere(provider)
    run.save()
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
        for line in write_precision(conversion, engine=provider.is_here):
            say(line)


def engine_elsewhere(device: TableProvider) -> str:
    """Say why no engine is built here for a device that is not this machine."""
    if device.runs_tensorrt:
        return f"An engine for {device.title} is built there, not on this machine."
    return f"Networks run on {device.title} through {device.runtime}, without an engine."


def write_onnx(job: Job, model: nn.Module, path: Path, metadata: dict[str, Any] | None = None) -> Any:
    """Export a network of the job to ONNX, for the recipe's batch."""
    from compressor.latency.assemble import with_batch
    from export.convert.to_onnx import export_onnx

    example = with_batch(job.space.example_input, job.recipe.batch)
    return export_onnx(model, example, path, opset=opset_of(job.recipe), metadata=metadata)


def _layers(job: Job, both: Any) -> list[Layer]:
    """Return channels and multiply-adds of every layer, for rows of the dense and the slim network.

    Layers of removed blocks have no channels.
    """
    records = []
    counts = (each.T for each in channels(job.space, both))
    for layer, macs, inputs, outputs in zip(job.space.layers, job.space.layer_macs(both).T, *counts, strict=True):
        records.append(
            Layer(
                name=layer.name,
                kind=layer.kind,
                dense_macs=int(macs[0]),
                slim_macs=int(macs[1]),
                dense_channels=[int(inputs[0]), int(outputs[0])],
                slim_channels=[int(inputs[1]), int(outputs[1])],
            )
        )
    return records


def drawn(task: Task, feed: Feed | None, number: int, seed: int) -> tuple[Any, ...]:
    """Draw a sample of a task's feed, spread over the classes if there are any: the network's arguments, (N, ...) each.

    Without a feed the numbers are random.
    """
    if feed is None:
        return random_inputs(task.example, number, seed)
    found: tuple[Any, ...] = joined(list(inputs_in(feed, number, seed, 256, "cpu")))
    return found


def one_array(inputs: tuple[Any, ...], what: str) -> Any:
    """Return the array of a network of one input.

    Raises:
        CompressorError: It has several.
    """
    tensors = tensors_in(inputs)
    if len(tensors) != 1:
        raise CompressorError(
            f"{what} takes networks of one input, and this one has {len(tensors)}.", "Use --precision fp32."
        )
    return tensors[0].numpy()


def scored(path: Path, task: Task, network: nn.Module, goals: Any = None) -> tuple[float | None, int | None]:
    """Return an ONNX file's score on the whole test split with ONNX Runtime, and the number of inputs.

    It uses as many threads as PyTorch; this does not measure time.
    """
    with bar("Scoring the exported network", task.test_inputs or 1) as progress:
        return task.file_score(path, network, goals, progress.advance), task.test_inputs


def metadata_of(recipe: Recipe, task: Task, run: RunFolder, plan_checksum: str) -> dict[str, Any]:
    """Return the metadata of an exported file: model, classes, normalization, run and plan."""
    facts = task.facts()
    images = facts.get("preprocessing", {})
    return {
        "model": Path(recipe.model).name if recipe.onnx else recipe.model,
        **facts,
        **{name: images[name] for name in ("mean", "std") if name in images},
        "run": run.name,
        "plan": plan_checksum,
    }


def build_engine_of(
    run: RunFolder,
    onnx: Path,
    *,
    module: str | None = None,
    compute_capability: Sequence[str] = (),
    settings: BuildSettings | None = None,
    must: bool = False,
) -> tuple[list[Engine], str]:
    """Build the engine of one of the run's ONNX files if a builder is installed, or take it from the cache.

    Args:
        run: Run whose folder receives the engine.
        onnx: ONNX file.
        module, compute_capability, settings: As in `export.engine.engine.build_engine`.
        must: Whether a missing builder or a rejected network is an error.

    Returns:
        The manifest's entries, empty without an engine, and a message for the user.

    Raises:
        ExportError: There is no engine although `must` is set.
    """
    from export.engine.engine import cached_engine
    from export.engine.trt import available, why_not
    from export.errors import ExportError

    if available() is None and not must:
        return [], why_not()
    path = run.file(f"engines/{onnx.stem}.engine")
    cache = cache_folder()
    try:
        info, found = cached_engine(
            onnx,
            path,
            cache / "engines",
            module=module,
            compute_capability=tuple(compute_capability) or None,
            settings=settings,
            timing_cache=cache / "timings",
        )
    except ExportError as error:
        if must:
            raise
        return [], f"There is no engine of {onnx.name}: {error}"
    engine = Engine(
        file=str(path.relative_to(run.path)),
        builder=f"{info.module} {info.version}",
        precision=info.precision,
        compute_capability=", ".join(info.compute_capabilities),
        bytes=info.size,
    )
    done = "Found in the cache:" if found else "Built"
    return [engine], f"{done} {path.name} for compute capability {engine.compute_capability} with {info.module}."


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
        CompressorError, ExportError: The precision is unknown, or the drop is larger than allowed; nothing is written.
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
        facts = _CONVERTED[conversion.precision](conversion, trial)
        facts["accuracy"], facts["images"] = conversion.scored(trial)
        if lost := _lost(conversion, facts, exact):
            raise CompressorError(f"{target.name}: {lost}", _ALLOW_MORE)
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


def record(run: RunFolder, entry: Export, engines: Sequence[Engine] = (), key: str | None = None) -> None:
    """Record an exported file, its engines and their checksums in the manifest.

    Args:
        run: Run that has the files.
        entry: The exported file.
        engines: Engines that were built from it.
        key: Its name among the exports; None for what its file's name says, such as "int8" of model.int8.onnx.
    """
    manifest = run.manifest
    key = key or entry.file.removeprefix("model.").removesuffix(".onnx")
    names = [entry.file] if run.file(entry.file).is_file() else []
    names += [name for each in engines for name in (each.file, f"{each.file.removesuffix('engine')}json")]
    built = {each.file for each in engines}
    manifest.exports = {**manifest.exports, key: entry}
    manifest.engines = [each for each in manifest.engines if each.file not in built] + list(engines)
    manifest.files = {**manifest.files, **{name: sha256_file(run.file(name)) for name in names}}
    run.save()


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
        "words": f"{len(within.quant.quantised)} nodes in INT8, {len(kept)} kept in floats{by_training}, calibrated on "
        f"{len(calibration)} training images{spread}",
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


_ALLOW_MORE = "Allow more with --max-drop (a recipe: export.max_drop)."

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
        hint = _ALLOW_MORE if parity.max_abs <= parity.allowed else error.hint
        raise CompressorError(f"{conversion.target.name}: {error.message}", hint) from None
    return parity.to_dict()
