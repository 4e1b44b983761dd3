"""Programs of `torch.export`: `.pt2` files, which hold the graph and the weights of a network.

    export_program(model, example, "model.pt2", metadata={"classes": [...]})
    network = load_program("model.pt2")            # a module; refuses archives that hold Python code

`torch.export.load` can run code from a file: it unpickles weights and constants, loads compiled libraries, and
evaluates the text of sizes and guards. An untrusted file is therefore compared with the format that `export_program`
writes; anything else is refused before loading.
"""

from __future__ import annotations

import io
import json
import pickle
import re
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
from export.convert.ort import first_line, portions
from export.convert.parity import (
    TOLERANCES,
    Parity,
    compare_outputs,
    gross_difference,
    require,
    worst,
)
from export.convert.to_onnx import as_tuple, frozen_copy, reference_outputs
from export.errors import ExportError
from export.files import read_bytes, sha256_bytes, write_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

METADATA = "metadata.json"
_TRACES = ("stack_trace", "nn_module_stack", "from_node", "source_fn_stack", "torch_fn")
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AssertionError)


LARGEST = 8 << 30
"""Maximum unpacked size of an archive in bytes."""

_CONFIG = re.compile(r"data/(weights|constants)/\w+_(weights|constants)_config\.json")
_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version|\.storage_alignment|"
    r"models/\w+\.json|data/sample_inputs/\w+\.pt|data/weights/weight_\d+|data/constants/tensor_\d+|"
    rf"extra/[\w.-]+|{_CONFIG.pattern}"
)
_TENSOR = re.compile(r"(weight|tensor)_\d+")
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|torchvision)\.(?!from_file)\w+(\.\w+)?|torch\.sym_\w+|math\.\w+|"
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_)"
)
_SIZE = re.compile(r"(Symbol\('\w+'(, (positive|integer|nonnegative)=True)*\)|[su\d]|[-+*/(), ])+")
_GUARD = re.compile(r"(L\['\w+'\](\.size\(\))?(\[\d+\])?|[su\d]|[-+*/%<>=!() ]|and|or|not)+")


@dataclass(frozen=True)
class TorchInfo:
    """The facts of a written file: its path, checksum and size in bytes."""

    path: Path
    sha256: str
    size: int


def _wrong(loaded: nn.Module, model: nn.Module, sample: torch.Tensor, sizes: Sequence[int]) -> str | None:
    """Describe how `loaded` differs from the network for these batch sizes of random inputs; None if it does not."""
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
    """Write `model` as a program of `torch.export`; equal networks give equal files.

    Args:
        model: Takes one float tensor; it is not changed.
        example: A batch (N, C, H, W); its values do not matter.
        path: The file, written atomically.
        batch: Batch sizes; None for that of the example.
        metadata: Facts to store as JSON in the archive's `extra/metadata.json`.

    Raises:
        ExportError: the network cannot be captured or fixes a dynamic batch, or the file cannot be written.
    """
    copied, sample, shapes = frozen_copy(model), example.cpu().float(), None
    if batch is not None:
        # a traced size of 1 would be taken for a constant
        size = max(2, batch.usual) if batch.open else batch.usual
        sample = sample[:1].expand(size, *sample.shape[1:]).contiguous()
        if batch.open:
            shapes = ({0: torch.export.Dim("batch", min=batch.least, max=batch.most)},)
    sizes = [size for size in batch.tried if batch.least <= size <= batch.most] if batch else [len(sample)]
    problem, facts = "", json.dumps(dict(metadata or {}), sort_keys=True)
    # the strict capture interprets the code of forward and understands int(x.shape[0]); the other one is faster and
    # supports more networks
    for strict in (False, True):
        buffer = io.BytesIO()
        try:
            with _quiet(), torch.no_grad():
                program = torch.export.export(copied, (sample,), dynamic_shapes=shapes, strict=strict)
                for node in program.graph.nodes:
                    for key in _TRACES:  # no paths of this machine in the file
                        node.meta.pop(key, None)
                torch.export.save(program, buffer, extra_files={METADATA: facts})
        except (*_FAILURES, torch._dynamo.exc.TorchDynamoException) as error:
            problem = problem or _first_cause(error)
            continue
        if (wrong := _wrong(program.module(), copied, sample, sizes)) is None:
            content = buffer.getvalue()
            write_bytes(Path(path), content)
            return TorchInfo(path=Path(path), sha256=sha256_bytes(content), size=len(content))
        problem = problem or wrong
    raise ExportError(
        f"The network cannot be written by torch.export: {problem}.",
        "Let forward keep the batch as a size (x.flatten(1), x.reshape(x.shape[0], ...)) and take the same path for "
        "every input" + (", or export a fixed batch." if batch and batch.open else "."),
    )


