"""The work of the subcommands on a recipe or a run's folder; each function yields lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.records import RECIPE
from compressor.recipe import Recipe, load_recipe
from compressor.run.folder import RunDir


def describe(recipe: Recipe) -> Iterator[Any]:
    """Yield what a recipe would do: the resolved recipe, the groups, the dense costs, and the budgets' targets."""
    from rich.table import Table

    from compressor.run.job import prepare

    recipe = recipe.resolved()
    yield recipe.to_yaml()
    job = prepare(recipe)
    space = job.space
    table = Table("group", "channels", "smallest", "step", "coupled", box=None, header_style="bold")
    for group in space.groups:
        coupled = "yes" if group.coupled else ""
        table.add_row(group.name, str(group.width), str(group.min_width), str(group.granularity), coupled)
    yield table
    for part in space.skipped:
        yield f"left dense: {part.name} ({part.reason})"
    dense, least = space.dense_widths, space.min_widths
    macs, params = (int(np.asarray(count(dense))) for count in (space.macs, space.params))
    least_macs, least_params = (int(np.asarray(count(least))) for count in (space.macs, space.params))
    yield f"Dense network: {macs:,} MACs (one multiply-add is one, as fvcore counts), {params:,} parameters."
    yield f"Smallest reachable: {least_macs:,} MACs, {least_params:,} parameters."
    for budget in job.budgets():
        reached = float(budget.predict(least[None])[0])
        how = ", estimated" if getattr(budget, "estimated", False) else ""
        yield (
            f"Budget {budget.name}{how}: at most {budget.format(budget.target)}, dense {budget.format(budget.dense)} "
            f"({budget.target / budget.dense:.1%} of it), smallest reachable {budget.format(reached)}."
        )
    for note in job.notes:
        yield f"Note: {note}"


def profile(recipe: Recipe, time_limit: str | None = None) -> Iterator[str]:
    """Measure (or read from the cache) the latency table that a network needs on this machine.

    Args:
        recipe: Network and data.
        time_limit: Time limit for measuring, such as `90s` or `5min`; a cached table that had less time and is not
            accurate enough is measured again.
    """
    from compressor.latency.duration import duration_s
    from compressor.run.job import prepare

    seconds = None if time_limit is None else duration_s(time_limit)
    recipe = recipe.changed({"budgets": {"latency": "100%"}, "device": "local"}).resolved()
    job = prepare(recipe, profile_limit_s=seconds)
    table = job.table
    assert table is not None  # needed by the latency budget above
    shape = "x".join(str(size) for size in job.data.input_shape)
    runtime = table.fields.runtime
    threads = f", {runtime.threads} thread(s)" if runtime.threads else ""
    yield f"{recipe.model} at {shape} here, {runtime.name}{threads}:"
    yield f"  dense {table.predict(job.space):.3f} ms, smallest {table.predict(job.space, job.space.smallest()):.3f} ms"
    yield f"  {table.describe()}"


def measure_again(folder: Path) -> Iterator[str]:
    """Time a run's dense and slim ONNX files again on this machine's CPU; the manifest does not change."""
    from compressor.latency.paired import measured
    from compressor.latency.ratio import in_words
    from compressor.run.onnx_files import DENSE, MODEL

    with closing(RunDir.open(folder)) as run:
        for name in (DENSE, MODEL):
            if not run.file(name).exists():
                raise CompressorError(
                    f"{folder} has no {name} yet.", f"Finish it first: compress --resume {folder}"
                )
        recipe = load_recipe(run.file(RECIPE))
        before = run.manifest.get("latency", {})
        target = next((row.get("target_ratio") for row in reversed(run.manifest.get("rounds", []))), None)
        timing = measured(
            run.file(DENSE),
            run.file(MODEL),
            recipe.threads,
            recipe.contract.repeats,
            target,
            recipe.contract.seconds,
        )
        for name, stats in (("dense", timing.dense), ("slim", timing.slim)):
            yield (
                f"{name}: median {stats.median_ms:.3f} ms, p90 {stats.p90_ms:.3f} ms, p99 {stats.p99_ms:.3f} ms "
                f"({stats.runtime} {stats.version}, {stats.threads} threads, {stats.runs} runs)"
            )
        ratio = timing.ratio
        yield (
            f"slim takes {ratio.value:.1%} of the dense network's time, 95 % interval "
            f"{ratio.low:.1%}-{ratio.high:.1%}, after {ratio.bursts} bursts in turns"
        )
        if target is not None:
            yield f"target {target:.1%}: {in_words(ratio.verdict(target))}"
        if timing.noise:
            yield timing.noise
        if before.get("measured_ms"):
            where = f"on {before['device']}, {before['runtime']}"
            yield f"the run itself measured {before['measured_ms']:.3f} ms {where}"
