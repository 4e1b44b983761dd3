"""Operations on a run's ONNX files: scoring on real images and building engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.files import cache_folder
from compressor.core.progress import bar
from compressor.run.folder import RunDir

if TYPE_CHECKING:
    from compressor.data import DataBundle, Split
    from compressor.recipe import Recipe
    from export.engine.engine import BuildSettings

MODEL = "model.onnx"
DENSE = "checkpoints/dense.onnx"
PROBE = "checkpoints/probe.onnx"
COMPARED_IMAGES = 64  # number of images for comparing an exported file with the network


def drawn(split: Split, images: int, seed: int) -> tuple[Any, Any]:
    """Draw a sample of a split, spread over the classes: normalized images (N, C, H, W) and labels (N,), as arrays."""
    batches = [(x.numpy(), y.numpy()) for x, y in split.sample(images, seed).batches(256, device="cpu")]
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])


def scored(path: Path, data: DataBundle) -> tuple[float, int]:
    """Return an ONNX file's top-1 share on the whole test split with ONNX Runtime, and the number of images.

    It uses as many threads as PyTorch; this does not measure time.
    """
    import torch

    from export.convert.ort import accuracy_onnx

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
    """Return the metadata of an exported file: model, classes, normalization, run and plan."""
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
    """Build the engine of one of the run's ONNX files if a builder is installed, or take it from the cache.

    Args:
        run: Run whose folder receives the engine.
        onnx: ONNX file.
        module, compute_capability, settings: As in `export.engine.engine.build_engine`.
        must: Whether a missing builder or a rejected network is an error.

    Returns:
        The manifest's entries, empty without an engine, and a message for the user.

    Raises:
        ExportError: There is no engine although `must` is set.
    """
    from export.engine.engine import cached_engine
    from export.engine.trt import available, why_not
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
