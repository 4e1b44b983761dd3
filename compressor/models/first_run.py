"""Run a new network once on a blank image: find the layers that compute its output, replace the head, explain failures.

The layer that computes the output is found by running the network, because it need not be the last one constructed. A
mismatch between network and images is reported here, with its cause.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.core.plugins import raised_at
from compressor.models.computed import evaluated

Shape = tuple[int, int, int]
"""(channels, height, width) of one image."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that may compute a network's output. Their channels are the axis 1, 2, 3 and 4 from the end."""

_SIZES = (28, 32, 48, 64, 75, 96, 112, 128, 160, 192, 224, 256, 299, 320, 384, 448, 512)
"""Heights and widths that are tried to find the size that a network needs."""

_FIRST: tuple[type[nn.Module], ...] = (*LAYERS, nn.Embedding, nn.RNNBase, nn.modules.conv._ConvTransposeNd)
_INPUTS = {
    nn.Conv1d: "sequences",
    nn.Conv3d: "volumes or video clips",
    nn.Embedding: "whole numbers such as those of tokens",
    nn.RNNBase: "sequences",
}


@dataclass
class Makers:
    """Layers and parameters that compute a network's output, without what comes before the last layer on each path.

    Attributes:
        layers: Name of a linear or convolutional layer -> its outputs.
        parameters: Names of other parameters on the path: scales, or the weights of the user's own layers.
    """

    layers: dict[str, int] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)

    def heads(self, outputs: int) -> list[str]:
        """Return the layers whose outputs are the network's, channel by channel."""
        return [name for name, channels in self.layers.items() if channels == outputs]


def run_first(
    model: nn.Module, name: str, shape: Shape, task: str = "classification"
) -> tuple[Tensor, Makers]:
    """Return the output of a network for one blank image, and the layers that compute it.

    The network runs in evaluation mode. Its output is (1, classes), or (1, classes, H, W) for segmentation.

    Raises:
        CompressorError: The network does not run on such an image, or returns something else; the message names the
            cause.
    """
    _check_runnable(model, name)
    model.eval()
    recorder = _Recorder(model)
    with torch.random.fork_rng(devices=[]):
        try:
            with recorder.watching():
                out = model(torch.zeros(1, *shape))
        except Exception as error:  # the network's code may raise anything
            raise _cause(model, name, shape, error, recorder) from error
    if task == "segmentation":
        out = _class_maps(out, name)
    else:
        _check_output(out, name)
    return out, recorder.makers(out)


def input_channels(model: nn.Module, input_shape: Shape) -> int:
    """Return the number of image channels that a network takes: those of `input_shape`, or 1 for 3, or 3 for 1.

    Raises:
        CompressorError: Its first convolution takes another number.
    """
    given, *sides = input_shape
    first: list[int] = []

    def note(module: nn.Conv2d, _: Any) -> None:
        first.append(module.in_channels)

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        for channels in (given, 1 if given == 3 else 3):
            with evaluated(model), torch.no_grad(), suppress(Exception):  # the network's code may raise anything
                model(torch.zeros(1, channels, *sides))
                return channels
    finally:
        for hook in hooks:
            hook.remove()
    if first and first[0] not in (1, 3):
        raise CompressorError(
            f"The network's first convolution takes {first[0]} channels; images have 3, or 1 if they are gray.",
            "Use a network for images with 3 channels or 1.",
        )
    return first[0] if first else given  # it fails for another reason, which the trial run reports


