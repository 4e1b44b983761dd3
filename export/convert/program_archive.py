"""Checks that a `.pt2` file holds only tensors and a graph of torch operators.

`torch.export.load` can run code from a file: it unpickles weights and constants, loads compiled libraries, and
evaluates the text of sizes and guards. An untrusted file is therefore compared with the format that
`export.convert.torch_formats.export_program` writes; anything else is refused before loading.
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
