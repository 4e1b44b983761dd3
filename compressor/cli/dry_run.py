"""`--dry-run`: what a recipe would do and how long it would take. No image is read, and nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.tables import Cell, Table

if TYPE_CHECKING:
    from compressor.recipe import Recipe
    from compressor.run.job import Job


def described(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Yield the parts of the description, each with its name in JSON: texts, and tables."""
    from compressor.run.device import resolved
    from compressor.run.front import prepared
    from compressor.run.job import Job
    from compressor.run.load import load

    recipe = resolved(recipe).placed(Path.cwd())
    yield "recipe", recipe.to_yaml()
    loader = partial(load, decode_files=False)
    jobs = prepared(recipe, loader) if recipe.several else {"": Job.prepare(recipe, loader=loader)}
    job = next(iter(jobs.values()))
    numbers = ("channels", "smallest", "step")
    table = Table("group", *numbers, "coupled", right=numbers)
    for group in job.space.groups:
        coupled = Cell(group.coupled, "yes" if group.coupled else "")
        table.add(group.name, group.width, group.min_width, group.granularity, coupled)
    yield "groups", table
    for part in job.space.skipped:
        yield "lines", f"left dense: {part.name} ({part.reason})"
    if job.space.depth:
        for block in job.space.blocks:
            yield "lines", f"may be removed whole: {block.name}"
        for part in job.space.blocks_left:
            yield "lines", f"not removed whole: {part.name} ({part.reason})"
    for line in _costs(jobs):
        yield "lines", line
    for note in job.notes:
        yield "lines", f"Note: {note}"
    yield from times(job)
    if recipe.several:
        yield "lines", "This is the time of one target; each later one continues the search and takes less."


def _costs(jobs: Mapping[str, Job]) -> Iterator[str]:
    """Yield the counts of the dense and of the smallest network, and each budget of each target."""
    import numpy as np

    job = next(iter(jobs.values()))
    space = job.space
    dense, least = space.dense_row, space.smallest_row
    macs, params = (int(np.asarray(count(dense))) for count in (space.macs, space.params))
    least_macs, least_params = (int(np.asarray(count(least))) for count in (space.macs, space.params))
    yield f"Dense network: {macs:,} MACs (one multiply-add is one, as fvcore counts), {params:,} parameters."
    yield f"Smallest reachable: {least_macs:,} MACs, {least_params:,} parameters."
    budgets = [(f"{name}: " if name else "", budget) for name, each in jobs.items() for budget in each.budgets()]
    for of, budget in budgets:
        reached = float(budget.predict(least[None])[0])
        how = ", estimated" if getattr(budget, "estimated", False) else ""
        already = "; already kept by the dense network" if budget.dense <= budget.target else ""
        title = job.recipe.conditions.title if budget.name == "latency" else budget.name
        yield (
            f"{of}Budget {title}{how}: at most {budget.format(budget.target)}, dense {budget.format(budget.dense)} "
            f"({budget.target / budget.dense:.1%} of it), smallest reachable {budget.format(reached)}{already}."
        )


def times(job: Job) -> Iterator[tuple[str, Any]]:
    """Yield how long a run takes here: a table of its parts, and the sum in words."""
    from compressor.report.formats import duration
    from compressor.run.estimate import estimated

    parts = estimated(job)
    table = Table("time of", "at least", "at most", "for", right=("at least", "at most"))
    for part in parts:
        low, high = (Cell(round(seconds, 3), duration(seconds)) for seconds in (part.low_s, part.high_s))
        table.add(part.name, low, high, part.how)
    yield "times", table
    low, high = (sum(getattr(part, name) for part in parts) for name in ("low_s", "high_s"))
    yield (
        "lines",
        f"Estimated time on this machine: {duration(low)} to {duration(high)}, from a few steps that were timed now; "
        "reading pictures, and further rounds after a missed measurement, come on top.",
    )
