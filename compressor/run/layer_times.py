"""Record kernel by kernel where a run's networks spend time, for the report's section "Why is it not faster?"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.files import read_text
from compressor.core.manifest import ExplainedLine, Explanation, Layer
from compressor.latency.explain import Line, Profile, explain, profile_onnx
from compressor.latency.networks import file_nodes
from compressor.latency.peaks import Machine, calibrate
from compressor.run.folder import RunFolder
from compressor.run.onnx_files import DENSE, MODEL

if TYPE_CHECKING:
    from compressor.latency.table import LatencyTable
    from compressor.pruning.space import PruningSpace

Pairs = list[tuple[float, float]]
"""The table's milliseconds (dense, slim) of each weight-bearing operator."""


def predicted_pairs(table: LatencyTable, space: PruningSpace, widths: Any) -> Pairs:
    """Return a table's prediction for each operator, scaled so that the operators add up to the whole network.

    Raises:
        CompressorError: The table does not cover the space.
    """
    curve = table.curve(space)
    both = np.stack([space.dense_widths, widths])
    operators = curve.operators(both)
    scaled = operators * (curve(both) / operators.sum(axis=1))[:, None]
    return [(float(dense), float(slim)) for dense, slim in scaled.T]


def explain_run(
    run: RunFolder,
    *,
    threads: int,
    predicted: Pairs | None,
    profiles: tuple[Profile, Profile] | None = None,
    machine: Machine | None = None,
    where: str = "",
) -> list[Line]:
    """Profile a run's dense and slim networks, and store the result in the manifest.

    Args:
        run: Run whose ONNX files are read; `layers` and `explanation` of its manifest are set.
        threads: Number of ONNX Runtime threads.
        predicted: Predictions of the run's table, if there is one.
        profiles: Profiles of another device; by default both networks are profiled here.
        machine: Peak rates of that device.
        where: Description of that device and its runtime.
    """
    if profiles is None:
        profiles = _profiled_here(run, threads)
        machine = calibrate(threads)
        import onnxruntime

        where = f"this machine, onnxruntime-cpu {onnxruntime.__version__}, {threads} thread(s)"
    assert machine is not None
    dense, slim = profiles
    names = _names(run)
    lines = explain(dense, slim, names, machine, predicted)
    run.manifest.layers = _with_times(run.manifest.layers, lines)
    run.manifest.explanation = Explanation(
        where=where,
        peaks=machine.how,
        dense_ms=dense.whole_ms,
        slim_ms=slim.whole_ms,
        lines=[ExplainedLine(**asdict(line)) for line in lines],
    )
    run.save()
    return lines


def _profiled_here(run: RunFolder, threads: int) -> tuple[Profile, Profile]:
    dense, slim = profile_onnx([run.file(DENSE), run.file(MODEL)], threads=threads)
    return dense, slim


def _names(run: RunFolder) -> list[str]:
    """Return names of the weight-bearing operators: the layers' own if the counts match, else the ONNX file's."""
    found = [node.name for node in file_nodes(run.file(MODEL)) if node.operator >= 0]
    layers = [layer.name for layer in run.manifest.layers]
    return layers if len(layers) == len(found) else found


def _with_times(layers: Sequence[Layer], lines: Sequence[Line]) -> list[Layer]:
    by_layer = {line.layer: line for line in lines if line.layer is not None}
    if len(by_layer) != len(layers):
        return list(layers)
    keys = ("dense_ms", "slim_ms", "predicted_dense_ms", "predicted_slim_ms", "bound", "padding")
    return [
        layer.model_copy(update={key: getattr(by_layer[place], key) for key in keys}) if place in by_layer else layer
        for place, layer in enumerate(layers)
    ]


def run_space(run: RunFolder, table: LatencyTable | None, factory: str | None = None) -> PruningSpace:
    """Return the pruning space of a run's network as its table knows it, without its data and weights.

    Args:
        run: Run that names the network.
        table: Table with its channel steps.
        factory: Function that builds the network if it is the user's own code; see `models.names`.

    Raises:
        CompressorError: The network cannot be rebuilt.
    """
    import onnx
    import torch

    from compressor.core.records import RECIPE
    from compressor.latency.operators import network_signature
    from compressor.models import create_model
    from compressor.models.names import allowed_factory
    from compressor.pruning.space import PruningSpace
    from compressor.recipe import load_recipe

    recipe = load_recipe(run.file(RECIPE))
    graph = onnx.load(str(run.file(DENSE)), load_external_data=False).graph
    shape = tuple(dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim)[1:]
    classes = graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    model = create_model(allowed_factory(recipe.model, factory, run.path), classes, "none", shape).eval()
    pruning = recipe.pruning

    def traced(steps: int | dict[str, int]) -> PruningSpace:
        return PruningSpace(
            model,
            torch.zeros(1, *shape),
            granularity=steps,
            min_width=pruning.min_share,
            frozen=pruning.frozen,
            scope=pruning.scope,
        )

    space = traced(1)
    network = table.fields.networks.get(network_signature(space)) if table is not None else None
    if network is None or len(network.granularity) != len(space.groups):
        return space
    steps = {
        group.name: step * group.unit for group, step in zip(space.groups, network.granularity, strict=True)
    }
    return traced(steps)


def kept_widths(run: RunFolder, space: PruningSpace) -> Any:
    """Return the widths that a run chose, in the order of the space's groups."""
    kept = {group.name: group.kept for group in run.manifest.groups}
    if set(kept) != {group.name for group in space.groups}:
        raise CompressorError(
            "The run's groups are not those of its network.", "Check whether its code has changed since the run."
        )
    return np.asarray([kept[group.name] for group in space.groups], dtype=np.int64)


def read_profiles(
    dense: Path, slim: Path, run: RunFolder, *, element_bytes: int, block: int
) -> tuple[Profile, Profile]:
    """Read the layer profiles that trtexec wrote on a device for the engines of a run's dense and slim ONNX files.

    Raises:
        CompressorError: A file is missing, is not a layer profile, or belongs to another network.
    """
    from compressor.latency.explain import read_trt_profile

    found = []
    for path, network in ((dense, DENSE), (slim, MODEL)):
        text = read_text(path, "layer profile")
        found.append(
            read_trt_profile(text, str(path), run.file(network), element_bytes=element_bytes, block=block)
        )
    return found[0], found[1]