def _first_cause(error: BaseException) -> str:
    """The message of torch.export; of violated constraints the first constraint, not the advice before it."""
    lines = [line.strip().lstrip("- ") for line in str(error).splitlines() if line.lstrip().startswith("- ")]
    return lines[0].rstrip(".") if "Constraints violated" in str(error) and lines else first_line(error)


def load_program(path: str | Path) -> nn.Module:
    """Load a `.pt2` file as a module on the CPU; files that hold code are refused first.

    Raises:
        ExportError: the file is missing, is not a program, or holds more than tensors and a graph of torch's operators.
    """
    content = read_bytes(Path(path), "program")
    try:
        for member, held in require_plain(content, str(path)).items():
            _require_weights_only(held, member, str(path))
        with _quiet():
            loaded: nn.Module = torch.export.load(io.BytesIO(content)).module()
    except (*_FAILURES, AttributeError, zipfile.BadZipFile, EOFError) as error:
        raise ExportError(
            f"{path} is not a program of torch.export: {first_line(error)}.", "Copy it again."
        ) from error
    return loaded


def check_loaded(
    loaded: nn.Module, model: nn.Module, inputs: npt.NDArray[Any], what: str, batch: int = 1
) -> Parity:
    """Compare a loaded program with the network, on real inputs (N, C, H, W) in batches of `batch`.

    Returns:
        The parity of the worst output.

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


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warnings about future versions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch|export")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def require_plain(content: bytes, name: str) -> dict[str, bytes]:
    """Refuse a `.pt2` file that holds more than tensors and a graph of torch operators.

    Args:
        content: The file's bytes.
        name: The file's name in messages.

    Returns:
        Example inputs by member name: pickles, to be loaded by `torch.load` with `weights_only`.

    Raises:
        ExportError: the message names the refused content.
        zipfile.BadZipFile, ValueError: the file is not an archive, or its parts are not valid JSON.
    """
    examples: dict[str, bytes] = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [item.filename for item in archive.infolist()]
        inside = {member.partition("/")[2]: member for member in members}
        if len(inside) != len(members) or len({member.partition("/")[0] for member in members}) > 1:
            raise ExportError(f"{name} has a member twice, or more than one top folder; it was not read.")
        if sum(item.file_size for item in archive.infolist()) > LARGEST:
            raise ExportError(f"{name} unpacks to more than {LARGEST >> 30} GB; it was not read.")
        for short, member in inside.items():
            if not _MEMBERS.fullmatch(short):
                raise ExportError(f"{name} holds {member!r}, which no exported network has; it was not read.")
            if _CONFIG.fullmatch(short):
                _require_tensors(json.loads(archive.read(member)), name)
            elif short.startswith("models/"):
                _require_operators(json.loads(archive.read(member)), name)
            elif short.startswith("data/sample_inputs/"):
                examples[member] = archive.read(member)
    return examples


def _require_tensors(config: Any, name: str) -> None:
    for entry in config["config"].values():
        if entry.get("use_pickle") is not False or not _TENSOR.fullmatch(entry["path_name"]):
            raise ExportError(f"{name} holds pickled tensors; it was not read.")


def _require_operators(program: Any, name: str) -> None:
    for part in _objects(program):
        if "target" in part and "inputs" in part and not _OPERATOR.fullmatch(str(part["target"])):
            raise ExportError(f"{name} calls {part['target']!r}, which is not an operator of a network.")
        for text, allowed in [(part.get("expr_str"), _SIZE), *((one, _GUARD) for one in _guards(part))]:
            if text is not None and not allowed.fullmatch(str(text)):
                raise ExportError(f"{name} holds code in place of a size: {str(text)[:80]!r}.")


def _guards(part: dict[str, Any]) -> list[Any]:
    found = part.get("guards_code") or []
    return found if isinstance(found, list) else [found]


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Iterate over all objects of a JSON document, at any depth."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
