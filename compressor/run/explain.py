"""Say operator by operator why a run's slim network is not faster: on the terminal, in its manifest and report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.files import read_text
from compressor.core.manifest import ExplainedLine, Explanation, Layer
from compressor.core.records import RECIPE
from compressor.latency.converted import delivered_beside
from compressor.latency.explain import Line, Profile, explain, profile_onnx, read_trt_profile
from compressor.latency.local import LocalCpu
from compressor.latency.networks import file_nodes
from compressor.latency.peaks import Machine, calibrate, estimated_machine
from compressor.recipe import load_recipe
from compressor.run.device import device_precision, provider_of, request_of, resolved
from compressor.run.finish import write_page
from compressor.run.folder import RunFolder
from compressor.run.load import refuse_python
from compressor.run.measure import from_here, stored_table
from compressor.run.onnx_files import DENSE, MODEL, open_exported
from export.device.here import CPU

if TYPE_CHECKING:
    from compressor.latency.provider import TableProvider
    from compressor.latency.schema import Precision
    from compressor.latency.table import LatencyTable
    from compressor.pruning.space import PruningSpace
    from compressor.recipe import Recipe

SHOWN_LINES = 25
"""Number of operators that are shown; the manifest and the report have all."""

SHOWN_SENTENCES = 8

Pairs = list[tuple[float, float]]
"""The table's milliseconds (dense, slim) of each weight-bearing operator."""


@dataclass(frozen=True)
class Profiled:
    """Profiles of a run's dense and slim networks.

    Attributes:
        dense, slim: The profiles.
        machine: Peak rates of the device.
        where: Description of the device and its runtime.
    """

    dense: Profile
    slim: Profile
    machine: Machine
    where: str


def explain_again(
    folder: Path, profiles: tuple[Path, Path] | None = None, factory: str | None = None
) -> Iterator[str | list[Line]]:
    """Profile a run's dense and slim networks, say why the slim one is not faster, and rewrite the report.

    Args:
        folder: Folder of a finished run.
        profiles: Layer profiles of the dense and the slim engine that trtexec wrote on the run's device; by default
            both networks are profiled on this machine.
        factory: Function that builds the run's network if it is the user's own code; see `models.names`.

    Yields:
        Lines for the user, and once all operators, the largest possible gains first.

    Raises:
        CompressorError: The run has exported nothing yet, or a profile does not belong to its networks.
    """
    from compressor.report.explain import gap

    with closing(open_exported(folder, DENSE)) as run:
        recipe = resolved(load_recipe(run.file(RECIPE)))
        delivered = _delivered(run, recipe)
        table, provider = stored_table(run), provider_of(recipe)
        if profiles is not None:
            profiled = _profiled_there(run, provider, table, device_precision(recipe), profiles)
        else:
            profiled = _profiled_here(run, recipe, delivered)
        on_cpu = provider.is_here and (table is None or table.fields.runtime.name == CPU)
        own = profiles is not None or (on_cpu and device_precision(recipe) == "fp32")
        predicted, note = _predicted(run, recipe, table, factory) if own else (None, "")
        names = _names(run)
        slim = _numbered_as_dense(profiled.slim, run.manifest.layers)
        lines = explain(profiled.dense, slim, names, profiled.machine, predicted)
        here = "fp32" if delivered == run.file(MODEL) else "mixed"
        explanation = Explanation(
            where=profiled.where,
            precision=here if profiles is None else device_precision(recipe),
            peaks=profiled.machine.how,
            dense_ms=profiled.dense.whole_ms,
            slim_ms=profiled.slim.whole_ms,
            lines=[ExplainedLine(**asdict(line)) for line in lines],
        )
        run.manifest.explanation, run.manifest.layers = explanation, _with_times(run.manifest.layers, lines)
        page = write_page(run)
        yield (
            f"On {explanation.where}: dense {explanation.dense_ms:.3f} ms, slim {explanation.slim_ms:.3f} ms. "
            f"Peaks: {explanation.peaks}."
        )
        if not own:
            yield _in_words(recipe) if on_cpu else from_here(provider)
            if provider.runs_tensorrt and not provider.is_here:
                yield (
                    "For the device's own times, profile both engines there (trtexec --exportProfile) and add "
                    "--dense-profile FILE --slim-profile FILE."
                )
        yield lines
        if len(lines) > SHOWN_LINES:
            yield f"and {len(lines) - SHOWN_LINES} more lines, in the report."
        yield gap(run.manifest)
        sentences = [line.sentence for line in lines if line.sentence]
        yield from (f"- {sentence}" for sentence in sentences[:SHOWN_SENTENCES])
        if table is not None and table.estimated and predicted:
            yield "The predictions are estimated, not measured."
        if note:
            yield note
        yield f"Wrote {page}"


