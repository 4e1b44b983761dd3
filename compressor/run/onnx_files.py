"""The slim network's ONNX file: exported, compared with PyTorch, scored on real images, and built as an engine.

`conversions` makes the files in other precisions from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.files import cache_folder, sha256_file
from compressor.core.manifest import Checks, Cost, Engine, Export, Layer, NetworkCost, OtherMacs, Parity
from compressor.core.progress import bar, say
from compressor.latency.operators import channels
from compressor.run.device import opset_of, provider_of
from compressor.run.folder import RunFolder, refuse_changed, refuse_front
from compressor.run.load import network_facts
from compressor.training.feeds import inputs_in, joined, random_inputs
from export.convert.trees import tensors_in

if TYPE_CHECKING:
    from torch import nn

    from compressor.latency.provider import TableProvider
    from compressor.pruning.plan import ChannelPlan
    from compressor.run.job import Job
    from compressor.training.feeds import Feed
    from compressor.training.task import Task
    from export.engine.engine import BuildSettings

MODEL = "model.onnx"
DENSE = "checkpoints/dense.onnx"
PROBE = "checkpoints/probe.onnx"
COMPARED = "checkpoints/compared.onnx"
COMPARED_IMAGES = 64  # number of images for comparing an exported file with the network


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
    problem = "not finished its export" if missing is None else f"exported no {missing} yet"
    raise CompressorError(f"The run in {folder} has {problem}.", f"Finish it first: compress --resume {folder}")


def export_fp32(run: RunFolder, job: Job, plan: ChannelPlan, slim: nn.Module) -> None:
    """Write the ONNX file, compare it with PyTorch on test images, score it, and build an engine."""
    from compressor.pruning.checks import checks
    from export.convert.to_onnx import check_parity

    recipe, space, manifest = job.recipe, job.space, run.manifest
    manifest.checks = Checks.model_validate(checks(space, plan, slim))
    run.save()
    metadata = {**network_facts(recipe, job.task), "run": run.name, "plan": plan.checksum}
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
