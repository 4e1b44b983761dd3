"""Measure the latency table that a network needs: on the device, or with a folder that is copied to it.

Each function yields lines for the user.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.conditions import UNLOADED
from compressor.core.errors import CompressorError
from compressor.recipe import Recipe
from compressor.run.device import check_precision, provider_of, request_of, resolved

if TYPE_CHECKING:
    from compressor.latency.table import LatencyTable
    from compressor.pruning.space import PruningSpace

GOOD = 0.10
"""A warning is printed for a mean error on held-out networks above this."""


def measure_table(recipe: Recipe, time_limit: str | None = None) -> Iterator[str]:
    """Measure the latency table that a network needs on its device, or read the stored one if it still fits.

    Args:
        recipe: Network, data and device.
        time_limit: Time limit for measuring, such as `90s` or `5min`; a cached table that had less time and is not
            accurate enough is measured again.

    Raises:
        CompressorError: The device cannot be measured from here, or takes no time limit.
    """
    from compressor.latency.measured import duration_s

    seconds = None if time_limit is None else duration_s(time_limit)
    recipe = _for_latency(recipe)
    provider = provider_of(recipe)
    check_precision(recipe)
    provider.check_load(request_of(recipe))
    if not provider.measures:
        raise CompressorError(
            f"{recipe.device} cannot be measured from here.",
            "Give ssh://user@host, or write a folder to copy there: --bundle DIR",
        )
    space, example = _traced(recipe)
    table = provider.table(space, example, request_of(recipe, seconds, renew=True))
    shape, runtime = "x".join(str(size) for size in example[0].shape[1:]), table.fields.runtime
    threads = f", {runtime.threads} thread(s)" if runtime.threads else ""
    yield f"{recipe.model} at {shape} {'here' if provider.is_here else f'on {recipe.device}'}, {runtime.name}{threads}:"
    of = "" if recipe.conditions == UNLOADED else f" ({recipe.conditions.title})"
    yield f"  dense {table.predict(space):.3f} ms, smallest {table.predict(space, space.smallest()):.3f} ms{of}"
    if recipe.precision == "mixed":
        dense, smallest = table.in_int8(space, np.stack([space.dense_row, space.smallest_row])).sum(axis=1)
        yield f"  in INT8: {dense} of {len(space.layers)} operators of the dense network, {smallest} of the smallest"
    yield from _described(table)


def write_bundle(recipe: Recipe, folder: Path) -> Iterator[str]:
    """Write the networks that a table of the recipe's device needs, and the script that times them there.

    Raises:
        CompressorError, ExportError: The device has no plain name or is measured from here, the folder is not empty, or
            the network cannot be exported.
    """
    from compressor.latency.remote_bundle import require_empty, write_table_bundle
    from compressor.latency.table import check_name

    if provider_of(recipe).measures:
        raise CompressorError(f"{recipe.device} is measured from here and needs no bundle.", "Leave out --bundle.")
    check_name(recipe.device)
    if recipe.precision == "mixed":
        raise CompressorError(
            "A bundle has networks in one precision: in mixed precision, the times say what is measured next.",
            "Use --precision fp16 or int8, or give the device's address: --device ssh://user@host",
        )
    require_empty(folder)
    recipe = _for_latency(recipe)
    space, example = _traced(recipe)
    written = write_table_bundle(space, example, folder, recipe.device, request_of(recipe))
    yield (
        f"Wrote {len(written.networks)} networks of {recipe.model} in {recipe.precision} to {folder} "
        f"({written.size / 1e6:.0f} MB)."
    )
    yield f"On the device: sh {folder.name}/run.sh   (it explains its steps; after an interruption it continues)"
    yield f"Bring results.tar.gz back into {folder}, then: compress profile --import {folder}"


def import_results(folder: Path, device: str | None) -> Iterator[str]:
    """Build a table from a device's results, and store it.

    Raises:
        CompressorError, ExportError: Something is missing or damaged, does not belong together, or the name is that of
            a device that is measured from here.
    """
    from compressor.latency.provider import TableProvider
    from compressor.latency.remote_table import table_of_results
    from compressor.latency.stored import keep
    from compressor.latency.table import check_name, load_flags

    if device is not None:
        check_name(device)
        if TableProvider.for_device(device).measures:
            raise CompressorError(f"{device} is measured from here.", "Give the results another --device NAME.")
    table = table_of_results(folder, device)
    path = keep(table)
    yield from _described(table)
    yield f"The table is stored in {path}"
    load = load_flags(table.fields.batch, table.fields.streams)
    yield f"Use it: compress --model MODEL --device {table.device} --precision {table.precision} --latency 50%{load}"


def _described(table: LatencyTable) -> Iterator[str]:
    device = table.fields.device
    gpu = f"compute capability {device.compute_capability}" if device.compute_capability else ""
    mode = f"power mode {device.power_mode}" if device.power_mode else "power mode not known" if gpu else ""
    facts = (device.sku, gpu, mode, device.clocks)
    yield f"  {table.describe()}"
    yield f"  {', '.join(fact for fact in facts if fact)}"
    if "by a fit" in table.fields.protocol:
        yield "  The operators were not timed one by one: they were fitted to the times of whole networks."
    for network in table.fields.networks.values():
        if network.held_out is not None and network.held_out.mape > GOOD:
            yield (
                f"  Its error on networks that it has not seen is {network.held_out.mape:.0%}: fix the device's clocks "
                "(on a Jetson: sudo jetson_clocks), run nothing else on it, and measure again."
            )


def _for_latency(recipe: Recipe) -> Recipe:
    """Return the recipe as a run with a latency budget would resolve it: same channel steps, same precision."""
    return resolved(recipe.changed({"budgets": {"latency": "100%"}}))


def _traced(recipe: Recipe) -> tuple[PruningSpace, Any]:
    """Trace the network with random weights; latency does not depend on the weights."""
    from compressor.run.job import trace, with_depth
    from compressor.run.load import load

    loaded = load(recipe, weights="none", decode_files=False)
    return trace(with_depth(loaded.recipe), loaded.model, loaded.task.example), loaded.task.example