def _delivered(run: RunFolder, recipe: Recipe) -> Path:
    """Return the slim network's file to profile: in mixed precision where the run is on the CPU, else in FP32.

    Raises:
        CompressorError: The file is missing.
    """
    here = recipe.precision == "mixed" and provider_of(recipe).runtime == CPU
    path = delivered_beside(run.file(MODEL), "mixed" if here else "fp32")
    if path.is_file():
        return path
    raise CompressorError(
        f"The run has no {path.name}.", f"Write it with: compress export {run.path} --precision mixed"
    )


def _in_words(recipe: Recipe) -> str:
    """Say in which precision the networks of a run in another one than FP32 were profiled."""
    if recipe.precision == "mixed":
        return "The dense network is in FP32, the slim one in mixed precision; peaks of INT8 are not known."
    return f"The run is for {recipe.precision}; these are times in FP32."


def _profiled_here(run: RunFolder, recipe: Recipe, delivered: Path) -> Profiled:
    import onnxruntime

    LocalCpu().check_load(request_of(recipe))
    threads, streams = recipe.threads, recipe.streams
    dense, slim = profile_onnx([run.file(DENSE), delivered], threads=threads, streams=streams)
    if delivered != run.file(MODEL):
        slim = _numbered_as(slim, delivered, run.file(MODEL))
    where = f"this machine, onnxruntime-cpu {onnxruntime.__version__}, {threads} thread(s){_load(recipe)}"
    machine = calibrate(threads)
    if streams > 1:
        machine = replace(machine, how=f"{machine.how}; with nothing beside them, while the networks share the machine")
    return Profiled(dense, slim, machine, where)


def _load(recipe: Recipe) -> str:
    """Return the batch and the streams of a run in words; empty for one of each."""
    batch = f", a batch of {recipe.batch}" if recipe.batch > 1 else ""
    return batch + (f", {recipe.streams} copies at once, of which one was profiled" if recipe.streams > 1 else "")


def _profiled_there(
    run: RunFolder, device: TableProvider, table: LatencyTable | None, precision: Precision, files: Sequence[Path]
) -> Profiled:
    """Read the layer profiles that trtexec wrote on a run's device for the engines of its dense and slim ONNX files.

    Raises:
        CompressorError: The run is for another kind of device, the device's peaks are unknown, or a file is missing, is
            not a layer profile, or belongs to another network.
    """
    from compressor.latency.estimate import ELEMENT_BYTES
    from compressor.latency.table import shipped_table

    if device.is_here or not device.runs_tensorrt:
        raise CompressorError(
            f"Layer profiles of TensorRT belong to a run for a TensorRT device; this one is for {device.title}.",
            "Leave out --dense-profile and --slim-profile.",
        )
    known = (each.fields.roofline.get(precision) for each in (table, shipped_table(device.device)) if each)
    fields = next((each for each in known if each is not None), None)
    if fields is None:
        raise CompressorError(
            f"The peak rates of {device.title} in {precision} are not known: only shipped tables have them.",
            "Leave out --dense-profile and --slim-profile: both networks are then explained on this machine.",
        )
    dense, slim = (
        read_trt_profile(
            read_text(path, "layer profile"),
            str(path),
            run.file(network),
            element_bytes=ELEMENT_BYTES[precision],
            block=fields.block,
        )
        for path, network in zip(files, (DENSE, MODEL), strict=True)
    )
    machine = estimated_machine(fields, device.device)
    return Profiled(dense, slim, machine, f"{device.title}, TensorRT's layer profile")


def _predicted(
    run: RunFolder, recipe: Recipe, table: LatencyTable | None, factory: str | None
) -> tuple[Pairs | None, str]:
    """Return the table's prediction of every operator, or why there is none.

    The predictions are scaled so that the operators add up to the whole network.
    """
    if table is None:
        return None, "The run has no latency table, so nothing was predicted."
    try:
        provider = provider_of(recipe)
        if provider.is_here:
            provider.require_same(table, request_of(recipe))
        space = _space(run, recipe, table, factory)
        curve = table.curve(space)
        both = np.stack([space.dense_row, _kept_row(run, space)])
        operators = curve.operators(both)
        scaled = operators * (curve(both) / operators.sum(axis=1))[:, None]
        return [(float(dense), float(slim)) for dense, slim in scaled.T], ""
    except CompressorError as error:
        return None, f"Nothing was predicted: {error.message} {error.hint}".rstrip()


