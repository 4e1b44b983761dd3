"""Measure the slim network in turns with the dense one on the run's device, and judge every budget.

`probe` and `measure` are stages of a run; `measure_again` times a finished run's networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.core.conditions import UNLOADED, Conditions
from compressor.core.files import sha256_file
from compressor.core.manifest import Budget, Latency, Measurement, Verdict
from compressor.core.progress import say
from compressor.core.records import RECIPE
from compressor.latency.converted import delivered_beside
from compressor.latency.networks import with_distinct_weights
from compressor.latency.paired import in_words, interval_in_words
from compressor.latency.request import Turns
from compressor.recipe import load_recipe
from compressor.run.contract import Contract, interval_of, limit_ms
from compressor.run.device import device_precision, provider_of, request_of
from compressor.run.folder import RunFolder
from compressor.run.job import Job, latency_budget
from compressor.run.onnx_files import DENSE, MODEL, PROBE, file_of, open_exported, write_onnx
from compressor.run.stages import TABLE
from export.device.here import CPU

if TYPE_CHECKING:
    from compressor.latency.paired import Ratio, Timing
    from compressor.latency.provider import TableProvider
    from compressor.latency.table import LatencyTable
    from compressor.pruning.plan import ChannelPlan


def probe(run: RunFolder, job: Job, contract: Contract, plan: ChannelPlan) -> None:
    """Measure a plan's latency before fine-tuning; latency does not depend on the weights."""
    write_onnx(job, with_distinct_weights(job.space.apply(plan)), run.file(PROBE))
    timing = timed_on_device(run, job, run.file(PROBE), contract.probe_turns(plan))
    file = timed_file(run, job, run.file(PROBE))
    ratio = contract.combined(plan, timing.ratio, file)
    _add_round(run, contract.judge(plan, ratio, file), job.recipe.conditions)
    contract.remember(plan)


def measure(run: RunFolder, job: Job, contract: Contract, plan: ChannelPlan) -> None:
    """Measure the exported network beside the dense one and judge every budget."""
    manifest = run.manifest
    timing = ratio = found = None
    if job.measurable:
        timing = timed_on_device(run, job, run.file(MODEL), contract.turns(plan))
        file = timed_file(run, job, run.file(MODEL))
        ratio = contract.combined(plan, timing.ratio, file)
        found = contract.judge(plan, ratio, file) if contract.measurable else None
    # All is written together with the end of the stage: after a kill in between, the plan would count as two rounds.
    manifest.budgets = list(_judged_budgets(run, job, plan, found))
    manifest.latency = _latency(job, contract, plan, timing, ratio)
    if timing is not None and (note := timing.noise):
        say(note)
        manifest.notes = list(dict.fromkeys([*manifest.notes, note]))
    if found is not None:
        _add_round(run, found, job.recipe.conditions)


def _add_round(run: RunFolder, found: Measurement, conditions: Conditions) -> None:
    """Add a measurement to the manifest, which is written when the stage ends, and describe it on the terminal."""
    run.manifest.rounds = [*run.manifest.rounds, found]
    low, high = found.interval
    usual = conditions == UNLOADED
    how = "Without other load" if conditions.at_median else "In milliseconds"
    say(
        f"The plan takes {found.ratio:.3f} of dense{'' if usual else f' ({conditions.title})'}, 95 % interval "
        f"{interval_in_words(low, high)}, after {found.bursts} bursts in {found.seconds:.0f} s; target "
        f"{found.target_ratio:.3f}: {in_words(found.verdict or 'undecided')}. {how}: {found.measured_ms:.3f} ms, "
        f"dense {found.dense_ms:.3f} ms, target {found.target_ms:.3f} ms."
    )


