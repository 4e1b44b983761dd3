"""Builds a measured table from the results that a device sent back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from compressor.core.errors import CompressorError
from compressor.core.progress import say
from compressor.latency.assemble import Provenance, Sample, load_words, table_from
from compressor.latency.backends.gpu import fitted_shares, shares_of_layers
from compressor.latency.layout import as_space, layout_of, signature
from compressor.latency.networks import NetworkTimes, TaggedNetwork
from compressor.latency.operators import Floats, Operators, channels
from compressor.latency.remote_bundle import DENSE, TableFacts
from compressor.latency.schema import BLOCKS, DeviceFields, RuntimeFields, first_problem
from compressor.latency.table import LatencyTable
from export.device.bundle import MANIFEST
from export.device.results import DeviceResults, read_results

NOISY, UNSTEADY = 0.15, 0.5
"""Drift of the dense network from which the user is warned, and from which a table is refused."""

MAX_FAILED_SHARE = 0.1
FASTEST_MACS = 1e15
"""Multiply-adds per second that no device exceeds: a faster table has wrong units."""

RUNTIME = "tensorrt"


def table_of_results(given: Path, device: str | None = None) -> LatencyTable:
    """Build the table from a bundle with results.

    Args:
        given: The bundle's folder with `results` or `results.tar.gz` in it, or one of these two inside the bundle.
        device: Name of the table, instead of the bundle's device.

    Raises:
        CompressorError, ExportError: Something is missing, damaged or inconsistent.
    """
    folder, results = _bundle_and_results(given)
    timings = read_results(results, folder, "timing")
    try:
        facts = TableFacts.model_validate(timings.facts)
    except ValidationError as error:
        raise CompressorError(
            f"{folder} is not a bundle for a latency table: {first_problem(error)}.",
            "Write one with: compress profile --bundle",
        ) from None
    layout = layout_of(facts.layout)
    _require_consistent(facts, timings, folder)
    samples, mapped = _samples(facts, timings)
    dense = next(sample for name, sample in samples.items() if name == DENSE)
    _require_plausible(facts, dense)
    drift = _drift(timings)
    fitted = [sample for name, sample in samples.items() if facts.candidates[name].role == "fitted"]
    unseen = [sample for name, sample in samples.items() if facts.candidates[name].role == "held out"]
    board, seconds = timings.board, sum(sum(each.times_ms) for each in timings.networks.values()) / 1e3
    clocks = _clocks(timings)
    how = (
        "the time of each layer from trtexec's profile, n counting profiles"
        if mapped
        else "TensorRT's layers could not be assigned to operators, so that operators have shares of the whole "
        "networks' times by a fit of arithmetic, traffic and launches"
    )
    provenance = Provenance(
        device=DeviceFields(
            name=device or facts.device,
            sku=board.title if board.title != "the device" else "",
            compute_capability=board.compute_capability,
            power_mode=board.power_mode,
            clocks=clocks,
        ),
        runtime=RuntimeFields(name=RUNTIME, version=board.tensorrt),
        precision=facts.precision,
        block=BLOCKS.get(facts.precision, 1),
        protocol=(
            f"{facts.model}: {len(fitted) + 1} sub-networks measured by trtexec there in {timings.turns} turns, "
            f"every other one backwards, each for {timings.duration_s} s after {timings.warmup_s} s of warm-up; "
            f"{len(unseen)} more were held out; the dense network first and last in each turn; {how}"
            + load_words(facts.batch, facts.streams)
        ),
        sources=(f"bundle {timings.bundle}", f"results {timings.digest}", f"board {board.board}"),
        batch=facts.batch,
        streams=facts.streams,
    )
    return table_from(as_space(layout), [dense, *fitted, dense], unseen, drift, seconds, provenance)


def _bundle_and_results(given: Path) -> tuple[Path, Path]:
    """Return the bundle's folder and the path of its results."""
    if given.name in ("results", "results.tar.gz") and not (given / MANIFEST).is_file():
        folder, results = given.parent, given
    else:
        folder = given
        found = [folder / name for name in ("results.tar.gz", "results") if (folder / name).exists()]
        results = found[0] if found else folder / "results.tar.gz"
    if not folder.is_dir():
        raise CompressorError(
            f"There is no folder {folder}.", "Pass the folder that compress profile --bundle wrote."
        )
    if not (folder / MANIFEST).is_file():
        raise CompressorError(
            f"{folder} is not a bundle: it has no {MANIFEST}.",
            "Put results.tar.gz into the folder that compress profile --bundle wrote, and pass that folder.",
        )
    if not results.exists():
        raise CompressorError(
            f"{folder} has no results yet.",
            f"Run sh {folder.name}/run.sh on the device, and copy results.tar.gz back into {folder}.",
        )
    return folder, results