def _names(run: RunFolder) -> list[str]:
    """Return names of the weight-bearing operators: the layers' own if the counts match, else the ONNX file's."""
    found = [node.name for node in file_nodes(run.file(MODEL)) if node.operator >= 0]
    layers = [layer.name for layer in run.manifest.layers]
    return layers if len(_left(run.manifest.layers)) == len(found) else found


def _left(layers: Sequence[Layer]) -> list[int]:
    """Return the places of the layers that the slim network has; those of removed blocks have no channels there."""
    return [place for place, layer in enumerate(layers) if layer.slim_channels != [0, 0]]


def _numbered_as_dense(slim: Profile, layers: Sequence[Layer]) -> Profile:
    """Return the slim network's profile with the dense network's numbers of operators, if blocks were removed."""
    left = _left(layers)
    if len(left) == len(layers) or max((kernel.operator for kernel in slim.kernels), default=0) >= len(left):
        return slim
    return replace(slim, kernels=tuple(replace(each, operator=left[each.operator]) for each in slim.kernels))


def _numbered_as(slim: Profile, path: Path, fp32: Path) -> Profile:
    """Return the profile of a file with the operators' numbers in the FP32 file, which may have another order."""
    numbers, own = (
        {node.name: node.operator for node in file_nodes(each) if node.operator >= 0} for each in (fp32, path)
    )
    order = {place: numbers[name] for name, place in own.items()}
    return replace(slim, kernels=tuple(replace(each, operator=order[each.operator]) for each in slim.kernels))


def _with_times(layers: Sequence[Layer], lines: Sequence[Line]) -> list[Layer]:
    by_layer = {line.layer: line for line in lines if line.layer is not None}
    if len(by_layer) != len(layers):
        return list(layers)
    keys = ("dense_ms", "slim_ms", "predicted_dense_ms", "predicted_slim_ms", "bound", "padding")
    return [
        layer.model_copy(update={key: getattr(by_layer[place], key) for key in keys}) if place in by_layer else layer
        for place, layer in enumerate(layers)
    ]


def _space(run: RunFolder, recipe: Recipe, table: LatencyTable, factory: str | None) -> PruningSpace:
    """Return the pruning space of a run's network as its table knows it, without its data and weights.

    Args:
        run, recipe: The run.
        table: Table with its channel steps.
        factory: Function that builds the network if it is the user's own code.

    Raises:
        CompressorError: The network cannot be rebuilt.
    """
    import onnx
    import torch

    from compressor.latency.operators import network_signature
    from compressor.models import create_model
    from compressor.models.names import allowed_factory
    from compressor.pruning.space import PruningSpace

    refuse_python(recipe)
    graph = onnx.load(str(run.file(DENSE)), load_external_data=False).graph
    shape = tuple(dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim)[1:]
    maps = recipe.task == "segmentation"
    classes = graph.output[0].type.tensor_type.shape.dim[1 if maps else -1].dim_value
    name = allowed_factory(recipe.model, factory, run.path)
    model = create_model(name, classes, "none", shape, task=recipe.task or "classification").eval()
    pruning = recipe.pruning

    def traced(steps: int | dict[str, int]) -> PruningSpace:
        return PruningSpace(
            model,
            torch.zeros(1, *shape),
            granularity=steps,
            min_width=pruning.min_share,
            frozen=pruning.frozen,
            scope=pruning.scope,
            depth=pruning.depth == "auto",
        )

    space = traced(1)
    network = table.fields.networks.get(network_signature(space))
    if network is None or len(network.granularity) != len(space.groups):
        return space
    steps = {
        group.name: step * group.unit for group, step in zip(space.groups, network.granularity, strict=True)
    }
    return traced(steps)


def _kept_row(run: RunFolder, space: PruningSpace) -> Any:
    """Return the widths that a run chose, in the order of the space's groups, and which blocks it left."""
    kept = {group.name: group.kept for group in run.manifest.groups}
    if set(kept) != {group.name for group in space.groups}:
        raise CompressorError(
            "The run's groups are not those of its network.", "Check whether its code has changed since the run."
        )
    widths = [kept[group.name] or group.width for group in space.groups]
    blocks = [int(block.name not in run.manifest.removed) for block in space.blocks] if space.depth else []
    return np.asarray([*widths, *blocks], dtype=np.int64)