def _judged_budgets(
    run: RunFolder, job: Job, plan: ChannelPlan, found: Measurement | None
) -> Iterator[Budget]:
    """Yield the manifest's budgets with their costs: measured, counted or computed; a latency may be predicted only."""
    widths, counts = job.space.row(plan), run.manifest.cost.slim.model_dump()
    for entry, budget in zip(run.manifest.budgets, job.budgets(), strict=True):
        if entry.name == "latency" and found is not None:
            yield entry.judged(
                found.verdict or "undecided",
                target=found.target_ms,
                dense=found.dense_ms,
                predicted=found.predicted_ms,
                measured=found.measured_ms,
            )
            continue
        predicted = float(budget.predict(widths[None])[0])
        cost: float | None = None
        if entry.name in job.callers:
            cost = job.callers[entry.name].measure(tuple(widths.tolist()))
        elif entry.name != "latency":
            counted = counts.get(entry.name) if budget.how == "counted" else None
            cost = predicted if counted is None else float(counted)
        verdict: Verdict = "predicted" if cost is None else "kept" if cost <= entry.target else "missed"
        yield entry.judged(verdict, predicted=predicted, measured=cost)


def _latency(
    job: Job, contract: Contract, plan: ChannelPlan, timing: Timing | None, ratio: Ratio | None
) -> Latency:
    """Return the manifest's latency record; without a measurement it holds the table's predictions."""
    table = job.table
    dense_ms = None if ratio is None else contract.quiet_dense_ms(ratio.dense_ms)
    by_table = table.dense_ms(job.space) if table else None
    quiet_ms = by_table if dense_ms is None else dense_ms
    latency = Latency(
        device=job.recipe.device,
        runtime=table.fields.runtime.name if table else None,
        precision=job.recipe.precision,
        batch=job.recipe.batch,
        percentile=job.recipe.percentile,
        streams=job.recipe.streams,
        estimated=bool(table and table.estimated),
        predicted_ms=contract.predicted_share(plan) * quiet_ms if table and quiet_ms else None,
        predicted_dense_ms=quiet_ms if table else None,
        measured_ms=None,
        dense_ms=None,
    )
    if timing is None or ratio is None or dense_ms is None:
        return latency
    dense, slim = timing.dense, timing.slim
    return latency.model_copy(
        update={
            "runtime": f"{CPU if slim.runtime == 'onnxruntime' else slim.runtime} {slim.version}",
            "threads": slim.threads,
            "measured_ms": ratio.value * dense_ms,
            "dense_ms": dense_ms,
            "ratio": ratio.value,
            "interval": interval_of(ratio),
            "bursts": ratio.bursts,
            "sittings": ratio.sessions,
            "seconds": round(ratio.seconds, 1),
            "median_ms": slim.median_ms,
            "p90_ms": slim.p90_ms,
            "p99_ms": slim.p99_ms,
            "dense_median_ms": dense.median_ms,
            "dense_p90_ms": dense.p90_ms,
            "dense_p99_ms": dense.p99_ms,
            "runs": slim.runs,
            "inputs_per_s": slim.inputs_per_s,
            "dense_inputs_per_s": dense.inputs_per_s,
            **({} if job.recipe.conditions.at_median else {"dense_tail": timing.tails[0], "tail": timing.tails[1]}),
        }
    )


def timed_on_device(run: RunFolder, job: Job, slim: Path, turns: Turns) -> Timing:
    """Time the run's dense file and a slim one in turns, until a target is decided.

    Args:
        run, job: Run and job that name the device.
        slim: FP32 ONNX file. A file of the run's precision beside it is timed in its place.
        turns: When timing ends, and what is compared.

    Raises:
        CompressorError: The device cannot be reached, or its state differs from that of its table.
    """
    recipe = job.recipe
    return provider_of(recipe).time(run.file(DENSE), slim, request_of(recipe), turns, job.table)


def timed_file(run: RunFolder, job: Job, slim: Path) -> str:
    """Return the checksum of the file that is timed for an FP32 file; empty if the widths alone determine its time.

    That is so where all its layers are in the run's precision. A delivered file may keep some in another one, and a
    file in mixed precision has its own choice: a probe of the same widths then differs from it.
    """
    precision = device_precision(job.recipe)
    delivered, entry = delivered_beside(slim, precision), run.manifest.exports.get(precision)
    mixed = precision == "mixed"
    if not delivered.is_file():
        return sha256_file(slim) if mixed else ""
    others = entry is not None and (entry.kept_fp32 or entry.kept_float)
    return sha256_file(delivered) if mixed or others else ""


