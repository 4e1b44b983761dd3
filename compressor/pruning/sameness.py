"""Compares two networks with the same tensors by the operations of one forward pass, whatever their weights are.

Tensors of equal shapes do not make the same network: activations, dilations, constants and constructor arguments differ
without them. Here each network runs once, and every operation must have the same numbers as arguments and read the same
parameters, buffers and results of earlier operations. Tensors from elsewhere must have the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from compressor.pruning.skeleton import named_tensors, walk
from export.convert.trees import mapped, outputs_of, tensors_in


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations of a pass, each with its arguments: tensors by what made them, other values as they are.

    Args:
        known: Name -> tensor that is there before the pass.
    """

    def __init__(self, known: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[str] = []
        self.constants: list[Tensor] = []
        self._names = WeakTensorKeyDictionary()
        for name, tensor in known.items():
            self._names[tensor] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = mapped(self.name, (tuple(args), dict(kwargs or {})))
        out = func(*args, **(kwargs or {}))
        for index, tensor in enumerate(tensors_in(out)):
            self._names[tensor] = f"{len(self.steps)}.{index}"
        self.steps.append(f"{func}{read}")
        return out

    def name(self, tensor: Tensor) -> str:
        """Return a tensor's name; one that nothing in the pass has made is kept as a constant."""
        if tensor not in self._names:
            self._names[tensor] = f"constant {len(self.constants)}"
            self.constants.append(tensor.detach().cpu().clone())
        return str(self._names[tensor])


def difference(one: nn.Module, other: nn.Module, inputs: tuple[Any, ...] | None) -> str:
    """Describe the first difference of two networks as a clause; empty if there is none.

    Without inputs, or if `one` does not run on them, only the classes of the modules are compared.

    Args:
        one, other: Networks in eval mode, whose parameters and buffers have the same names and values. They run, and
            may keep what a pass keeps.
        inputs: Positional arguments of both.
    """
    try:
        expected = None if inputs is None else _recorded(one, inputs)
    except Exception:  # user code may raise anything, such as an operation that its type of numbers lacks
        expected = None
    if expected is None or inputs is None:
        return _other_class(one, other)
    try:
        found = _first(expected, _recorded(other, inputs))
        if found:  # what a first pass computes and keeps, a second one reads
            found = _first(_recorded(one, inputs), _recorded(other, inputs))
    except Exception as error:
        return f"it fails: {type(error).__name__}: {error}"
    return found


def _recorded(model: nn.Module, inputs: tuple[Any, ...]) -> _Recorder:
    """Run a network on copies of inputs, on its device and in its type of numbers."""
    first = next((each for each in model.parameters() if each.is_floating_point()), None)
    device = None if first is None else first.device

    def fitted(tensor: Tensor) -> Tensor:
        dtype = first.dtype if first is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(device, dtype, copy=True)

    given = mapped(fitted, inputs)
    own = {f"input {index}": tensor for index, tensor in enumerate(tensors_in(given))}
    recorder = _Recorder({**named_tensors(model), **own})
    with torch.random.fork_rng(devices=[]), torch.no_grad(), recorder:
        out = model(*given)
    recorder.steps.append(f"output{[recorder.name(tensor) for tensor in outputs_of(out)]}")
    return recorder


def _first(one: _Recorder, other: _Recorder) -> str:
    for expected, found in zip(one.steps, other.steps, strict=False):
        if expected != found:
            return f"it computes {_short(found)} instead of {_short(expected)}"
    if len(one.steps) != len(other.steps):
        return f"it runs {len(other.steps)} operations instead of {len(one.steps)}"
    for known, value in zip(one.constants, other.constants, strict=True):
        if known.shape != value.shape or known.dtype != value.dtype or not _close(known, value):
            return (
                f"a tensor of shape {list(value.shape)} that is neither a parameter nor a buffer has other values each "
                "time, or depends on arguments"
            )
    return ""


def _close(one: Tensor, other: Tensor) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=1e-5, atol=1e-8, equal_nan=True)


def _short(step: str) -> str:
    return step if len(step) <= 120 else f"{step[:117]}..."


def _other_class(one: nn.Module, other: nn.Module) -> str:
    expected, found = ({path: _kind(module) for path, module in walk(each)} for each in (one, other))
    for path in expected.keys() | found.keys():
        if expected.get(path) != found.get(path):
            return f"'{path}' is {found.get(path, 'missing')} instead of {expected.get(path, 'missing')}"
    return ""


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
