"""How well this machine's table predicts networks that it has never seen, against simpler guesses.

    python -m benchmarks.latency_accuracy                       # all four networks, 40 sub-networks each
    python -m benchmarks.latency_accuracy resnet50@224 --networks 10 --precision fp16

For each network: a table is measured from nothing (its time is printed), then random sub-networks that were used for
nothing else are measured end to end, three times with the others in between, in three processes of their own. As in
the table, runs that another process interrupted or slowed down do not count (`compressor.latency.machine.undisturbed`).
The median of the others is compared with the table's prediction, with the plain sum of the operators (scaled by its
best factor), and with a guess proportional to multiply-adds (likewise). The dense network is measured among them:
where a shared machine has become faster or slower since its table was made, "at today's speed" is the table's error
with all predictions multiplied by the dense network's change (the column "speed"). How far the three turns of a
network lie apart says how well its time can be known at all. The machine should do nothing else meanwhile; all four
take about 15 minutes on a CPU. With a GPU its table is measured instead, and each turn builds its engines anew.
Results are saved network by network, and a second call goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from compressor.core.files import write_atomic
from compressor.latency.assemble import export_candidate
from compressor.latency.backends.cpu import OrtProcess
from compressor.latency.fit import held_out_error
from compressor.latency.machine import at_full_speed
from compressor.latency.measured import MeasuredDevice
from compressor.latency.networks import TaggedNetwork
from compressor.latency.operators import Widths
from compressor.latency.provider import TableProvider
from compressor.latency.request import Request
from compressor.latency.sampling import random_widths
from compressor.latency.table import LatencyTable
from compressor.models import create_model
from compressor.pruning.space import PruningSpace

NETWORKS = ("resnet50@224", "mobilenet_v2@224", "cifar_resnet56@32", "resnet18@32")
TURNS = 3
SECONDS_A_TURN = 0.7
UNSEEN = 20261121
"""Seed of the networks to compare with. The correction was designed with those of another seed in view (987654)."""

Floats = npt.NDArray[np.float64]


def here(cache: str | None = None) -> MeasuredDevice:
    """Return this machine's GPU, or its CPU, with its tables in a folder of their own."""
    device = TableProvider.for_device("local")
    assert isinstance(device, MeasuredDevice)
    device.cache_dir = cache
    return device


def measured_ms(
    space: PruningSpace, example: torch.Tensor, widths: Widths, request: Request
) -> tuple[Floats, Floats]:
    """The median of each network's undisturbed runs, and how far its turns lie apart as a share, both (N,)."""
    ranking = space.rank()
    models = [export_candidate(space, ranking, example, row).model for row in widths]
    rng = np.random.default_rng(0)
    turns = np.zeros((TURNS, len(models)))
    seen: list[list[Floats]] = [[] for _ in models]
    for turn in range(TURNS):
        device = here().runner(request)
        for place in rng.permutation(len(models)):
            times = device.measure(TaggedNetwork(models[place], (), ()), SECONDS_A_TURN)
            seen[place].append(times.whole_ms)
            turns[turn, place] = times.median_ms
        if isinstance(device, OrtProcess):
            device.close()
    every = [np.concatenate(each) for each in seen]
    measured = [float(np.median(times[at_full_speed(times)])) for times in every]
    return np.asarray(measured), np.ptp(turns, axis=0) / np.median(turns, axis=0)


def plain_sum_ms(table: LatencyTable, space: PruningSpace, widths: Widths) -> Floats:
    """The sum of the operators' times as they were profiled, before any correction, (N,)."""
    ((name, network),) = table.fields.networks.items()
    bare = network.model_copy(update={"correction": network.correction.model_copy(update={"factors": ()})})
    as_profiled = LatencyTable(table.fields.model_copy(update={"networks": {name: bare}}))
    return np.asarray(as_profiled.curve(space).operators(widths).sum(axis=1))


def errors(predicted: Floats, measured: Floats) -> dict[str, float]:
    """What the table of results has of one guess."""
    error = held_out_error(predicted.tolist(), measured.tolist())
    within = float(np.mean(np.abs(predicted / measured - 1) <= 0.10))
    return {
        "mape": error.mape, "p95": error.p95, "worst": error.worst, "bias": error.bias, "within_10_percent": within,
        "spearman": error.spearman,
    }  # fmt: skip