def measure_again(folder: Path) -> Iterator[str]:
    """Time a run's dense and slim networks again on its device; the manifest does not change.

    A device that is not measured from here is replaced by this machine's CPU, with a sentence that says so. Both
    networks are then in FP32, unless the delivered file has the form that runs on this CPU.

    Yields:
        Lines for the user.

    Raises:
        CompressorError: The run has exported nothing yet, or the device cannot be measured.
    """
    from compressor.latency.local import LocalCpu

    with closing(open_exported(folder, DENSE)) as run:
        recipe, before = load_recipe(run.file(RECIPE)), run.manifest.latency
        target = run.manifest.rounds[-1].target_ratio if run.manifest.rounds else None
        conditions, most_ms = recipe.conditions, limit_ms(recipe, latency_budget(recipe))
        provider, request = provider_of(recipe), request_of(recipe)
        runtime = before.runtime or provider.runtime
        if not provider.measures or (provider.is_here and not runtime.startswith(provider.runtime)):
            if not (provider.is_here and runtime.startswith(CPU)):
                yield from_here(provider)
            provider = LocalCpu()
            entry = run.manifest.exports.get(request.precision)
            if request.precision != "fp32" and (entry is None or entry.runtime != provider.int8_form):
                yield f"Both networks are in FP32: {file_of(request.precision)} is not for this CPU."
                request = replace(request, precision="fp32")
        provider.check_load(request)
        contract = recipe.contract
        turns = Turns(
            contract.repeats, target, contract.seconds, recipe.percentile, most_ms if target is not None else None
        )
        timing = provider.time(run.file(DENSE), run.file(MODEL), request, turns, stored_table(run))
        for name, stats in (("dense", timing.dense), ("slim", timing.slim)):
            yield (
                f"{name}: median {stats.median_ms:.3f} ms, p90 {stats.p90_ms:.3f} ms, p99 {stats.p99_ms:.3f} ms "
                f"({stats.runtime} {stats.version}, {stats.threads} threads, {stats.runs} runs), "
                f"{stats.inputs_per_s:.1f} inputs a second"
            )
        ratio = timing.ratio
        if conditions != UNLOADED:
            yield f"The {conditions.title} is compared."
        if not conditions.at_median:
            yield (
                f"p{conditions.percentile:g}: slim {ratio.value * ratio.dense_ms:.3f} ms, {timing.tails[1]:.2f} times "
                f"its median; dense {ratio.dense_ms:.3f} ms, {timing.tails[0]:.2f} times its median"
            )
        yield (
            f"slim takes {ratio.value:.1%} of the dense network's time, 95 % interval "
            f"{interval_in_words(ratio.low, ratio.high, '.1%')}, after {ratio.bursts} bursts in turns"
        )
        if target is not None:
            target = target if most_ms is None else most_ms / ratio.dense_ms
            yield f"target {target:.1%}: {in_words(ratio.verdict(target))}"
        if timing.noise:
            yield timing.noise
        if before.measured_ms:
            yield f"the run itself measured {before.measured_ms:.3f} ms on {before.device}, {before.runtime}"


def from_here(device: TableProvider) -> str:
    """Say that a run for a device which is not measured from here, or for this machine's GPU, was timed on the CPU."""
    whose = "this machine's GPU" if device.is_here else device.title
    return f"The run is for {whose}; these times are from this machine's CPU."


def stored_table(run: RunFolder) -> LatencyTable | None:
    """Return the latency table with which a run began; None if it has none.

    Raises:
        CompressorError: The table is damaged.
    """
    from compressor.latency.table import LatencyTable

    return LatencyTable.read(run.file(TABLE)) if run.file(TABLE).exists() else None
