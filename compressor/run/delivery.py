"""Stages that deliver the slim network: ONNX, parity check, engine, measured latency, and the result per budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.progress import say
from compressor.latency.networks import with_distinct_weights
from compressor.latency.paired import in_words
from compressor.run.contract import judged, predicted_share, quiet_dense_ms, remember, search_on
from compressor.run.device import opset_of
from compressor.run.folder import RunDir
from compressor.run.job import Job
from compressor.run.onnx_files import (
    COMPARED_IMAGES,
    DENSE,
    MODEL,
    PROBE,
    build_engine_of,
    drawn,
    metadata_of,
    scored,
)
from compressor.run.precisions import write_precision
from compressor.run.timing import timed_on_device
from export.device.here import CPU

if TYPE_CHECKING:
    from torch import nn

    from compressor.latency.paired import Timing
    from compressor.pruning.plan import ChannelPlan


def probe(run: RunDir, job: Job, plan: ChannelPlan) -> bool:
    """Measure the plan's latency before fine-tuning; latency does not depend on the weights.

    Returns:
        Whether the search is finished; also True without a latency target or without a device to measure on.
    """
    if job.table is None or not job.asks_for_latency or not job.measurable:
        return True
    if not run.finished("probe"):
        with run.stage("probe"):
            _write_onnx(job, with_distinct_weights(job.space.apply(plan)), run.file(PROBE))
            done = judged(run, job, plan, timed_on_device(run, job, run.file(PROBE), plan))
            run.manifest["rounds"] = [*run.manifest["rounds"], done]  # written when the stage ends
            if done["kept"] is not False:
                remember(run, plan)
            say(_in_words(done))
    return not search_on(run, job)


def export(run: RunDir, job: Job, plan: ChannelPlan, slim: nn.Module) -> None:
    """Write the ONNX file, compare it with PyTorch on test images, score it, and build an engine."""
    if run.finished("export"):
        return
    from compressor.pruning.checks import checks

    with run.stage("export"):
        run.save(checks=checks(job.space, plan, slim))
        info = _write_onnx(
            job, slim, run.file(MODEL), metadata=metadata_of(job.recipe, job.data, run, plan.checksum)
        )
        images, _ = drawn(job.data.test, COMPARED_IMAGES, job.recipe.seed)
        from export.convert.to_onnx import check_parity

        parity = check_parity(slim, run.file(MODEL), images, tolerance=job.recipe.export.tolerance)
        exported, count = scored(run.file(MODEL), job.data)
        run.save(
            parity={
                "max_abs": parity.max_abs,
                "mean_abs": parity.mean_abs,
                "top1_agreement": parity.top1_agreement,
                "tolerance": job.recipe.export.tolerance,
                "images": len(images),
            },
            accuracy={**run.manifest["accuracy"], "exported": exported, "exported_images": count},
            cost={
                "dense": {
                    "macs": int(job.space.macs(job.space.dense_widths)),
                    "params": int(job.space.params(job.space.dense_widths)),
                    "onnx_bytes": run.file(DENSE).stat().st_size,
                },
                "slim": {
                    "macs": int(job.space.macs(job.space.widths(plan.widths))),
                    "params": sum(parameter.numel() for parameter in slim.parameters()),
                    "onnx_bytes": info.size,
                    "safetensors_bytes": run.file("model.safetensors").stat().st_size,
                },
            },
            layers=_layers(job, plan),
            other_macs=_other_macs(job, plan),
        )
        local = job.recipe.device == "local"
        if job.recipe.export.engine and not local:
            run.save(
                engines=[],
                engine_note=f"An engine for {job.recipe.device} is built there, not on this machine.",
            )
        elif job.recipe.export.engine:
            engines, note = build_engine_of(run, run.file(MODEL))
            say(note)
            run.save(engines=engines, engine_note=None if engines else note)
        else:
            run.save(engines=[], engine_note="The recipe asks for none.")
        if job.recipe.precision != "fp32":
            recipe = job.recipe  # on this machine's CPU its precision is fp32
            for line in write_precision(
                run, job.data, recipe.precision, recipe.export.max_drop, rest="fp16", engine=local
            ):
                say(line)


def measure(run: RunDir, job: Job, plan: ChannelPlan) -> bool:
    """Measure the exported network beside the dense one and judge every budget.

    Returns:
        Whether the measured latency meets the target; also True without a target or a device to measure on.
    """
    if run.finished("measure"):
        return all(
            entry["kept"] is not False for entry in run.manifest["budgets"] if entry["name"] == "latency"
        )
    with run.stage("measure"):
        widths = job.space.widths(plan.widths)
        timing = timed_on_device(run, job, run.file(MODEL), plan) if job.measurable else None
        done = judged(run, job, plan, timing) if timing is not None and job.asks_for_latency else None
        budgets = []
        for entry, budget in zip(run.manifest["budgets"], job.budgets(), strict=True):
            if entry["name"] == "latency" and done is not None:
                found = {
                    "target": done["target_ms"],
                    "dense": done["dense_ms"],
                    "predicted": done["predicted_ms"],
                }
                found |= {"measured": done["measured_ms"], "verdict": done["verdict"], "kept": done["kept"]}
                budgets.append({**entry, **found})
                continue
            predicted = float(budget.predict(widths[None])[0])
            cost = None
            if entry["name"] != "latency":
                caller = job.callers.get(entry["name"])
                cost = (
                    caller.measure(tuple(widths.tolist()))
                    if caller is not None
                    else _counted(run, entry["name"], predicted)
                )
            kept = None if cost is None else cost <= entry["target"]
            verdict = "predicted" if kept is None else "kept" if kept else "missed"
            budgets.append(
                {**entry, "predicted": predicted, "measured": cost, "verdict": verdict, "kept": kept}
            )
        # One write together with the end of the stage: after a kill in between, the plan would count as two rounds.
        run.manifest.update(latency=_latency_record(run, job, plan, timing, done), budgets=budgets)
        if timing is not None and (note := timing.noise):
            say(note)
            run.manifest["notes"] = list(dict.fromkeys([*run.manifest["notes"], note]))
        if done is not None:
            run.manifest["rounds"] = [*run.manifest["rounds"], done]
            say(_in_words(done))
    return all(entry["kept"] is not False for entry in budgets if entry["name"] == "latency")


def _in_words(done: Mapping[str, Any]) -> str:
    """Describe one measurement of a plan for the terminal."""
    low, high = done["interval"]
    reach = f"{low:.3f}-{high:.3f}" if high is not None else "not known"
    return (
        f"The plan takes {done['ratio']:.3f} of dense, 95 % interval {reach}, after {done['bursts']} bursts in "
        f"{done['seconds']:.0f} s; target {done['target_ratio']:.3f}: {in_words(done['verdict'])}. In quiet "
        f"milliseconds {done['measured_ms']:.3f} of {done['dense_ms']:.3f}, target {done['target_ms']:.3f}."
    )


def _write_onnx(job: Job, model: nn.Module, path: Path, metadata: dict[str, Any] | None = None) -> Any:
    import torch

    from export.convert.to_onnx import export_onnx

    example = torch.zeros(1, *job.data.input_shape)
    return export_onnx(model, example, path, opset=opset_of(job.recipe), metadata=metadata)


def _layers(job: Job, plan: ChannelPlan) -> list[dict[str, Any]]:
    """Return channels and multiply-adds of every layer, dense and slim."""
    space = job.space
    both = np.stack([space.dense_widths, space.widths(plan.widths)])
    records = []
    for layer, macs in zip(space.layers, space.layer_macs(both).T, strict=True):
        inputs, outputs = layer.in_channels(both), layer.out_channels(both)
        records.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "dense_macs": int(macs[0]),
                "slim_macs": int(macs[1]),
                "dense_channels": [int(inputs[0]), int(outputs[0])],
                "slim_channels": [int(inputs[1]), int(outputs[1])],
            }
        )
    return records


def _other_macs(job: Job, plan: ChannelPlan) -> list[dict[str, Any]]:
    """Return the multiply-adds that fvcore counts outside the layers, by operation, dense and slim."""
    both = np.stack([job.space.dense_widths, job.space.widths(plan.widths)])
    return [
        {"name": name, "dense_macs": int(dense), "slim_macs": int(slim)}
        for name, (dense, slim) in job.space.other_macs(both).items()
    ]


def _latency_record(
    run: RunDir, job: Job, plan: ChannelPlan, timing: Timing | None, done: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the manifest's latency record; without measurements it holds the table's predictions."""
    table = job.table
    dense_ms = quiet_dense_ms(run, job, timing.ratio.dense_ms) if timing is not None else None
    by_table = table.dense_ms(job.space) if table else None
    quiet_ms = by_table if dense_ms is None else dense_ms
    record = {
        "device": job.recipe.device,
        "runtime": table.fields.runtime.name if table else None,
        "precision": job.recipe.precision,
        "batch": 1,
        "percentile": 50,
        "estimated": bool(table and table.estimated),
        "predicted_ms": predicted_share(job, plan) * quiet_ms if table and quiet_ms else None,
        "predicted_dense_ms": quiet_ms if table else None,
        "measured_ms": None,
        "dense_ms": None,
    }
    if timing is None or dense_ms is None:
        return record
    dense, slim, ratio = timing.dense, timing.slim, timing.ratio
    return {
        **record,
        "runtime": f"{CPU if slim.runtime == 'onnxruntime' else slim.runtime} {slim.version}",
        "threads": slim.threads,
        "measured_ms": ratio.value * dense_ms if done is None else done["measured_ms"],
        "dense_ms": dense_ms,
        "ratio": ratio.value if done is None else done["ratio"],
        "interval": [ratio.low, ratio.high if ratio.high < float("inf") else None]
        if done is None
        else done["interval"],
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
    }


def _counted(run: RunDir, name: str, predicted: float) -> float:
    """Return the slim network's cost as counted on the built module, or the prediction if it was not counted."""
    counted = run.manifest["cost"]["slim"].get({"flops": "macs"}.get(name, name))
    return float(counted) if counted is not None else predicted
