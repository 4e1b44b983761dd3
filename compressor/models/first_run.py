"""Run one blank image through a new network, so that a mismatch is reported early, with its cause."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.core.importing import raised_at
from compressor.models.head import LAYERS, Makers, Recorder

Shape = tuple[int, int, int]
"""(channels, height, width) of one image."""

_SIZES = (28, 32, 48, 64, 75, 96, 112, 128, 160, 192, 224, 256, 299, 320, 384, 448, 512)
"""Heights and widths that are tried to find the size that a network needs."""

_FIRST: tuple[type[nn.Module], ...] = (*LAYERS, nn.Embedding, nn.RNNBase, nn.modules.conv._ConvTransposeNd)
_INPUTS = {
    nn.Conv1d: "sequences",
    nn.Conv3d: "volumes or video clips",
    nn.Embedding: "whole numbers such as those of tokens",
    nn.RNNBase: "sequences",
}


def run_first(model: nn.Module, name: str, shape: Shape) -> tuple[Tensor, Makers]:
    """Return the output (1, classes) of a network for one blank image, and the layers that compute it.

    The network runs in evaluation mode.

    Raises:
        CompressorError: The network does not run on such an image, or returns something else; the message names the
            cause.
    """
    _check_runnable(model, name)
    model.eval()
    recorder, trail = Recorder(model), _Trail()
    with torch.random.fork_rng(devices=[]):
        try:
            with trail.watching(model), recorder.watching():
                out = model(torch.zeros(1, *shape))
        except Exception as error:  # the network's code may raise anything
            raise _cause(model, name, shape, error, trail) from error
    _check_output(out, name)
    return out, recorder.makers(out)


def _check_runnable(model: nn.Module, name: str) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise CompressorError(
            f"{name} gives a scripted module, which hides its structure.",
            "Have the factory return the original module.",
        )
    forward = getattr(type(model).forward, "__name__", "")
    if forward == "_forward_unimplemented":
        raise CompressorError(
            f"{name} gives a {type(model).__name__} without a forward of its own.",
            "Name a class that computes something.",
        )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = [each for each, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise CompressorError(
            f"{name} gives a network on the meta device, without values: {meta[0]}.",
            "Have the factory build it on the CPU.",
        )
    needed = [
        each.name
        for each in inspect.signature(model.forward).parameters.values()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if len(needed) != 1 and not (not needed and _takes_one(model)):
        what = f"takes {len(needed)} inputs ({', '.join(needed)})" if needed else "takes no input"
        raise CompressorError(
            f"The forward of {name} {what}; it is called with one batch of images.",
            "Have the factory return a network of one input, or give the others defaults.",
        )


def _takes_one(model: nn.Module) -> bool:
    kinds = [each.kind for each in inspect.signature(model.forward).parameters.values()]
    return any(
        kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds
    )


class _Trail:
    """Records which modules a run enters, with the shapes of their inputs."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.first: tuple[str, nn.Module, tuple[int, ...]] | None = None

    def watching(self, model: nn.Module) -> Any:
        from contextlib import ExitStack

        stack = ExitStack()
        for path, module in model.named_modules():
            for handle in (
                module.register_forward_pre_hook(self._entering(path)),
                module.register_forward_hook(self._leaving),
            ):
                stack.callback(handle.remove)
        return stack

    def _entering(self, path: str) -> Any:
        def note(module: nn.Module, inputs: Any) -> None:
            self.open.append(path)
            if self.first is None and isinstance(module, _FIRST) and inputs and isinstance(inputs[0], Tensor):
                self.first = (path, module, tuple(inputs[0].shape))

        return note

    def _leaving(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self.open.pop()


def _cause(model: nn.Module, name: str, shape: Shape, error: Exception, trail: _Trail) -> CompressorError:
    """Find out why the network fails, from the inputs that it does accept."""
    lines = str(error).splitlines() or [""]
    where = f" in its module {trail.open[-1]!r}" if trail.open and trail.open[-1] else ""
    reason = f"{type(error).__name__}{where}: {lines[0][:300]}{raised_at(error)}"
    floats = {each.dtype for each in model.parameters() if each.is_floating_point()}
    if others := sorted(str(each).removeprefix("torch.") for each in floats - {torch.float32}):
        return CompressorError(
            f"{name} has weights in {', '.join(others)}, and cannot take images in float32: {reason}.",
            "Have the factory return model.float(); the precision on the device is chosen by --precision.",
        )
    devices = {str(each.device) for each in (*model.parameters(), *model.buffers())}
    if len(devices) > 1 or ("device" in lines[0] and "cuda" in lines[0]):
        return CompressorError(
            f"{name} computes on several devices ({', '.join(sorted(devices))}): {reason}.",
            "Have the factory build the network on the CPU; it is moved to the GPU where there is one.",
        )
    return (
        _other_inputs(model, name, shape, trail)
        or _other_channels(model, name, shape, reason, trail)
        or _other_size(model, name, shape, reason)
        or CompressorError(
            f"{name} fails on one image of {_text(shape)}: {reason}.",
            "It must run on float32 images of that shape in evaluation mode: try model.eval()(torch.zeros"
            f"(1, {', '.join(map(str, shape))})).",
        )
    )


def _other_inputs(model: nn.Module, name: str, shape: Shape, trail: _Trail) -> CompressorError | None:
    if trail.first is None:
        return None
    path, layer, given = trail.first
    kind = next((kind for kind in _INPUTS if isinstance(layer, kind)), None)
    if kind is not None:
        return CompressorError(
            f"{name} takes {_INPUTS[kind]}, not images: its first layer {path!r} is a {type(layer).__name__}.",
            "Only networks of images can be compressed.",
        )
    if isinstance(layer, nn.Linear) and given[1:] == shape and _runs(model, (layer.in_features,)):
        return CompressorError(
            f"{name} takes vectors of {layer.in_features} numbers, not images of {_text(shape)}: its first layer "
            f"{path!r} is a Linear.",
            "Flatten the images first, for instance by nn.Flatten().",
        )
    return None


def _other_channels(
    model: nn.Module, name: str, shape: Shape, reason: str, trail: _Trail
) -> CompressorError | None:
    layer = trail.first[1] if trail.first is not None else None
    expected = getattr(layer, "in_channels", shape[0])
    if not isinstance(expected, int) or expected == shape[0] or trail.first is None:
        return None
    if trail.first[2][1:] != shape:  # the layer's input is no longer the image
        return None
    size = next((size for size in (shape[1:], *_sizes(shape)) if _runs(model, (expected, *size))), None)
    if size is None and "channels" not in reason:
        return None
    also = f" of {size[0]}x{size[1]}" if size is not None and size != shape[1:] else ""
    return CompressorError(
        f"{name} takes images of {expected} channel{'s' * (expected != 1)}{also}, but the data have {shape[0]} "
        f"(images of {_text(shape)}).",
        f"Its first layer is {trail.first[0]!r}. Have the factory build it for {shape[0]} channels, or give data that "
        f"have {expected}.",
    )


def _other_size(model: nn.Module, name: str, shape: Shape, reason: str) -> CompressorError | None:
    for height, width in _sizes(shape):
        if _runs(model, (shape[0], height, width)):
            return CompressorError(
                f"{name} cannot take images of {_text(shape)}: {reason}.",
                f"It runs on {shape[0]}x{height}x{width}: --image-size {height}",
            )
    return None


def _sizes(shape: Shape) -> Sequence[tuple[int, int]]:
    """Return other sizes: larger ones first, the closest first."""
    larger = [size for size in _SIZES if size > max(shape[1:])]
    smaller = [size for size in reversed(_SIZES) if size < min(shape[1:])]
    return [(size, size) for size in (*larger, *smaller)]


def _runs(model: nn.Module, shape: tuple[int, ...]) -> bool:
    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape))
    except Exception:  # the network's code may raise anything: it does not run on this input
        return False
    return True