class _Recorder:
    """Follows one run of a network: which modules run, and which layers compute the output.

    Every output of a layer starts a new autograd graph, so that the path back from the network's output ends at the
    last layers, whatever comes before them and whether or not their parameters require gradients.

    Attributes:
        open: Paths of the modules whose forward pass is running, or was when an error was raised.
        first: The first layer that ran: its path, the layer, the shape of its input.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.open: list[str] = []
        self.first: tuple[str, nn.Module, tuple[int, ...]] | None = None
        self._made: dict[Any, tuple[str, int]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the run within the context."""
        handles = []
        for path, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(path)))
            handles.append(module.register_forward_hook(self._leaving(path)))
        try:
            with torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, path: str) -> Any:
        def enter(module: nn.Module, inputs: Any) -> None:
            self.open.append(path)
            if self.first is None and isinstance(module, _FIRST) and inputs and isinstance(inputs[0], Tensor):
                self.first = (path, module, tuple(inputs[0].shape))

        return enter

    def _leaving(self, path: str) -> Any:
        def leave(module: nn.Module, _inputs: Any, output: Any) -> Any:
            self.open.pop()
            axis = next((-1 - place for place, kind in enumerate(LAYERS) if isinstance(module, kind)), None)
            if axis is None or not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            started = output.detach().requires_grad_().clone()
            self._made[started.grad_fn] = (path, int(output.shape[axis]))
            return started

        return leave

    def makers(self, output: Tensor) -> Makers:
        """Return the layers and parameters that compute the output of a recorded run."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        found, seen, stack = Makers(), set(), [output.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self._made:
                name, channels = self._made[node]
                found.layers.setdefault(name, channels)
                continue
            variable = getattr(node, "variable", None)  # of the nodes where parameters enter
            if variable is not None and id(variable) in names:
                found.parameters.append(names[id(variable)])
            stack.extend(before for before, _ in node.next_functions)
        return found


# ---------------------------------------------------------------- the head
def single_head(name: str, makers: Makers, outputs: int, num_classes: int) -> str:
    """Return the one layer that must change for another number of classes.

    Raises:
        CompressorError: No single layer computes the output.
    """
    heads = makers.heads(outputs)
    if len(heads) == 1:
        return heads[0]
    said = f"{name} gives {outputs} outputs for one image where the data have {num_classes} classes"
    advice = "Have the factory accept num_classes and build the network for them."
    if heads:
        raise CompressorError(f"{said}, and several layers compute them together: {', '.join(sorted(heads))}.", advice)
    parts = [*(f"{layer} ({channels} outputs)" for layer, channels in makers.layers.items()), *makers.parameters]
    made = f": they come from {', '.join(parts[:4])}" if parts else ""
    raise CompressorError(f"{said}, and no single linear or convolutional layer computes them{made}.", advice)


def replace_head(model: nn.Module, name: str, num_classes: int) -> None:
    """Replace layer `name` by a new one with `num_classes` outputs, in place.

    Bias, type and all other settings stay. Attributes called `num_classes` with the old number are updated.

    Raises:
        CompressorError: There is no such layer, or it is grouped.
    """
    modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    old = modules.get(name)
    if not isinstance(old, LAYERS) or not name:
        raise CompressorError(f"The network has no linear or convolutional layer {name!r}.")
    if getattr(old, "groups", 1) != 1:
        raise CompressorError(
            f"The last layer {name} is a convolution of {old.groups} groups, which cannot have {num_classes} outputs.",
            "Have the factory accept num_classes.",
        )
    outputs = int(old.out_features if isinstance(old, nn.Linear) else old.out_channels)
    new = _resized(old, num_classes)
    for path, module in modules.items():
        if module is old:
            parent, _, leaf = path.rpartition(".")
            setattr(modules[parent], leaf, new)
        if module.__dict__.get("num_classes") == outputs and type(module.__dict__["num_classes"]) is int:
            module.__dict__["num_classes"] = num_classes


def _resized(old: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, outputs: int) -> nn.Module:
    weight = old.weight
    options: dict[str, Any] = {"bias": old.bias is not None, "dtype": weight.dtype, "device": weight.device}
    if isinstance(old, nn.Linear):
        plain: nn.Module = nn.Linear(old.in_features, outputs, **options)
    else:
        kind = next(kind for kind in LAYERS[1:] if isinstance(old, kind))
        settings = {key: getattr(old, key) for key in ("stride", "padding", "dilation", "padding_mode")}
        plain = kind(old.in_channels, outputs, old.kernel_size, **settings, **options)  # type: ignore[arg-type]
    computed = set(old._parameters) != {"weight", "bias"} or old._forward_pre_hooks or hasattr(old, "parametrizations")
    if type(old) in LAYERS or computed:
        return plain.train(old.training)
    # A layer of the user's own class, such as one that normalizes its weights: its forward stays.
    new = copy.deepcopy(old)
    new._parameters.update(plain._parameters)
    setattr(new, "out_features" if isinstance(old, nn.Linear) else "out_channels", outputs)
    return new


# ---------------------------------------------------------------- causes of failures
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
    return any(kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)


def _cause(model: nn.Module, name: str, shape: Shape, error: Exception, recorder: _Recorder) -> CompressorError:
    """Find out why the network fails, from the inputs that it does accept."""
    lines = str(error).splitlines() or [""]
    where = f" in its module {recorder.open[-1]!r}" if recorder.open and recorder.open[-1] else ""
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
        _other_inputs(model, name, shape, recorder)
        or _other_channels(model, name, shape, reason, recorder)
        or _other_size(model, name, shape, reason)
        or CompressorError(
            f"{name} fails on one image of {_text(shape)}: {reason}.",
            "It must run on float32 images of that shape in evaluation mode: try model.eval()(torch.zeros"
            f"(1, {', '.join(map(str, shape))})).",
        )
    )


def _other_inputs(model: nn.Module, name: str, shape: Shape, recorder: _Recorder) -> CompressorError | None:
    if recorder.first is None:
        return None
    path, layer, given = recorder.first
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
    model: nn.Module, name: str, shape: Shape, reason: str, recorder: _Recorder
) -> CompressorError | None:
    if recorder.first is None:
        return None
    path, layer, given = recorder.first
    expected = getattr(layer, "in_channels", shape[0])
    # Its input may be no longer the image.
    if not isinstance(expected, int) or expected == shape[0] or given[1:] != shape:
        return None
    size = next((size for size in (shape[1:], *_sizes(shape)) if _runs(model, (expected, *size))), None)
    if size is None and "channels" not in reason:
        return None
    also = f" of {size[0]}x{size[1]}" if size is not None and size != shape[1:] else ""
    return CompressorError(
        f"{name} takes images of {expected} channel{'s' * (expected != 1)}{also}, but the data have {shape[0]} "
        f"(images of {_text(shape)}).",
        f"Its first layer is {path!r}. Have the factory build it for {shape[0]} channels, or give data that have "
        f"{expected}.",
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


MAPS = "out"
"""Key of the class maps in what torchvision's segmentation networks return."""


