"""How well this machine's table predicts networks that it has never seen, against simpler guesses.

    python benchmarks/latency_accuracy.py                       # all four networks, 40 sub-networks each
    python benchmarks/latency_accuracy.py resnet50@224 --networks 10

For each network: a table is measured from nothing (its time is printed), then random sub-networks that were
used for nothing else are measured end to end and compared with the table's prediction, with the plain sum of
the operators (scaled by its best factor), and with a guess proportional to multiply-adds (likewise). The
machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from compressor.latency.assemble import measure_candidate
from compressor.latency.correction import held_out_error
from compressor.latency.design import random_widths
from compressor.latency.devices import recommended_steps
from compressor.latency.local import local_table
from compressor.latency.ort_profile import OrtCpu
from compressor.models import create_model
from compressor.pruning.space import PruningSpace

NETWORKS = ("resnet50@224", "mobilenet_v2@224", "cifar_resnet56@32", "resnet18@32")


def line(name: str, predicted: npt.NDArray[np.float64], measured: npt.NDArray[np.float64]) -> str:
    """One row of the printed table."""
    error = held_out_error(list(predicted), list(measured))
    within = np.mean(np.abs(predicted / measured - 1) <= 0.10)
    return (
        f"  {name:30s} MAPE {error.mape:6.1%}   worst {error.worst:6.1%}   bias {error.bias:+6.1%}   "
        f"within 10%: {within:4.0%}   Spearman {error.spearman:.4f}"
    )


def run(name: str, networks: int, threads: int, granularity: int | None, keep: Path | None) -> None:
    """Measure one network's table and its error."""
    model_name, _, size = name.partition("@")
    torch.manual_seed(0)
    classes = 10 if int(size) < 100 else 1000
    model = create_model(model_name, classes, "none", (3, int(size), int(size))).eval()
    example = torch.zeros(1, 3, int(size), int(size))
    space = PruningSpace(model, example, granularity=granularity or 1)
    if granularity is None:
        steps = recommended_steps(space.groups, "onnxruntime-cpu", "fp32")
        space = PruningSpace(model, example, granularity=steps)
    print(f"{name}: {len(space.groups)} groups, {threads} thread(s)", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        started = time.monotonic()
        table = local_table(space, example, threads=threads, cache_dir=cache)
        built = time.monotonic() - started
        started = time.monotonic()
        local_table(space, example, threads=threads, cache_dir=cache)
        print(f"  table from nothing {built:.0f} s, from the cache {time.monotonic() - started:.2f} s")
    print(f"  {table.describe()}", flush=True)
    if keep is not None:
        table.write(keep / f"{name}.json")
    curve, device, ranking = table.curve(space), OrtCpu(threads), space.rank()
    widths = random_widths(space, networks, seed=12345)
    measured = np.asarray(
        [measure_candidate(space, ranking, example, row, device).times.median_ms for row in widths]
    )
    total, macs = curve.operators(widths).sum(axis=1), np.asarray(space.macs(widths), dtype=np.float64)
    usual = measured >= 0.25 * table.dense_ms(space)
    print(line("table", curve(widths), measured))
    print(line(f"table, the {usual.sum()} above a quarter", curve(widths)[usual], measured[usual]))
    for guess, values in (("sum of operators", total), ("proportional to MACs", macs)):
        print(line(guess, values * float(np.median(measured / values)), measured), flush=True)
    if keep is not None:
        np.savez(keep / f"{name}.npz", widths=widths, measured=measured)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the networks asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=NETWORKS, metavar="MODEL@PIXELS")
    parser.add_argument("--networks", type=int, default=40, help="sub-networks to compare with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--granularity", type=int, default=None, help="default: what this CPU computes best")
    parser.add_argument("--keep", type=Path, default=None, help="folder for tables and measurements")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in given.names:
        run(name, given.networks, given.threads, given.granularity, given.keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