def _check_output(out: Any, name: str) -> None:
    if not isinstance(out, Tensor):
        key, parts = _parts(out)
        advice = "Have the factory return a module whose forward returns the logits only"
        raise _other_output(
            name,
            f"a {type(out).__name__}{parts}",
            f"{advice}: wrap it and return net(x){key}." if key else f"{advice}.",
        )
    if not out.is_floating_point():
        kind = str(out.dtype).removeprefix("torch.")
        raise _other_output(
            name, f"numbers of the type {kind}", "Return the logits, not the numbers of the classes."
        )
    if out.dim() == 2 and out.shape[0] == 1:
        return
    given = f"a tensor of shape {tuple(out.shape)}"
    if out.dim() > 2 and out.shape[0] == 1 and out[0, 0].numel() > 1:
        raise _other_output(
            name,
            f"{given}, a map for each class,",
            "Pool over the positions, for instance by out.mean(dim=(2, 3)).",
        )
    if out.dim() > 2 and out.shape[0] == 1:
        raise _other_output(name, f"{given}, maps of one pixel,", "Flatten them: out.flatten(1).")
    raise _other_output(name, given, "Keep the batch as the first axis, also for one image.")


def _other_output(name: str, given: str, advice: str) -> CompressorError:
    return CompressorError(
        f"{name} gives {given} for one image; a classifier should give (1, classes): one tensor of logits.",
        advice,
    )


def _parts(out: Any) -> tuple[str, str]:
    """Return how to access the first tensor (rows, columns) in an output of several parts, and all parts in words."""
    if isinstance(out, Mapping):
        items = [(f"[{key!r}]", value) for key, value in out.items()]
    elif isinstance(out, (list, tuple)):
        items = [(f"[{place}]", value) for place, value in enumerate(out)]
    else:
        items = [(f".{key}", value) for key, value in getattr(out, "__dict__", {}).items()]
    shown = [
        f"{key} {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
        for key, value in items[:4]
    ]
    tensors = [key for key, value in items if isinstance(value, Tensor) and value.dim() == 2]
    words = f" of {len(items)} ({', '.join(shown)}{', ...' if len(items) > 4 else ''})" if items else ""
    return (tensors[0] if tensors else ""), words


def _text(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)
