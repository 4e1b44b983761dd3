"""Builds a latency table from measured sub-networks: operator entries, whole-network correction, held-out error."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.latency.fit import (
    Correction,
    Floats,
    Surfaces,
    fit_correction,
    fit_factors,
    fit_surface,
    held_out_error,
)
from compressor.latency.networks import Device, NetworkTimes, TaggedNetwork, tag, with_distinct_weights
from compressor.latency.operators import Operators, Widths, channels, network_signature, signature_of
from compressor.latency.schema import (
    FASTEST_MS,
    CorrectionFields,
    DeviceFields,
    Entry,
    HeldOutFields,
    NetworkFields,
    Precision,
    RuntimeFields,
    TableFields,
    possible,
    rounded,
)
from compressor.latency.table import LatencyTable
from export.convert.to_onnx import DEFAULT_OPSET, export_onnx
from export.convert.trees import rows
from export.errors import ExportError

if TYPE_CHECKING:

    from compressor.pruning.importance import Ranking
    from compressor.pruning.space import PruningSpace


SECONDS_A_NETWORK = 0.5
"""Seconds for which each network runs."""

Point = tuple[str, int, int]
"""An operator's entry and its channels: (key, c_in, c_out)."""


@dataclass(frozen=True)
class Provenance:
    """Provenance of a measured table.

    Attributes:
        device, runtime, precision: The measured device, its runtime and precision.
        batch, streams: Inputs of one run, and copies of a network that ran at the same time.
        block: Channels per kernel block.
        protocol, sources: Description of the measurement; identifiers of its data.
    """

    device: DeviceFields
    runtime: RuntimeFields
    precision: Precision
    block: int
    protocol: str
    sources: tuple[str, ...] = ()
    batch: int = 1
    streams: int = 1


@dataclass(frozen=True)
class Sample:
    """One measured sub-network.

    Attributes:
        c_in, c_out: Channels of each of the space's layers, (layers,); 0 for layers of removed blocks.
        network: The exported network.
        times: Its measured times.
    """

    c_in: Widths
    c_out: Widths
    network: TaggedNetwork
    times: NetworkTimes


def measure_candidate(
    space: PruningSpace, ranking: Ranking, example: Any, widths: Widths, device: Device
) -> Sample:
    """Build, export and measure one sub-network."""
    network = export_candidate(space, ranking, example, widths)
    c_in, c_out = (rows[0] for rows in channels(space, widths[None]))
    try:
        times = device.measure(network, SECONDS_A_NETWORK)
    except ExportError as error:
        raise CompressorError(f"The network cannot be measured: {error.message}", error.hint) from error
    if not (c_out > 0).all():
        operators = np.zeros((len(times.operators_ms), len(c_out)))
        operators[:, c_out > 0] = times.operators_ms
        times = NetworkTimes(times.whole_ms, operators, times.slowdown)
    return Sample(c_in, c_out, network, times)


def load_words(batch: int, streams: int) -> str:
    """Return what a protocol adds for a batch or for several streams; empty for one of each."""
    words = f"; each run is of a batch of {batch}" if batch > 1 else ""
    if streams > 1:
        words += f"; {streams} copies of each network ran at the same time, and all their runs count"
    return words


def with_batch(example: Any, batch: int) -> Any:
    """Return a network's arguments for one input, repeated for a batch."""
    return example if batch == 1 else rows(example, 1, [0] * batch)


def export_candidate(
    space: PruningSpace, ranking: Ranking, example: Any, widths: Widths, *, opset: int = DEFAULT_OPSET
) -> TaggedNetwork:
    """Export one sub-network to ONNX, in the form in which it is delivered, and map its nodes to operators.

    Args:
        space: The space that the sub-network belongs to.
        ranking: Decides which channels are removed first.
        example: The network's arguments for one batch.
        widths: Width of each group, (G,), or a row that goes on with its blocks.
        opset: ONNX opset of the file.

    Raises:
        CompressorError: The network cannot be exported, or its operators cannot be identified in the file.
    """
    small = with_distinct_weights(space.apply(space.plan(widths, ranking)))
    c_in, c_out = (rows[0] for rows in channels(space, widths[None]))
    cost = Operators(space.layers).cost(c_in, c_out)
    weights = [int(count) for count, present in zip(cost.weights, c_out > 0, strict=True) if present]
    with tempfile.TemporaryDirectory(prefix="compressor-latency-") as folder:
        path = Path(folder) / "network.onnx"
        try:
            export_onnx(small, example, path, opset=opset, compare=False)
        except ExportError as error:
            raise CompressorError(f"The network cannot be measured: {error.message}", error.hint) from error
        network = tag(path, weights)
    if network.operators != len(weights):
        raise CompressorError(
            f"Of the network's {len(weights)} weight-bearing operators {network.operators} were found in the exported "
            "file: they cannot be timed one by one.",
            "Give the budget in --flops or --params instead of --latency.",
        )
    return network


