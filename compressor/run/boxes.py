"""The ONNX file of a detector with its post-processing, compared with the network before it is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressor.core.errors import CompressorError
from compressor.core.files import replacing
from compressor.core.manifest import Export, Parity
from compressor.core.progress import bar
from compressor.run.folder import RunFolder
from compressor.run.onnx_files import record

if TYPE_CHECKING:
    from compressor.recipe import Recipe


def check_detection(recipe: Recipe) -> None:
    """Refuse a run of another task.

    Raises:
        CompressorError: Its network gives no boxes.
    """
    if recipe.task != "detection":
        raise CompressorError(
            f"--format boxes is for runs of detection, and the task of this one is {recipe.task or 'classification'}.",
            "Leave it out: the file has all that the network gives.",
        )


def write_boxes(
    run: RunFolder,
    task: Any,
    model: Any,
    path: Path,
    images: Any,
    *,
    opset: int,
    tolerance: float,
    metadata: Mapping[str, Any],
) -> Iterator[str]:
    """Write the file, which takes one picture and gives boxes (n, 4) in pixels of the input, scores and labels (n,).

    Args:
        run: Run whose manifest lists the file.
        task: Its `Detection`; the test split scores the file.
        model: Its slim network, a `RawDetector`.
        path: Path of the file.
        images: Array of test pictures (N, C, H, W) in which the file has to find what the network finds.
        opset: Opset of the file.
        tolerance: Maximum difference of a score, and of a box's edge as a share of the picture's longer side.
        metadata: Facts to store in the file.

    Yields:
        Lines for the user.

    Raises:
        ExportError: The network cannot be exported, or the file finds other boxes; nothing is written.
    """
    from compressor.models.computed import evaluated
    from compressor.models.detectors import WithBoxes
    from export.convert.detections import compare_found
    from export.convert.module import OnnxModule
    from export.convert.to_onnx import export_onnx

    pictures = torch.split(torch.from_numpy(images), 1)
    network = WithBoxes(model, pictures[0])
    with evaluated(network), torch.no_grad(), replacing(path) as trial:
        info = export_onnx(
            network, pictures[0], trial, opset=opset, metadata=metadata, compare=False, open_outputs="boxes"
        )
        file = OnnxModule(trial, network, (pictures[0],))
        parity = compare_found(
            [network(image) for image in pictures],
            [file(image) for image in pictures],
            path.name,
            side=max(images.shape[-2:]),
            tolerance=tolerance,
        )
        with bar("Scoring the exported file", task.test_inputs) as progress:
            score = task.found_score(
                lambda batch: [file(image) for image in batch.split(1)], task.test, "cpu", progress.advance
            )
    entry = Export(
        file=path.name,
        bytes=info.size,
        opset=opset,
        parity=Parity.model_validate(parity.to_dict()),
        accuracy=score,
        images=task.test_inputs,
    )
    record(run, entry)
    yield f"Wrote {path}: opset {opset}, {info.size / 1e6:.2f} MB."
    yield (
        f"It finds the network's boxes in {parity.top1_agreement:.0%} of {parity.samples} test images, to within "
        f"{parity.max_abs:.1e} of their size; {task.metric.title}: {task.metric.text(score)}."
    )
