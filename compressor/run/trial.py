"""The dense network as ONNX, before anything is measured or searched: what cannot be exported is refused in seconds.

The file is the run's own of the dense network, with which the slim one is compared in time.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.core.errors import CompressorError
from compressor.core.files import replacing
from compressor.latency.distinct import with_distinct_weights
from compressor.run.device import opset_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.recipe import Recipe


class DenseFile:
    """The ONNX file of a run's dense network: in a folder of its own until the run has one.

    Args:
        known: the file of a run that goes on; nothing is exported where it is there.
        recipe, model, example: the network, and a batch of one.

    Raises:
        CompressorError: the network cannot be exported, or its file does not compute what it computes.
    """

    def __init__(self, known: Path | None, recipe: Recipe, model: nn.Module, example: Tensor) -> None:
        self._path: Path | None = None
        if known is None or not known.exists():
            folder = tempfile.mkdtemp(prefix="compressor-dense-")
            self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._path = Path(folder) / "dense.onnx"
            self._write(self._path, recipe, model, example)

    def put(self, path: Path) -> None:
        """Make the file appear under `path`, whole, unless it is there already."""
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
