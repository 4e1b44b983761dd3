"""The slim network's ONNX file in other precisions, each scored on the test split before it counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import CompressorError
from compressor.onnx_files import MODEL, build_engine_of, first_images, scored
from compressor.run_dir import RunDir, sha256_file

if TYPE_CHECKING:
    from compressor.data import DataBundle

CALIBRATION_IMAGES = 256
JUDGING_IMAGES = 2000


def write_precision(run: RunDir, data: DataBundle, precision: str, max_drop_points: float) -> Iterator[str]:
    """Write the run's network in another precision, score it on the test split, and build its engine.

    INT8 keeps the most sensitive layers in floats until the accuracy on the search split is within the drop; the
    test split is only reported.

    Args:
        run: one whose FP32 file is exported.
        data: of the run.
        precision: "fp16" or "int8".
        max_drop_points: percentage points of accuracy that INT8 may lose.

    Yields:
        Lines for the user.

    Raises:
        CompressorError, ExportError: the precision is unknown, or cannot be had within the drop.
    """
    from export.accuracy import accuracy_onnx, quantize_within
    from export.half import convert_half

    path = run.file(f"model.{precision}.onnx")
    if precision == "fp16":
        half = convert_half(run.file(MODEL), path, inputs=first_images(data.search, CALIBRATION_IMAGES))
        yield f"Wrote {path}: {half.converted} nodes in half precision, {len(half.kept)} kept in FP32."
        facts: dict[str, Any] = {"kept_fp32": [kept.node for kept in half.kept]}
    elif precision == "int8":
        calibration = first_images(data.train, CALIBRATION_IMAGES)
        judging = [(first_images(data.search, JUDGING_IMAGES), _labels(data, JUDGING_IMAGES))]
        within = quantize_within(
            run.file(MODEL),
            path,
            calibration,
            lambda file: accuracy_onnx(file, judging, threads=2),
            max_drop=max_drop_points / 100,
        )
        kept = list(within.quant.kept)
        yield f"Wrote {path}: {len(within.quant.quantised)} nodes in INT8, {len(kept)} kept in floats."
        facts = {"kept_float": kept, "calibration_images": len(calibration)}
    else:
        raise CompressorError(
            f"--precision {precision} is not exported.",
            "Choose fp16 or int8; the run has model.onnx in fp32.",
        )
    accuracy, images = scored(path, data)
    yield f"Accuracy on {images} test images: {accuracy:.2%} (FP32 {run.manifest['accuracy']['exported']:.2%})."
    built, note = build_engine_of(run, path)
    yield note
    entry = {"file": path.name, "accuracy": accuracy, "bytes": path.stat().st_size, **facts}
    names = [
        path.name,
        *(name for each in built for name in (each["file"], each["file"][: -len("engine")] + "json")),
    ]
    run.save(
        exports={**run.manifest.get("exports", {}), precision: entry},
        engines=[each for each in run.manifest["engines"] if each["precision"] != precision] + built,
        files={**run.manifest.get("files", {}), **{name: sha256_file(run.file(name)) for name in names}},
    )


def _labels(data: DataBundle, count: int) -> Any:
    """The labels (N,) of the first images of the search split."""
    return np.concatenate([labels.numpy() for _, labels in data.search.batches(256, device="cpu")])[:count]