def _require_consistent(facts: TableFacts, timings: DeviceResults, source: Path) -> None:
    layout = layout_of(facts.layout)
    groups, operators = len(layout.groups), len(layout.layers)
    wrong = [
        name
        for name, each in facts.candidates.items()
        if len(each.widths) != groups
        or len(each.weighted) != operators
        or any(owner >= operators for owner in each.owner)
        or any(node >= len(each.owner) for node in each.weighted)
    ]
    if wrong or set(facts.candidates) != set(timings.networks) or DENSE not in facts.candidates:
        raise CompressorError(f"{source} contradicts itself about the network {(wrong or [DENSE])[0]}.")
    if signature(layout) != facts.network or len(facts.epilogues) != operators:
        raise CompressorError(f"{source} contradicts itself about its layers.")
    failed = {name: each.reason for name, each in timings.networks.items() if each.reason}
    if DENSE in failed or len(failed) > MAX_FAILED_SHARE * len(timings.networks):
        name = DENSE if DENSE in failed else next(iter(failed))
        raise CompressorError(
            f"{len(failed)} of {len(timings.networks)} networks could not be measured on the device; {name}: "
            f"{failed[name].rstrip('.')}.",
            "Look at results/*/build.log there; run sh run.sh again once the cause is fixed.",
        )
    if failed:
        say(f"{len(failed)} of {len(timings.networks)} networks could not be measured, and are skipped.")


def _samples(facts: TableFacts, timings: DeviceResults) -> tuple[dict[str, Sample], bool]:
    """Return a sample for each measured network, and whether TensorRT's layers identified the operators."""
    layout = layout_of(facts.layout)
    names = [name for name in facts.candidates if not timings.networks[name].reason]
    widths = np.asarray([facts.candidates[name].widths for name in names], dtype=np.int64)
    c_in, c_out = channels(as_space(layout), widths)
    if (c_in < 1).any() or (c_out < 1).any():
        raise CompressorError("The bundle has a network with a layer without channels.")
    whole = np.asarray([np.median(timings.networks[name].times_ms) for name in names])
    found = [
        shares_of_layers(
            timings.networks[name].layers, facts.candidates[name].owner, facts.candidates[name].weighted
        )
        for name in names
    ]
    mapped = all(each.trusted for each in found)
    operators: Sequence[Floats] = (
        [each.operators_ms for each in found]
        if mapped
        else list(fitted_shares(layout.layers, c_in, c_out, whole, BLOCKS.get(facts.precision, 1), facts.batch))
    )
    network = TaggedNetwork(b"", (), facts.epilogues)
    return {
        name: Sample(
            c_in[place], c_out[place], network,
            NetworkTimes(np.asarray(timings.networks[name].times_ms), np.asarray(operators[place])[None]),
        )
        for place, name in enumerate(names)
    }, mapped  # fmt: skip


def _drift(timings: DeviceResults) -> float:
    """Return the dense time at a turn's end over that at its start, minus one: the median of all turns."""
    turns: dict[int, list[tuple[int, float]]] = {}
    for turn in timings.networks[DENSE].turns:
        turns.setdefault(turn.turn, []).append((turn.slot, float(np.median(turn.times_ms))))
    drift = float(np.median([max(each)[1] / min(each)[1] - 1 for each in turns.values()]))
    require_steady(
        drift,
        "Hold its clocks (sudo jetson_clocks), keep it cool and free of other work, delete results there, and measure "
        "again.",
    )
    return drift


def require_steady(drift: float, hint: str) -> None:
    """Warn if the dense network's time changed during the measurement; refuse a table if it changed a lot.

    Args:
        drift: Dense time at the end over that at the start, minus one.
        hint: Hint of the error.

    Raises:
        CompressorError: The drift exceeds `UNSTEADY`.
    """
    if abs(drift) > UNSTEADY:
        raise CompressorError(
            f"The device's speed is not stable: the dense network took {drift:+.0%} at the end.", hint
        )
    if abs(drift) > NOISY:
        say(f"The device was not quiet: the dense network took {drift:+.0%} at the end. Predictions are less accurate.")


def _require_plausible(facts: TableFacts, dense: Sample) -> None:
    counted = Operators(layout_of(facts.layout).layers).cost(dense.c_in, dense.c_out)
    macs = facts.batch * float(counted.macs.sum())
    if macs / (dense.times.median_ms / 1e3) > FASTEST_MACS:
        raise CompressorError(
            f"The dense network's time is given as {dense.times.median_ms:.3g} ms for {macs:.3g} multiply-adds: no "
            "device is that fast. The times are in another unit, or belong to another network.",
        )


def _clocks(timings: DeviceResults) -> str:
    """Describe the clocks that were read during the measurement, and the maximum that trtexec reported."""
    seen: dict[str, list[int]] = {}
    for each in timings.networks.values():
        for turn in each.turns:
            for name, mhz in turn.clocks.items():
                seen.setdefault(name, []).append(mhz)
    read = [f"{name} {int(np.median(values))} MHz" for name, values in sorted(seen.items())]
    return ", ".join([*([f"GPU at most {timings.board.clock}"] if timings.board.clock else []), *read[:6]])
