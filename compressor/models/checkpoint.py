"""Read weight files without running code, and list the state dicts in them, the preferred one first."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.core.errors import CompressorError

State = Mapping[str, Any]

SAVE = "Write such a file with: torch.save(model.state_dict(), FILE)"

_RAW = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "params", "module")
_AVERAGE = re.compile(r"(^|[_.\-])(ema|swa|avg|averaged?|average|shadow|polyak)($|[_.\-\d])")
_BESIDE = re.compile(
    r"optim|sched|scaler|loop|callback|criterion|loss|hparam|hyper_param|config|args|rng", re.IGNORECASE
)
_DEPTH = 4


@dataclass(frozen=True)
class Entry:
    """One state dict of a file.

    Attributes:
        where: Its keys from the outside in, such as "model_ema"; empty if it is the whole file.
        average: Whether its name says that it is an average over training.
        state: Name -> what should be a tensor.
    """

    where: str
    average: bool
    state: State


def read_file(path: Path) -> Any:
    """Return the content of a .safetensors file, or of a `torch.save` file, with its tensors on the CPU.

    Pickled objects other than tensors and plain containers are never built: well-known types beside the weights
    (`_BYSTANDERS`) become placeholders, and any other type is an error.

    Raises:
        CompressorError: The file is missing or damaged, or has objects that reading would have to build.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise CompressorError(f"The weights file {path} {what}; expected default, none or a file.", "Check --weights.")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise CompressorError(f"{path} cannot be read: {error.strerror or error}.", "Check --weights.") from error
    if path.suffix == ".safetensors" or (start[8:9] == b"{" and start[6:8] == b"\0\0"):
        return _read_safetensors(path)
    return _read_torch(path)


def _read_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # a damaged header may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise CompressorError(f"{path} is unreadable as safetensors: {reason}.", "It may be cut short.") from error