def run(name: str, networks: int, request: Request) -> dict[str, Any]:
    """Measure one network's table and its error."""
    model_name, _, size = name.partition("@")
    torch.manual_seed(0)
    classes = 10 if int(size) < 100 else 1000
    model = create_model(model_name, classes, "none", (3, int(size), int(size))).eval()
    example = torch.zeros(1, 3, int(size), int(size))
    space = PruningSpace(model, example)
    steps = here().steps(space.groups, request.precision)
    space = PruningSpace(model, example, granularity=steps)
    with tempfile.TemporaryDirectory() as cache:
        started = time.monotonic()
        table = here(cache).table(space, example, request)
        built_s = time.monotonic() - started
        started = time.monotonic()
        here(cache).table(space, example, dataclasses.replace(request, time_limit_s=None))
        cached_s = time.monotonic() - started
    curve, widths = table.curve(space), random_widths(space, networks, seed=UNSEEN)
    dense = np.asarray(space.dense_widths, dtype=np.int64)
    (*measured_by_place, dense_now), apart = measured_ms(
        space, example, np.concatenate([widths, dense[None]]), request
    )
    measured, speed = np.asarray(measured_by_place), dense_now / table.dense_ms(space)
    total, macs = plain_sum_ms(table, space, widths), np.asarray(space.macs(widths), dtype=np.float64)
    scaled = {
        guess: values * float(np.median(measured / values))
        for guess, values in (("sum", total), ("macs", macs))
    }
    network = next(iter(table.fields.networks.values()))
    return {
        "network": name, "threads": request.threads, "networks": networks, "precision": request.precision,
        "dense_ms": table.dense_ms(space),
        "fitted_networks": network.fitted_networks, "stated": network.held_out and network.held_out.model_dump(),
        "built_s": round(built_s, 1), "cached_s": round(cached_s, 2), "turns_apart": float(np.median(apart)),
        "speed": speed - 1, "at today's speed": errors(curve(widths) * speed, measured),
        "table": errors(curve(widths), measured), "sum of operators": errors(scaled["sum"], measured),
        "proportional to MACs": errors(scaled["macs"], measured), "measured_ms": np.round(measured, 5).tolist(),
        "predicted_ms": np.round(curve(widths), 5).tolist(),
    }  # fmt: skip


def show(results: Sequence[dict[str, Any]], console: Console) -> None:
    """Print all results so far."""
    table = Table(title="Predicted against measured, on sub-networks that were used for nothing else")
    columns = (
        "network", "guess", "MAPE", "95 % within", "worst", "bias", "within 10 %", "Spearman", "speed", "turns apart",
        "measured in s", "cached s",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column in ("network", "guess") else "right")
    for result in results:
        for guess in ("table", "at today's speed", "sum of operators", "proportional to MACs"):
            row = result[guess]
            own = guess == "table"
            table.add_row(
                result["network"] if own else "", guess,
                f"{row['mape']:.1%}", f"{row['p95']:.1%}", f"{row['worst']:.1%}",
                f"{row['bias']:+.1%}", f"{row['within_10_percent']:.0%}", f"{row['spearman']:.4f}",
                f"{result['speed']:+.1%}" if own else "",
                f"{result['turns_apart']:.1%}" if own else "",
                f"{result['built_s']:.0f}" if own else "", f"{result['cached_s']:.1f}" if own else "",
            )  # fmt: skip
    console.print(table)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=NETWORKS, metavar="MODEL@PIXELS")
    parser.add_argument("--networks", type=int, default=40, help="sub-networks to compare with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32")
    parser.add_argument("--time-limit-s", type=float, help="seconds for each table; by default the device's own limit")
    parser.add_argument("--out", type=Path, default=Path("runs/latency_accuracy.json"))
    return parser.parse_args(arguments)


def main() -> int:
    """Run the networks asked for that have no result yet."""
    given = parsed()
    torch.set_num_threads(1)
    console = Console(width=130)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    saved = json.loads(given.out.read_text()) if given.out.exists() else {"results": []}
    results: list[dict[str, Any]] = saved["results"]
    here().check(given.precision)
    for name in given.names:
        asked = (name, given.threads, given.networks, given.precision)
        done = [(each["network"], each["threads"], each["networks"], each.get("precision", "fp32")) for each in results]
        if asked in done:
            continue
        request = Request(precision=given.precision, threads=given.threads, time_limit_s=given.time_limit_s)
        results.append(run(name, given.networks, request))
        machine = here().describe().model_dump()
        write_atomic(given.out, json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
        show(results, console)
    show(results, console)
    console.print(f"Saved {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
