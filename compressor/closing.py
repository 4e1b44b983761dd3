"""The end of a run: what its user has to be told, the report, the checksums, the exit code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compressor.job import Job
from compressor.onnx_files import MODEL
from compressor.run_dir import RECIPE, RunDir, sha256_file

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan

MISSED = 3  # exit code: the best found misses a budget
HARDLY_FASTER = 0.95  # of the dense network's time; who deploys a pruned one expects less


def close(run: RunDir, job: Job, plan: ChannelPlan) -> int:
    """Write the report, the checksums and the verdict.

    Returns:
        The exit code: 0 where no budget is missed, else 3.
    """
    from compressor.report.html import write_report

    kept = all(entry["kept"] is not False for entry in run.manifest["budgets"])
    code = 0 if kept else MISSED
    notes = [*run.manifest["notes"], *_closing_notes(run.manifest, job, plan)]
    run.save(status="finished", exit_code=code, notes=list(dict.fromkeys(notes)))
    with run.stage("report"):
        run.save(files=_checksums(run))
        write_report(run.path)
    run.save(files=_checksums(run))  # with the report's own
    return code


def _closing_notes(manifest: Mapping[str, Any], job: Job, plan: ChannelPlan) -> Iterator[str]:
    budgets = manifest["budgets"]
    pruned = plan.widths != job.space.dense().widths
    if any(entry["kept"] is None for entry in budgets):
        how = "estimated" if job.table is not None and job.table.estimated else "predicted"
        yield f"{job.recipe.device} is not this machine: its latency is {how}, and was not measured."
    if budgets and not pruned:
        yield "The dense network keeps every budget already: nothing was pruned."
    if pruned and all(entry["name"] != "latency" for entry in budgets):
        yield from _hardly_faster(manifest["latency"])


def _hardly_faster(latency: Mapping[str, Any]) -> Iterator[str]:
    """A warning where fewer multiply-adds or weights have saved hardly any time, as measured."""
    slim_ms, dense_ms = latency["measured_ms"], latency["dense_ms"]
    if slim_ms is not None and dense_ms is not None and slim_ms >= HARDLY_FASTER * dense_ms:
        yield (
            f"The slim network takes {slim_ms / dense_ms:.0%} of the dense one's time as measured "
            f"({slim_ms:.3g} of {dense_ms:.3g} ms): no latency was asked for, and some channel counts may suit the "
            "device badly. Give --latency too, or --granularity measured; compress measure RUN --explain says where "
            "the time goes."
        )


def _checksums(run: RunDir) -> dict[str, str]:
    names = [RECIPE, "channels.json", "model.safetensors", MODEL, "report.html"]
    for pattern in ("model.*.onnx", "engines/*"):
        names += sorted(str(path.relative_to(run.path)) for path in run.path.glob(pattern) if path.is_file())
    return {name: sha256_file(run.file(name)) for name in names if run.file(name).exists()}
