"""Load weight files into a network, or report why they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.core import progress
from compressor.core.errors import CompressorError
from compressor.models.checkpoint import SAVE, Entry, State, entries, is_average, read_file

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that torch.compile and the wrappers of distributed training insert, at any depth."""

_LEFTOVERS = frozenset({"total_ops", "total_params", "n_averaged"})
"""Counters that thop and torch's AveragedModel leave in state dicts."""

_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_SHOWN = 3

FRESH_HEAD = "compressor_fresh_head"
"""Attribute of a network whose last layer is untrained: the number of classes that its weights were for."""

Heads = Callable[[], Collection[str]]
Say = Callable[[str], None]


def load_weights(
    model: nn.Module,
    path: Path,
    num_classes: int,
    heads: Heads | None = None,
    say: Say = progress.say,
    adapted: Callable[[State], State] = lambda state: state,
) -> None:
    """Load a file of weights into `model`, in place.

    If the file has averages over training beside the trained weights, the averages are used, with a message.
    Names may have a prefix (`module.`, `model.`, `net.`, ...): the one with the whole network is found.

    Args:
        model: Network on the CPU.
        path: .safetensors, or a `torch.save` file; `read_file` says what it may hold.
        num_classes: Outputs of the model.
        heads: Returns the names of the layers that compute the output, which may be of other classes and then stay
            untrained; called only if shapes differ. None allows no difference.
        say: Receives a sentence about what was used.
        adapted: Changes the weights that were found before they are loaded; it may leave out an auxiliary head.

    Raises:
        CompressorError: The file cannot be read, holds something else, or does not fit; the model is then unchanged.
    """
    own = model.state_dict()
    found = [each for entry in entries(read_file(path), path) for each in _aligned(_renamed(model, entry), own)]
    state, notes = _choose(found)
    for note in notes:
        say(f"{path}: {note}")
    fit_state(model, adapted(state), str(path), num_classes, heads, say)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file, by the names of the saved network: the average if there is one.

    Raises:
        CompressorError: The file cannot be read, or holds anything but finite tensors.
    """
    entry = entries(read_file(path), path)[0]
    tensors = {key: _dense(key, value, str(path)) for key, value in entry.state.items()}
    _check_finite(tensors, str(path))
    plain = {_unwrapped(key): value for key, value in tensors.items()}
    while plain and all(key.startswith("module.") or key in _LEFTOVERS for key in plain):
        plain = {key.removeprefix("module."): value for key, value in plain.items() if key not in _LEFTOVERS}
    return plain


@dataclass(frozen=True)
class _Aligned:
    """A state dict under the model's own names."""

    entry: Entry
    state: State
    prefix: str
    average: bool
    left_out: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def where(self) -> str:
        """Position in the file, for messages."""
        return ".".join(part for part in (self.entry.where, self.prefix.rstrip(".")) if part) or "the whole file"


def _choose(found: Sequence[_Aligned]) -> tuple[State, list[str]]:
    """Choose a file's state dict: the first average that fits, else the first trained one; and what to say about it."""
    averages = [each for each in found if each.average]
    trained = [each for each in found if not each.average]
    raw = next(filter(_fits, trained), trained[0] if trained else None)
    chosen = next((each for each in averages if _fits(_completed(each, raw))), None)
    notes = []
    if chosen is not None:
        beside = f", not those of the last step beside them ({raw.where})" if raw is not None else ""
        notes.append(f"the weights averaged over training ({chosen.where}) are used{beside}.")
        completed = _completed(chosen, raw)
        if completed is not chosen and raw is not None:
            notes.append(f"the average has no running statistics; they are those of {raw.where}.")
        chosen = completed
    elif raw is not None:
        if averages:
            notes.append(f"the averaged weights ({averages[0].where}) do not fit the network; {raw.where} is used.")
        chosen = raw
    else:
        chosen = averages[0]
    if chosen.left_out:
        notes.append(f"{len(chosen.left_out)} tensors beside the network are left out ({some(chosen.left_out)}).")
    return chosen.state, notes


def _fits(found: _Aligned) -> bool:
    return all(key.endswith("num_batches_tracked") for key in found.missing)


def _completed(average: _Aligned, raw: _Aligned | None) -> _Aligned:
    """Complete an average of the parameters with the buffers that were trained beside it."""
    if raw is None or not average.missing:
        return average
    if not all(key.rpartition(".")[2] in _STATISTICS and key in raw.state for key in average.missing):
        return average
    state = {**average.state, **{key: raw.state[key] for key in average.missing}}
    return _Aligned(average.entry, state, average.prefix, True, average.left_out, ())


