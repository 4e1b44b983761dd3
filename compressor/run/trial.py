"""Export the dense network to ONNX before anything is measured or searched, so that failures show within seconds.

The file becomes the run's dense ONNX file, which is timed beside the slim one.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.core.errors import CompressorError
from compressor.core.files import replacing
from compressor.latency.networks import with_distinct_weights
from compressor.run.device import opset_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.recipe import Recipe


class DenseFile:
    """ONNX file of a run's dense network: in a temporary folder until the run has one.

    Args:
        known: File of a resumed run; nothing is exported if it exists.
        recipe, model, example: Network and a batch of one input.

    Raises:
        CompressorError: The network cannot be exported, or the file's outputs differ from the network's.
    """

    def __init__(self, known: Path | None, recipe: Recipe, model: nn.Module, example: Tensor) -> None:
        self._path: Path | None = None
        if known is None or not known.exists():
            folder = tempfile.mkdtemp(prefix="compressor-dense-")
            self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._path = Path(folder) / "dense.onnx"
            self._write(self._path, recipe, model, example)

    def put(self, path: Path) -> None:
        """Put the complete file at `path`, unless it exists already."""
        if self._path is None:
            return
        if not path.exists():
            with replacing(path) as temporary:
                shutil.copyfile(self._path, temporary)
        self._path = None
        self._remove()

    @staticmethod
    def _write(path: Path, recipe: Recipe, model: nn.Module, example: Tensor) -> None:
        from export.convert.to_onnx import export_onnx
        from export.errors import ExportError

        try:
            export_onnx(with_distinct_weights(model), example, path, opset=opset_of(recipe))
        except ExportError as error:
            raise CompressorError(
                f"{recipe.model} cannot be exported, and neither could a slim network of it: {error.message}",
                error.hint,
            ) from error