def _read_torch(path: Path) -> Any:
    _check_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(_BYSTANDERS)):
            warnings.simplefilter("ignore")  # of the pickle's protocol, say: the file is refused or fits anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader may raise anything for a damaged file
        text = str(error)
        if found := re.search(r"GLOBAL (\S+)", text):
            raise _needs_code(path, found.group(1).rstrip(".")) from error
        if "TorchScript" in text:
            raise CompressorError(
                f"{path} is a TorchScript archive, which holds code.",
                "Save its weights where it was created: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)",
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise CompressorError(
                f"{path} is rejected: it holds more than tensors, or is damaged, and reading it could run code.",
                f"If you trust its source, convert it where it was created. {SAVE}",
            ) from error
        reason = (text.splitlines() or [""])[0][:300] or type(error).__name__
        raise CompressorError(
            f"{path} cannot be read as weights: {reason.rstrip('.')}.", f"It may be cut short. {SAVE}"
        ) from error


def _check_archive(path: Path) -> None:
    """Reject archives with compressed members: torch never writes them, and a small file could unpack to any size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [each.filename for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED]
            size = sum(each.file_size for each in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError):
        return  # torch's reader reports what is wrong with it
    if packed or size > path.stat().st_size:
        raise CompressorError(f"{path} is a zip archive, but not one that torch.save writes.", SAVE)


def _needs_code(path: Path, name: str) -> CompressorError:
    """Return the error for a file with an object that would have to be built by its own code."""
    try:
        every = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {known for _, known in _BYSTANDERS}
    except Exception:  # older formats do not list their types
        every = {name}
    names = sorted({name, *every})
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return CompressorError(
        f"{path} is rejected: it holds {shown} beside tensors, and building that could run code.",
        "If you trust its source, save the weights alone where it was created: "
        "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE), with the key that the file has; "
        "or of a whole module: torch.save(model.state_dict(), NEW_FILE)",
    )


class Bystander:
    """Placeholder of an object beside the weights: accepts any arguments and stores none."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        """Store nothing."""

    def __setstate__(self, _state: Any) -> None:
        """Store nothing."""


class _BystanderDict:
    """Placeholder of a dictionary class: builds a plain dict, which torch's reader can fill."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        return OrderedDict()


def _names(text: str) -> list[str]:
    found = []
    for line in text.split():
        module, _, names = line.partition(":")
        found += [f"{module}.{name}" for name in names.split(",")]
    return found


_OBJECTS = _names(
    """
    argparse:Namespace types:SimpleNamespace builtins:int,float,bool,str,list,dict,tuple,object,slice typing:Any
    pathlib:Path,PosixPath,WindowsPath,PurePath,PurePosixPath,PureWindowsPath
    pathlib._local:Path,PosixPath,WindowsPath,PurePath,PurePosixPath,PureWindowsPath
    datetime:datetime,date,time,timedelta,timezone uuid:UUID
    numpy:dtype,ndarray numpy._core.multiarray:scalar,_reconstruct numpy.core.multiarray:scalar,_reconstruct
    numpy._core.numeric:_frombuffer numpy.core.numeric:_frombuffer
    numpy.dtypes:Float16DType,Float32DType,Float64DType,LongDoubleDType,BoolDType,StrDType,BytesDType,ObjectDType
    numpy.dtypes:Int8DType,Int16DType,Int32DType,Int64DType,UInt8DType,UInt16DType,UInt32DType,UInt64DType
    omegaconf.dictconfig:DictConfig omegaconf.listconfig:ListConfig omegaconf.base:ContainerMetadata,Metadata
    omegaconf.nodes:AnyNode,ValueNode,IntegerNode,FloatNode,StringNode,BooleanNode,PathNode
    """
)
_DICTS = _names(
    """
    collections:defaultdict lightning_fabric.utilities.data:AttributeDict lightning.fabric.utilities.data:AttributeDict
    pytorch_lightning.utilities.parsing:AttributeDict lightning.pytorch.utilities.parsing:AttributeDict
    yacs.config:CfgNode easydict:EasyDict addict.addict:Dict
    """
)
_BYSTANDERS: list[tuple[Callable[..., Any], str]] = [
    *((type(name, (Bystander,), {}), name) for name in _OBJECTS),
    *((type(name, (_BystanderDict,), {}), name) for name in _DICTS),
]
"""Types of trainers' records (arguments, metrics, paths, configurations): placeholder, name in the file. None of their
own code runs: torch's reader builds the placeholder instead."""


def entries(raw: Any, path: Path) -> list[Entry]:
    """Return the state dicts in a file: averages over training first, then the trained ones.

    Raises:
        CompressorError: There is none, or the file has several networks.
    """
    if not isinstance(raw, Mapping) or not raw:
        raise CompressorError(f"{path} holds a {type(raw).__name__}, expected a dict of tensors.", SAVE)
    averages = list(_averages(raw, "", _DEPTH))
    rest = _trained(raw, "", _DEPTH)
    others = [entry for entry in rest if not any(entry.state is each.state for each in averages)]
    if not averages and len(others) > 1:
        names = ", ".join(entry.where for entry in others[:5])
        raise CompressorError(
            f"{path} holds several networks: {names}.", "Save the one that you need in a file of its own. " + SAVE
        )
    if not averages and not others:
        keys = ", ".join(str(key) for key in list(raw)[:4])[:200]
        raise CompressorError(f"{path} holds no tensors by name (its keys: {keys}).", SAVE)
    return [*averages, *others]


def is_average(key: str) -> bool:
    """Return whether a name says that its value is an average of weights over training."""
    return "EMA" in key or _AVERAGE.search(key.lower()) is not None


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values())


def _is_state(value: Any) -> bool:
    """Return whether most of a mapping's values are tensors under names."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(key, str) for key in value):
        return False
    return sum(isinstance(each, Tensor) for each in value.values()) * 2 > len(value)


def _averages(raw: State, where: str, depth: int) -> Iterator[Entry]:
    """Yield averages, recognized by their names."""
    for key, value in raw.items():
        if not isinstance(value, Mapping) or not isinstance(key, str) or depth == 0:
            continue
        if is_average(key):
            yield from (Entry(each.where, True, each.state) for each in _trained({key: value}, where, depth))
        elif not _holds_tensors(value):
            yield from _averages(value, f"{where}{key}.", depth - 1)


def _trained(raw: State, where: str, depth: int) -> list[Entry]:
    """Return the state dicts of a mapping: itself, else those under the usual names, else all of its parts."""
    if _is_state(raw):
        return [Entry(where.rstrip("."), False, raw)]
    if depth == 0:
        return []
    parts = {key: value for key, value in raw.items() if isinstance(key, str) and isinstance(value, Mapping)}
    for name in _RAW:
        if name in parts and (found := _trained(parts[name], f"{where}{name}.", depth - 1)):
            return found
    found = []
    for key, value in parts.items():
        if not _BESIDE.search(key):
            found += _trained(value, f"{where}{key}.", depth - 1)
    if not found and _holds_tensors(raw):  # tensors among other values; the others are reported later
        return [Entry(where.rstrip("."), False, raw)]
    return found