def _renamed(model: nn.Module, entry: Entry) -> Entry:
    """Rename the entry with the model's own hooks for older state dicts (for example weight norm's)."""
    state = {_unwrapped(key): value for key, value in entry.state.items()}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for hook in module._load_state_dict_pre_hooks.values():
            hook(state, prefix, {}, True, [], [], [])
    return Entry(entry.where, entry.average, state)


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _aligned(entry: Entry, own: Mapping[str, Tensor]) -> list[_Aligned]:
    """Return the matches of the model's names in an entry: under the prefixes with most of them, averages first."""
    state = {key: value for key, value in entry.state.items() if key in own or key.rpartition(".")[2] not in _LEFTOVERS}
    counts = {prefix: sum(f"{prefix}{key}" in state for key in own) for prefix in _prefixes(state, own)}
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most]
    best.sort(key=lambda prefix: (not is_average(prefix), prefix != "", len(prefix)))
    if any(map(is_average, best)):  # one state dict with a network and its average, each under a prefix
        best = [*(prefix for prefix in best if is_average(prefix)), *(p for p in best if not is_average(p))]
    elif "" not in best and len(best) > 1 and most == len(own):
        raise CompressorError(
            f"The weights hold several such networks, under {', '.join(best[:5])}.",
            f"Save the one that you need in a file of its own. {SAVE}",
        )
    else:
        best = best[:1]
    found = []
    for prefix in best or [""]:
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        outside = tuple(key for key in state if not key.startswith(prefix) and not _inside(key, best))
        missing = tuple(key for key in own if key not in inside)
        found.append(_Aligned(entry, inside, prefix, entry.average or is_average(prefix), outside, missing))
    return found


def _inside(key: str, prefixes: Sequence[str]) -> bool:
    return any(prefix and key.startswith(prefix) for prefix in prefixes)


def _prefixes(state: State, own: Mapping[str, Tensor]) -> list[str]:
    names = list(own)
    anchors = {names[0], names[len(names) // 2], names[-1]} if names else set()
    found = {""}
    for key in state:
        found.update(key[: -len(anchor)] for anchor in anchors if key.endswith(f".{anchor}"))
    return sorted(found)


def _dense(key: str, value: object, origin: str) -> Tensor:
    """Return a plain tensor with values, or raise an error for anything else."""
    if not isinstance(value, Tensor):
        raise CompressorError(f"{origin} should hold tensors only, but {key} is a {type(value).__name__}.", SAVE)
    if value.is_meta:
        what = "has a shape, but no values (it was saved on the meta device)"
    elif value.is_nested or value.layout != torch.strided:
        what = "is a sparse or nested tensor"
    elif value.is_quantized:
        what = "is quantised"
    else:
        return value
    raise CompressorError(f"{origin}: {key} {what}.", f"Give the float weights, on the CPU. {SAVE}")


def _check_finite(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Raise an error for weights that are not finite; of expanded tensors only the stored values are checked."""
    broken = []
    for key, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            stored = tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]
            if not torch.isfinite(stored.float() if stored.itemsize == 1 else stored).all():
                broken.append(key)
    if broken:
        raise CompressorError(
            f"{origin} holds NaN or infinite numbers in {some(broken)}.", "Use a checkpoint from before they appeared."
        )


def fit_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    origin: str,
    num_classes: int,
    heads: Heads | None = None,
    say: Say = progress.say,
) -> None:
    """Copy `state`, which has the model's names, into it; `heads` and `say` as in `load_weights`.

    Raises:
        CompressorError: Other keys are missing, unexpected or of another shape; the model is then unchanged.
    """
    own = model.state_dict()
    given = {key: _dense(key, value, origin) for key, value in state.items()}
    misfits = [key for key in own if key in given and own[key].shape != given[key].shape]
    made = [name for name in (heads() if heads is not None and misfits else ())]
    fresh = {
        name: [key for key in misfits if key.startswith(f"{name}.")]
        for name in made
        if _of_other_classes([(own[key], given[key]) for key in misfits if key.startswith(f"{name}.")], num_classes)
    }
    left = {key for keys in fresh.values() for key in keys}
    shaped = [key for key in misfits if key not in left]
    # Checkpoints from before torch 0.4.1 do not count their batches; the count is not needed here.
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in own]
    typed = [key for key in given if key in own and own[key].is_floating_point() and not given[key].is_floating_point()]
    if missing or unexpected or shaped or typed:
        raise CompressorError(
            f"{origin} does not fit the model: {_misfit(own, given, missing, unexpected, shaped, typed)}.",
            "Use weights of exactly this architecture, or --weights none.",
        )
    fitting = {key: value for key, value in given.items() if key not in left}
    _check_finite(fitting, origin)
    if fresh:
        setattr(model, FRESH_HEAD, int(given[min(left)].shape[0]))
    for name, keys in fresh.items():
        say(f"{origin} is for {given[keys[0]].shape[0]} classes: {name} starts fresh with {num_classes}.")
    model.load_state_dict(fitting, strict=False)


def _of_other_classes(pairs: Sequence[tuple[Tensor, Tensor]], num_classes: int) -> bool:
    """Return whether tensors (own, given) of a layer differ in the number of classes alone, their first axis."""
    return bool(pairs) and all(
        mine.dim() > 0
        and mine.dim() == other.dim()
        and mine.shape[1:] == other.shape[1:]
        and mine.shape[0] == num_classes
        for mine, other in pairs
    )


def _misfit(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    missing: Sequence[str],
    unexpected: Sequence[str],
    shaped: Sequence[str],
    typed: Sequence[str],
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(own)} keys are missing ({some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} keys are unexpected ({some(unexpected)})")
    if shaped:
        shapes = [f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}" for key in shaped]
        parts.append(f"{len(shaped)} keys have another shape ({some(shapes)})")
    if typed:
        types = [f"{key} is {str(state[key].dtype).removeprefix('torch.')}" for key in typed]
        parts.append(f"{len(typed)} keys hold no real numbers ({some(types)})")
    return "; ".join(parts)


def some(items: Sequence[str]) -> str:
    """Format the first of many names, and the number of the remaining ones."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(item[:200] for item in items[:_SHOWN]) + more
