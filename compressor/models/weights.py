"""Weights from files: read without running anything, and fitted to a network or refused with the reason."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor import progress
from compressor.errors import CompressorError
from compressor.models.head import head_of

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 3
FRESH_HEAD = "compressor_fresh_head"
"""Attribute of a network whose weights were for other classes, so that its last layer starts untrained."""


def load_weights(model: nn.Module, path: Path, num_classes: int) -> None:
    """Load a file of weights into `model`, in situ; only the head may differ, and then stays fresh.

    Raises:
        CompressorError: the file cannot be read, holds more than tensors, or does not fit.
    """
    fit_state(model, read_weights(path), str(path), num_classes)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a .safetensors file or from what `torch.save` wrote.

    Accepts {"state_dict": ...} and {"model": ...} around it and the prefix "module." of data-parallel
    training. Pickled objects other than tensors are refused without being built.

    Raises:
        CompressorError: missing, damaged, unsafe, or no state dict.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CompressorError(
            f"The weights {path} {what}; expected 'default', 'none' or a file.", "Check --weights."
        )
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in _WRAPPERS:
        if isinstance(raw, Mapping) and isinstance(raw.get(wrapper), Mapping):
            raw = raw[wrapper]
            break
    if not isinstance(raw, Mapping) or not raw:
        raise CompressorError(f"{path} holds a {type(raw).__name__}, expected a dict of tensors.", _SAVE)
    wrong = [str(key) for key, value in raw.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise CompressorError(f"{path} should hold tensors only, but {_some(wrong)} are none.", _SAVE)
    if unusual := [
        str(key)
        for key, value in raw.items()
        if value.is_meta or value.is_nested or value.is_quantized or value.layout != torch.strided
    ]:
        raise CompressorError(
            f"{path} holds tensors that are sparse, quantised or without values: {_some(unusual)}.", _SAVE
        )
    state = {_plain(str(key)): value for key, value in raw.items()}
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CompressorError(
            f"{path} holds NaN or infinite numbers in {_some(broken)}.",
            "Take a checkpoint from before they appeared.",
        )
    return state


_SAVE = "Write such a file with: torch.save(model.state_dict(), FILE)"


def _plain(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.partition(".")[2]
    return key


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CompressorError(
            f"{path} is unreadable as safetensors: {error}.", "It may be cut short."
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is refused or fits anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        raise CompressorError(
            f"{path} is refused: it holds more than tensors, and reading it could run code. {reason}".strip(),
            f"If you trust its source, convert it where it was made. {_SAVE}",
        ) from error
    except Exception as error:  # a damaged file raises whatever its pieces make of it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        mend = f"It may be cut short. {_SAVE}"
        raise CompressorError(f"{path} cannot be read as weights: {reason}.", mend) from error


def fit_state(model: nn.Module, state: Mapping[str, torch.Tensor], origin: str, num_classes: int) -> None:
    """Copy `state` into `model`; a head of another number of classes is left out, and that is said.

    Raises:
        CompressorError: other keys are missing, unexpected or of another shape; the model is unchanged then.
    """
    own = model.state_dict()
    head = head_of(model)
    misfits = [key for key in own if key in state and own[key].shape != state[key].shape]
    replaced = [key for key in misfits if head is not None and key.rpartition(".")[0] == head]
    fresh_head = bool(replaced) and all(
        own[key].shape[1:] == state[key].shape[1:] and own[key].shape[0] == num_classes for key in replaced
    )
    shaped = [key for key in misfits if not (fresh_head and key in replaced)]
    # Checkpoints from before torch 0.4.1 do not count their batches; nothing that we do needs the count.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected or shaped:
        raise CompressorError(
            f"{origin} does not fit the model: {_misfit(own, state, missing, unexpected, shaped)}.",
            "Give the weights of this very architecture, or --weights none.",
        )
    if fresh_head:
        setattr(model, FRESH_HEAD, True)
        classes = state[replaced[0]].shape[0]
        progress.say(f"{origin} is for {classes} classes: {head} starts fresh with {num_classes}.")
    fitting = {key: value for key, value in state.items() if not (fresh_head and key in replaced)}
    model.load_state_dict(fitting, strict=False)


def _misfit(
    own: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    missing: Sequence[str],
    unexpected: Sequence[str],
    shaped: Sequence[str],
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(own)} keys are missing ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} keys are unexpected ({_some(unexpected)})")
    if shaped:
        shapes = [f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}" for key in shaped]
        parts.append(f"{len(shaped)} keys have another shape ({_some(shapes)})")
    return "; ".join(parts)


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
