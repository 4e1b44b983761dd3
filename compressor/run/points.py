"""The points of a front: the delivered network of a run, and the networks within its budgets that need no search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.front import Point
from compressor.core.progress import say
from compressor.latency.networks import with_distinct_weights
from compressor.latency.request import Turns
from compressor.run.contract import interval_of
from compressor.run.measure import timed_on_device
from compressor.run.onnx_files import COMPARED, MODEL, write_onnx

if TYPE_CHECKING:
    from compressor.core.manifest import Baseline, Manifest
    from compressor.run.folder import RunFolder
    from compressor.run.job import Job

REPEATS = 3
"""Sessions in which a network without a search is timed: nothing is decided by it."""


def points(run: RunFolder, job: Job, *, with_dense: bool) -> Iterator[Point]:
    """Yield the points of a finished run; networks without a search are timed where the device can be.

    Args:
        run: Finished run.
        job: Its objects, with the table as it ended.
        with_dense: Whether to yield the dense network as well.
    """
    from compressor.pruning.artefact import read_plan

    manifest = run.manifest
    assert manifest.search is not None
    baselines = {each.name: each for each in manifest.search.baselines}
    if with_dense:
        dense = baselines.get("dense")
        yield Point(
            kind="dense",
            widths=job.space.dense_row.tolist(),
            ratio=1.0 if job.measurable else None,
            predicted_ratio=1.0,
            searched=None if dense is None else dense.accuracy,
            tested=manifest.accuracy.dense,
        )
    widths = job.space.row(read_plan(run.path)).tolist()
    ours = Point(
        kind="ours",
        target=run.name,
        widths=widths,
        ratio=manifest.latency.ratio,
        interval=manifest.latency.interval,
        predicted_ratio=_predicted(job, widths),
        searched=_searched(run, widths),
        tested=manifest.deployed_score,
        onnx=f"{run.name}/{MODEL if manifest.deployed is None else manifest.deployed.file}",
    )
    yield ours
    for kind in ("uniform", "knapsack"):
        if kind in baselines:
            yield _compared(run, job, kind, baselines[kind], ours)


def _compared(run: RunFolder, job: Job, kind: Any, found: Baseline, ours: Point) -> Point:
    """Return the point of a network without a search; one of the same widths as ours takes the same time."""
    point = Point(
        kind=kind,
        target=run.name,
        widths=found.widths,
        predicted_ratio=_predicted(job, found.widths),
        searched=found.accuracy,
    )
    if found.widths == ours.widths:
        return point.model_copy(update={"ratio": ours.ratio, "interval": ours.interval})
    if not job.measurable:
        return point
    say(f"Timing the {kind} network within {run.name}.")
    plan = job.space.plan(found.widths, importance="l1")  # time depends on the widths alone
    write_onnx(job, with_distinct_weights(job.space.apply(plan)), run.file(COMPARED))
    contract = job.recipe.contract
    turns = Turns(min(REPEATS, contract.repeats), None, contract.seconds, job.recipe.percentile)
    ratio = timed_on_device(run, job, run.file(COMPARED), turns).ratio
    return point.model_copy(update={"ratio": ratio.value, "interval": interval_of(ratio)})


def _predicted(job: Job, widths: Sequence[int]) -> float | None:
    """Return the time by the table as a share of the dense network's."""
    if job.table is None:
        return None
    return float(job.table.curve(job.space)(np.asarray([widths]))[0]) / job.table.fitted_dense_ms(job.space)


def _searched(run: RunFolder, widths: Sequence[int]) -> float | None:
    """Return what the search scored the plan of these widths with, at last."""
    state = run.checkpoint("search").load()
    scored = [] if state is None else state["candidates"]
    known = (each["accuracy"] for each in reversed(scored) if each["widths"] == list(widths) and not each["given_up"])
    return next(known, None)


def in_milliseconds(found: Sequence[Point], manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Return the points with their measured times, and the time of the dense network on the quiet device."""
    dense = [each.latency.dense_ms for each in manifests if each.latency.dense_ms is not None]
    if not dense:
        return {"points": list(found)}
    quiet = min(dense)
    timed = [
        each if each.ratio is None else each.model_copy(update={"latency_ms": each.ratio * quiet}) for each in found
    ]
    return {"points": timed, "dense_ms": quiet}
