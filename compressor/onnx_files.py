"""What is done with a run's ONNX files: scored on real images, turned into engines, timed side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.files import cache_folder
from compressor.progress import bar
from compressor.run_dir import RunDir

if TYPE_CHECKING:
    from compressor.data import DataBundle, Split
    from compressor.recipe import Recipe
    from export.build_settings import BuildSettings
    from export.stats import LatencyStats

MODEL = "model.onnx"
DENSE = "checkpoints/dense.onnx"
PROBE = "checkpoints/probe.onnx"
COMPARED_IMAGES = 64  # on which an exported file is compared with the network


def drawn(split: Split, images: int, seed: int) -> tuple[Any, Any]:
    """A sample of a split, spread over the classes: normalised images (N, C, H, W) and labels (N,), as arrays."""
    batches = [(x.numpy(), y.numpy()) for x, y in split.sample(images, seed).batches(256, device="cpu")]
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])


def scored(path: Path, data: DataBundle) -> tuple[float, int]:
    """Top-1 share of an ONNX file on the whole test split through ONNX Runtime, and the number of images.

    It takes as many threads as torch does: this is no measurement of time.
    """
    import torch

    from export.accuracy import accuracy_onnx

    seen = 0

    def batches() -> Iterator[tuple[Any, Any]]:
        nonlocal seen
        with bar("Scoring the exported network", len(data.test)) as progress:
            for x, y in data.test.batches(256, device="cpu"):
                yield x.numpy(), y.numpy()
                seen += len(y)
                progress.advance(len(y))

    return accuracy_onnx(path, batches(), threads=torch.get_num_threads()), seen


def metadata_of(recipe: Recipe, data: DataBundle, run: RunDir, plan_checksum: str) -> dict[str, Any]:
    """What a file says about itself: model, classes, normalisation, run and plan."""
    return {
        "model": recipe.model,
        **data.facts(),
        "mean": list(data.preprocessing.mean),
        "std": list(data.preprocessing.std),
        "run": run.name,
        "plan": plan_checksum,
    }


def build_engine_of(
    run: RunDir,
    onnx: Path,
    *,
    module: str | None = None,
    compute_capability: Sequence[str] = (),
    settings: BuildSettings | None = None,
    must: bool = False,
) -> tuple[list[dict[str, Any]], str]:
    """Build the engine of one of the run's ONNX files where a builder is installed, or take it from the cache.

    Args:
        run: its folder takes the engine.
        onnx: the file.
        module, compute_capability, settings: as in `export.engine.build_engine`.
        must: whether it is an error where there is no builder or it refuses the network.

    Returns:
        The manifest's entries, none where there is no engine, and what to tell the user.

    Raises:
        ExportError: there is no engine, though there must be one.
    """
    from export.engine import available, why_not
    from export.engine_cache import cached_engine
    from export.errors import ExportError

    if available() is None and not must:
        return [], why_not()
    path = run.file(f"engines/{onnx.stem}.engine")
    cache = cache_folder()
    try:
        info, found = cached_engine(
            onnx,
            path,
            cache / "engines",
            module=module,
            compute_capability=tuple(compute_capability) or None,
            settings=settings,
            timing_cache=cache / "timings",
        )
    except ExportError as error:
        if must:
            raise
        return [], f"There is no engine of {onnx.name}: {error}"
    entry = {
        "file": str(path.relative_to(run.path)),
        "builder": f"{info.module} {info.version}",
        "precision": info.precision,
        "compute_capability": ", ".join(info.compute_capabilities),
        "bytes": info.size,
    }
    done = "Found in the cache:" if found else "Built"
    return [
        entry
    ], f"{done} {path.name} for compute capability {entry['compute_capability']} with {info.module}."


PRECISE = 0.005
"""A time is known well enough when its standard error is this share of it."""


def measured(dense: Path, slim: Path, threads: int, repeats: int) -> tuple[LatencyStats, LatencyStats]:
    """Time two ONNX files in turns, each time in a fresh process; for each file the measurement of the middle median.

    Where in memory a network comes to lie is worth a few per cent of its time. After `repeats` times it goes on, to
    three times as many, until the slim network's median is known to within `PRECISE`: what it comes out as has no say
    in this.

    Returns:
        For each file the statistics of its middle measurement, with the runs of all of them.
    """
    from compressor.latency.apart import OrtApart

    found: list[tuple[LatencyStats, LatencyStats]] = []
    with bar("Measuring latency", repeats) as progress:
        while len(found) < repeats or (len(found) < 3 * repeats and _uncertain([each for _, each in found])):
            with closing(OrtApart(threads)) as device:
                found.append(device.compare(dense, slim, seed=len(found)))
            progress.advance(1, note=f"{found[-1][1].median_ms:.3f} ms")
    first, second = (
        replace(
            sorted(column, key=lambda stats: stats.median_ms)[len(found) // 2],
            runs=sum(stats.runs for stats in column),
        )
        for column in zip(*found, strict=True)
    )
    return first, second


def _uncertain(found: Sequence[LatencyStats]) -> bool:
    """Whether the median of these medians has a larger standard error than is good enough; not known of one."""
    medians = [stats.median_ms for stats in found]
    if len(medians) < 2:
        return False
    lower, middle, upper = statistics.quantiles(medians, n=4)
    deviation = (upper - lower) / 1.349  # as of a normal distribution: one busy moment says little
    return bool(1.2533 * deviation / len(medians) ** 0.5 > PRECISE * middle)