@possible()
def table_from(
    space: PruningSpace,
    samples: Sequence[Sample],
    unseen: Sequence[Sample],
    drift: float,
    seconds: float,
    provenance: Provenance,
) -> LatencyTable:
    """Build the latency table of one network on this machine or on another device.

    Args:
        space: The space whose sub-networks were measured.
        samples: Samples to fit to; the dense network comes first.
        unseen: Samples held out for the error estimate.
        drift: Dense time at the end divided by dense time at the start, minus one.
        seconds: Duration of the measurement.
        provenance: Device, runtime and protocol.

    Raises:
        CompressorError: The measured times are implausible.
    """
    block = provenance.block
    predict = Predictor(space, samples, block)
    correction = predict.correction
    held = None
    if unseen:
        held = held_out_fields(predict(unseen).tolist(), [each.times.median_ms for each in unseen])
    first = samples[0]
    dense = np.concatenate(
        [
            each.times.whole_ms
            for each in samples
            if np.array_equal(each.c_in, first.c_in) and np.array_equal(each.c_out, first.c_out)
        ]
    )
    network = NetworkFields(
        layers=tuple(predict.layers),
        dense_ms=rounded(float(np.median(dense))),
        dense_p90_ms=rounded(float(np.quantile(dense, 0.9))),
        drift=round(drift, 4),
        correction=correction_fields(correction, predict.factors),
        fitted_networks=len(samples),
        held_out=held,
        seconds=round(seconds, 1),
        granularity=tuple(group.granularity for group in space.groups),
        blocks=len(space.blocks) if space.depth else 0,
    )
    return LatencyTable(
        TableFields(
            device=provenance.device,
            runtime=provenance.runtime,
            precision=provenance.precision,
            batch=provenance.batch,
            streams=provenance.streams,
            date=datetime.now(timezone.utc).date().isoformat(),
            how="measured",
            protocol=provenance.protocol,
            sources=provenance.sources,
            block=block,
            entries=predict.entries,
            networks={network_signature(space): network},
        )
    )


def correction_fields(correction: Correction, factors: Sequence[float] = ()) -> CorrectionFields:
    """Return a correction, and factors for the operators' times, as a table has them."""
    return CorrectionFields(
        offset_ms=rounded(correction.offset),
        slope=rounded(correction.slope),
        least_ms=rounded(correction.least),
        bends=tuple((rounded(at), rounded(slope)) for at, slope in correction.bends),
        factors=tuple(rounded(factor) for factor in factors),
        weights=tuple((rounded(at), rounded(slope)) for at, slope in correction.weights),
    )


def held_out_fields(predicted: Sequence[float], measured: Sequence[float]) -> HeldOutFields:
    """Return the errors of predictions, both in milliseconds, as a table has them."""
    error = held_out_error(predicted, measured)
    return HeldOutFields.model_validate({name: rounded(value) for name, value in vars(error).items()})


class Predictor:
    """Predicts network times by a fit to measured networks.

    Args:
        space: The space of the networks.
        samples: The networks.
        block: Channels per kernel block.

    Attributes:
        layers: Entry key of each operator, in execution order; layers with one signature share an entry.
        entries: The measured points of each key.
    """

    def __init__(self, space: PruningSpace, samples: Sequence[Sample], block: int) -> None:
        self.layers = [
            signature_of(layer, epilogue).key
            for layer, epilogue in zip(space.layers, samples[0].network.epilogues, strict=True)
        ]
        self.entries = _entries(self.layers, samples)
        fits = {
            key: fit_surface(entry.c_in, entry.c_out, entry.median_ms, block)
            for key, entry in self.entries.items()
        }
        of_layers = [fits[key] for key in self.layers]
        c_in, c_out = _stacked(samples)
        measured = [each.times.median_ms for each in samples]
        self.factors = fit_factors(Surfaces(of_layers, block).by_kind(c_in, c_out), measured)
        self._surfaces = Surfaces(of_layers, block, self.factors)
        self._operators = Operators.of_keys(self.layers)
        totals, weights = self._sums(c_in, c_out)
        self.correction = fit_correction(totals.tolist(), weights.tolist(), measured)

    def __call__(self, samples: Sequence[Sample]) -> Floats:
        """Predict milliseconds (N,) of networks with the channels of these samples."""
        return self.of_channels(*_stacked(samples))

    def of_channels(self, c_in: Widths, c_out: Widths) -> Floats:
        """Predict milliseconds (N,) from the channels of each operator, (N, layers)."""
        return self.correction(*self._sums(c_in, c_out))

    def _sums(self, c_in: Widths, c_out: Widths) -> tuple[Floats, Floats]:
        """Sum the operators' milliseconds and weight elements of each network, both (N,)."""
        weights = self._operators.cost(c_in, c_out).weights
        return self._surfaces(c_in, c_out).sum(axis=1), weights.sum(axis=1)


def _stacked(samples: Sequence[Sample]) -> tuple[Widths, Widths]:
    """Stack the operators' input and output channels of all networks: two arrays (N, layers)."""
    return np.stack([each.c_in for each in samples]), np.stack([each.c_out for each in samples])


def _entries(layers: Sequence[str], samples: Sequence[Sample]) -> dict[str, Entry]:
    """Build one point for each operator and channel pair; layers with the same signature share an entry."""
    found: dict[Point, list[tuple[int, float, float, float]]] = defaultdict(list)
    for sample in samples:
        for index, key in enumerate(layers):
            if not sample.c_out[index]:
                continue  # part of a removed block
            point = (key, int(sample.c_in[index]), int(sample.c_out[index]))
            usual, p90, std = (float(value) for value in sample.times.by_operator_ms[:, index])
            count = len(sample.times.operators_ms)
            found[point].append((count, max(usual, FASTEST_MS), max(p90, FASTEST_MS), std))
    rows: dict[str, list[tuple[int, int, int, tuple[float, ...]]]] = defaultdict(list)
    for (key, c_in, c_out), values in sorted(found.items()):
        runs, *times_ms = zip(*values, strict=True)
        medians = tuple(rounded(float(np.median(column))) for column in times_ms)
        rows[key].append((c_in, c_out, int(sum(runs)), medians))
    return {
        key: Entry(
            c_in=tuple(row[0] for row in points),
            c_out=tuple(row[1] for row in points),
            n=tuple(row[2] for row in points),
            median_ms=tuple(row[3][0] for row in points),
            p90_ms=tuple(row[3][1] for row in points),
            std_ms=tuple(row[3][2] for row in points),
        )
        for key, points in rows.items()
    }
