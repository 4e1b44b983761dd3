"""Export the slim network's ONNX file in other precisions; each file is compared and scored before it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.files import replacing, sha256_file
from compressor.run.folder import RunDir
from compressor.run.onnx_files import COMPARED_IMAGES, MODEL, build_engine_of, drawn, scored
from export.device.here import CPU

if TYPE_CHECKING:
    from compressor.data import DataBundle

CALIBRATION_IMAGES = 256
JUDGING_IMAGES = 2000


def write_precision(
    run: RunDir,
    data: DataBundle,
    precision: str,
    max_drop_points: float,
    *,
    method: str = "minmax",
    rest: str | None = None,
    source: Path | None = None,
    path: Path | None = None,
    engine: bool = True,
) -> Iterator[str]:
    """Write the run's network in another precision, check it on the test split, and build its engine.

    INT8 keeps the most sensitive layers in floating point until the accuracy on the search split is within the allowed
    drop. The test split selects nothing: a file that loses more there is rejected.

    Args:
        run: Run whose FP32 file is exported.
        data: Data of the run.
        precision: "fp16" or "int8".
        max_drop_points: Percentage points of accuracy that the file may lose.
        method: How INT8 ranges are calibrated: "minmax", "entropy" or "percentile".
        rest: Precision of the layers that INT8 leaves out: "fp32" or "fp16"; None for fp16, but fp32 on this CPU.
        source: FP32 file; None for the run's.
        path: Path of the new file; None for `model.PRECISION.onnx`.
        engine: Whether to build its engine.

    Yields:
        Lines for the user.

    Raises:
        CompressorError, ExportError: The precision is unknown, or the drop is larger than allowed; nothing is written.
    """
    if precision not in ("fp16", "int8"):
        raise CompressorError(
            f"--precision {precision} is not exported.",
            "Choose fp16 or int8; the run has model.onnx in fp32.",
        )
    given, goal = source or run.file(MODEL), path or run.file(f"model.{precision}.onnx")
    if rest is None:
        latency = run.manifest.get("latency", {})
        here = latency.get("device", "local") == "local"
        rest = "fp32" if here and str(latency.get("runtime") or CPU).startswith(CPU) else "fp16"
    exact = scored(given, data)[0] if source else run.manifest["accuracy"]["exported"]
    with replacing(goal) as trial:
        seed = int(run.manifest["seed"])
        if precision == "fp16":
            facts = _half(given, trial, data, seed)
        else:
            facts = _int8(given, trial, data, seed, max_drop_points, method, rest)
        if problem := _problem(given, trial, data, seed, precision, exact, max_drop_points, facts):
            raise CompressorError(
                f"{goal.name}: {problem}", "Allow more with --max-drop (a recipe: export.max_drop)."
            )
    yield f"Wrote {goal}: {facts.pop('words')}."
    yield f"Accuracy on {facts['images']} test images: {facts['accuracy']:.2%} (FP32 {exact:.2%})."
    entry = {"file": goal.name, "bytes": goal.stat().st_size, **facts}
    built: list[dict[str, Any]] = []
    if engine:
        built, note = build_engine_of(run, goal)
        yield note
    record(run, goal.name.removeprefix("model.").removesuffix(".onnx"), entry, built)


def record(run: RunDir, key: str, entry: dict[str, Any], engines: list[dict[str, Any]]) -> None:
    """Record an exported file, its engines and their checksums in the manifest."""
    names = [entry["file"]] if run.file(entry["file"]).is_file() else []
    names += [name for each in engines for name in (each["file"], each["file"][: -len("engine")] + "json")]
    built = {each["file"] for each in engines}
    run.save(
        exports={**run.manifest.get("exports", {}), key: entry},
        engines=[each for each in run.manifest.get("engines", []) if each["file"] not in built] + engines,
        files={**run.manifest.get("files", {}), **{name: sha256_file(run.file(name)) for name in names}},
    )


def _half(given: Path, trial: Path, data: DataBundle, seed: int) -> dict[str, Any]:
    from export.convert.half import convert_half

    half = convert_half(given, trial, inputs=drawn(data.search, CALIBRATION_IMAGES, seed)[0])
    return {
        "kept_fp32": [kept.node for kept in half.kept],
        "words": f"{half.converted} nodes in half precision, {len(half.kept)} kept in FP32",
    }


def _int8(
    given: Path, trial: Path, data: DataBundle, seed: int, max_drop_points: float, method: str, rest: str
) -> dict[str, Any]:
    import torch

    from export.convert.ort import accuracy_onnx
    from export.convert.quantize import quantize_within

    calibration, labels = drawn(data.train, CALIBRATION_IMAGES, seed)
    judging, threads = [drawn(data.search, JUDGING_IMAGES, seed)], torch.get_num_threads()
    counts = np.bincount(labels, minlength=data.num_classes).tolist()
    within = quantize_within(
        given,
        trial,
        calibration,
        lambda file: accuracy_onnx(file, judging, threads=threads),
        max_drop=max_drop_points / 100,
        method=method,
        rest=rest,
    )
    kept = list(within.quant.kept)
    return {
        "kept_float": kept,
        "calibration": method,
        "calibration_images": len(calibration),
        "calibration_classes": dict(zip(data.classes, counts, strict=True)),
        "rest": rest,
        "words": f"{len(within.quant.quantised)} nodes in INT8, {len(kept)} kept in floats, calibrated on "
        f"{len(calibration)} training images, {min(counts)} to {max(counts)} of each class",
    }


def _problem(
    given: Path,
    trial: Path,
    data: DataBundle,
    seed: int,
    precision: str,
    exact: float,
    max_drop_points: float,
    facts: dict[str, Any],
) -> str:
    """Describe what is wrong with a file compared with the FP32 one, or return ""; fill `facts` with its scores."""
    from export.convert.ort import onnx_outputs
    from export.convert.parity import AGREEMENTS, TOLERANCES, compare_outputs, require
    from export.errors import ExportError

    images, _ = drawn(data.test, COMPARED_IMAGES, seed)
    right, judged = (onnx_outputs(file, images)[0] for file in (given, trial))
    parity = compare_outputs(right, judged, tolerance=TOLERANCES[precision])
    facts["parity"] = parity.to_dict()
    facts["accuracy"], facts["images"] = scored(trial, data)
    drop = 100 * (exact - facts["accuracy"])
    if drop > max_drop_points + 1e-9:
        return (
            f"it loses {drop:.2f} points of accuracy on {facts['images']} test images ({exact:.2%} in FP32, "
            f"{facts['accuracy']:.2%}); at most {max_drop_points:g} is allowed."
        )
    try:
        require(parity, precision.upper(), min_agreement=min(AGREEMENTS[precision], 1 - 1 / len(images)))
    except ExportError as error:
        return error.message
    return ""
