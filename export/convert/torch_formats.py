"""The format that torch itself loads: `torch.export`'s `.pt2`.

    export_program(model, example, "model.pt2", metadata={"classes": [...]})
    network = load_program("model.pt2")            # a module; refuses archives that hold code of Python

A file holds code and weights, so that loading it needs no source of the network.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from export.convert.batches import Batch
from export.convert.ort import first_line
from export.convert.parity import (
    TOLERANCES,
    Parity,
    compare_outputs,
    gross_difference,
    portions,
    require,
    worst,
)
from export.convert.program_archive import require_plain
from export.convert.to_onnx import as_tuple, frozen_copy, reference_outputs
from export.errors import ExportError
from export.files import read_bytes, sha256_bytes, write_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

METADATA = "metadata.json"
_TRACES = ("stack_trace", "nn_module_stack", "from_node", "source_fn_stack", "torch_fn")
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AssertionError)


@dataclass(frozen=True)
class TorchInfo:
    """What was written: the file, its checksum and its size in bytes."""

    path: Path
    sha256: str
    size: int


def _wrong(loaded: nn.Module, model: nn.Module, sample: torch.Tensor, sizes: Sequence[int]) -> str | None:
    """What `loaded` computes otherwise than the network for these numbers of random inputs, or None."""
    for size in sizes:
        inputs = torch.randn(size, *sample.shape[1:], generator=torch.Generator().manual_seed(size))
        try:
            with _quiet(), torch.no_grad():
                found, right = (
                    [value.numpy() for value in as_tuple(network(inputs))] for network in (loaded, model)
                )
        except _FAILURES as error:
            return f"it does not run on {size} inputs: {first_line(error)}"
        if (wrong := gross_difference(right, found, size)) is not None:
            return wrong
    return None


def export_program(
    model: nn.Module,
    example: torch.Tensor,
    path: str | Path,
    *,
    batch: Batch | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> TorchInfo:
    """Write `model` as a program of `torch.export`; the same network gives the same bytes.

    Args:
        model: Takes one float tensor; left as it is.
        example: A batch (N, C, H, W); its values do not matter.
        path: Where the file goes; it appears there whole or not at all.
        batch: Sizes of a batch; None for the example's.
        metadata: Facts to carry as JSON in the archive's `extra/metadata.json`.

    Raises:
        ExportError: the network cannot be captured, fixes an open batch, or the file cannot be written.
    """
    copied, sample, shapes = frozen_copy(model), example.cpu().float(), None
    if batch is not None:
        # a traced size of 1 would be taken for a constant
        size = max(2, batch.usual) if batch.open else batch.usual
        sample = sample[:1].expand(size, *sample.shape[1:]).contiguous()
        if batch.open:
            shapes = ({0: torch.export.Dim("batch", min=batch.least, max=batch.most)},)
    sizes = [size for size in batch.tried if batch.least <= size <= batch.most] if batch else [len(sample)]
    problem = ""
    # the strict capture reads forward's code, and knows int(x.shape[0]) for a size; the other is faster, and takes more
    for strict in (False, True):
        buffer = io.BytesIO()
        try:
            with _quiet(), torch.no_grad():
                program = torch.export.export(copied, (sample,), dynamic_shapes=shapes, strict=strict)
                for node in program.graph.nodes:
                    for key in _TRACES:  # where the source lay on this machine is nobody's business
                        node.meta.pop(key, None)
                torch.export.save(program, buffer, extra_files={METADATA: _json(metadata)})
        except (*_FAILURES, torch._dynamo.exc.TorchDynamoException) as error:
            problem = problem or _first_cause(error)
            continue
        if (wrong := _wrong(program.module(), copied, sample, sizes)) is None:
            return _written(Path(path), buffer.getvalue())
        problem = problem or wrong
    raise ExportError(
        f"The network cannot be written by torch.export: {problem}.",
        "Let forward keep the batch as a size (x.flatten(1), x.reshape(x.shape[0], ...)) and take the same path for "
        "every input" + (", or export a fixed batch." if batch and batch.open else "."),
    )


def _first_cause(error: BaseException) -> str:
    """What torch.export says of a network: of violated constraints the constraint, not the advice before it."""
    lines = [line.strip().lstrip("- ") for line in str(error).splitlines() if line.lstrip().startswith("- ")]
    return lines[0].rstrip(".") if "Constraints violated" in str(error) and lines else first_line(error)


def load_program(path: str | Path) -> nn.Module:
    """A `.pt2` file as a module, on the CPU.

    torch's own `torch.export.load` unpickles and evaluates what a file brings; `program_archive` refuses such files
    first.

    Raises:
        ExportError: the file is missing, is no program, or holds more than tensors and a graph of torch's operators.
    """
    content = read_bytes(Path(path), "program")
    try:
        for member, held in require_plain(content, str(path)).items():
            _require_weights_only(held, member, str(path))
        with _quiet():
            loaded: nn.Module = torch.export.load(io.BytesIO(content)).module()
    except (*_FAILURES, AttributeError, zipfile.BadZipFile, EOFError) as error:
        raise ExportError(
            f"{path} is no program of torch.export: {first_line(error)}.", "Copy it again as a whole."
        ) from error
    return loaded


def check_loaded(
    loaded: nn.Module, model: nn.Module, inputs: npt.NDArray[Any], what: str, batch: int = 1
) -> Parity:
    """Compare what was loaded with the network, on real inputs (N, C, H, W) in portions of `batch`.

    Returns:
        The worst of the outputs, where there are several.

    Raises:
        ExportError: they differ by more than FP32 files may.
    """
    import numpy as np

    whole = inputs[: max(len(inputs) - len(inputs) % batch, batch)]
    runs = portions(len(whole), batch)
    right = reference_outputs(model, whole, runs=runs)
    parts = []
    with torch.no_grad():
        for start, size in runs:
            chunk = np.ascontiguousarray(whole[start : start + size], dtype=np.float32)
            parts.append([value.numpy() for value in as_tuple(loaded(torch.from_numpy(chunk)))])
    found = [np.concatenate(column) for column in zip(*parts)]
    pairs = [compare_outputs(*pair, tolerance=TOLERANCES["fp32"]) for pair in zip(right, found)]
    return require(worst(pairs), what, min_agreement=1 - 1 / len(whole))


def _require_weights_only(held: bytes, member: str, name: str) -> None:
    try:
        if held:
            torch.load(io.BytesIO(held), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ExportError(f"{name} holds pickled objects ({member}); it was not read.") from error


def _json(metadata: Mapping[str, Any] | None) -> str:
    return json.dumps(dict(metadata or {}), sort_keys=True)


def _written(path: Path, content: bytes) -> TorchInfo:
    write_bytes(path, content)
    return TorchInfo(path=path, sha256=sha256_bytes(content), size=len(content))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch says about its own future."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch|export")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