def class_maps(out: Any) -> Any:
    """Return the class maps in a segmentation network's output: the tensor itself, or what is under `MAPS`."""
    return out[MAPS] if isinstance(out, Mapping) and MAPS in out else out


def _class_maps(out: Any, name: str) -> Tensor:
    maps = class_maps(out)
    if isinstance(maps, Tensor) and maps.dim() == 4 and maps.shape[0] == 1 and maps.is_floating_point():
        return maps
    given = f"a tensor of shape {tuple(maps.shape)}" if isinstance(maps, Tensor) else f"a {type(maps).__name__}"
    raise CompressorError(
        f"{name} gives {given} for one image; a segmentation network should give (1, classes, height, width), alone or "
        f"as {MAPS!r} of a dictionary.",
        "Have the factory return the logits of each pixel.",
    )


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
        raise _other_output(name, f"numbers of the type {kind}", "Return the logits, not the numbers of the classes.")
    if out.dim() == 2 and out.shape[0] == 1:
        return
    given = f"a tensor of shape {tuple(out.shape)}"
    if out.dim() > 2 and out.shape[0] == 1 and out[0, 0].numel() > 1:
        raise _other_output(
            name, f"{given}, a map for each class,", "Pool over the positions, for instance by out.mean(dim=(2, 3))."
        )
    if out.dim() > 2 and out.shape[0] == 1:
        raise _other_output(name, f"{given}, maps of one pixel,", "Flatten them: out.flatten(1).")
    raise _other_output(name, given, "Keep the batch as the first axis, also for one image.")


def _other_output(name: str, given: str, advice: str) -> CompressorError:
    return CompressorError(
        f"{name} gives {given} for one image; a classifier should give (1, classes): one tensor of logits.", advice
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
        f"{key} {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}" for key, value in items[:4]
    ]
    tensors = [key for key, value in items if isinstance(value, Tensor) and value.dim() == 2]
    words = f" of {len(items)} ({', '.join(shown)}{', ...' if len(items) > 4 else ''})" if items else ""
    return (tensors[0] if tensors else ""), words


def _text(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)
