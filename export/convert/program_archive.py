"""Is a `.pt2` file only tensors and a graph of torch's own operators?

`torch.export.load` runs what a file brings: it unpickles weights and constants that say so, or that come in an older
form, loads compiled libraries, and evaluates the text of sizes and guards. A file from elsewhere is therefore held
against what `export.convert.torch_formats.export_program` writes, and anything else in it is refused before it is
loaded.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

from export.errors import ExportError

LARGEST = 8 << 30
"""Bytes that an archive may unpack to."""

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


def require_plain(content: bytes, name: str) -> dict[str, bytes]:
    """Refuse a `.pt2` file that holds more than tensors and a graph of torch's operators.

    Args:
        content: The file's bytes.
        name: What messages call it.

    Returns:
        Example inputs by their members' names: pickles, which `torch.load` must take with `weights_only`.

    Raises:
        ExportError: saying what it holds.
        zipfile.BadZipFile, ValueError: it is no archive, or its parts are no JSON.
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
            raise ExportError(f"{name} calls {part['target']!r}, which is no operator of a network.")
        for text, allowed in [(part.get("expr_str"), _SIZE), *((one, _GUARD) for one in _guards(part))]:
            if text is not None and not allowed.fullmatch(str(text)):
                raise ExportError(f"{name} holds code where a size belongs: {str(text)[:80]!r}.")


def _guards(part: dict[str, Any]) -> list[Any]:
    found = part.get("guards_code") or []
    return found if isinstance(found, list) else [found]


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON document, however deep."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
