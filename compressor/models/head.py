"""Find the layer that computes a classifier's output by running the network, and replace it by another size."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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


class Recorder:
    """Follows the layers of a network while it runs once, so that `makers` can find the ones that compute its output.

    Every output of a layer starts a new autograd graph, so that the path back from the network's output ends at the
    last layers, whatever comes before them and whether or not their parameters require gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._made: dict[Any, tuple[str, int]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the runs within the context."""
        handles = [
            module.register_forward_hook(self._noting(name))
            for name, module in self.model.named_modules()
            if isinstance(module, LAYERS)
        ]
        try:
            with torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _noting(self, name: str) -> Any:
        def note(module: nn.Module, _inputs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            started = output.detach().requires_grad_().clone()
            axis = -1 - LAYERS.index(
                next(kind for kind in LAYERS if isinstance(module, kind))
            )  # before the positions
            self._made[started.grad_fn] = (name, int(output.shape[axis]))
            return started

        return note

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
        raise CompressorError(
            f"{said}, and several layers compute them together: {', '.join(sorted(heads))}.", advice
        )
    parts = [
        *(f"{layer} ({channels} outputs)" for layer, channels in makers.layers.items()),
        *makers.parameters,
    ]
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
    computed = (
        set(old._parameters) != {"weight", "bias"}
        or old._forward_pre_hooks
        or hasattr(old, "parametrizations")
    )
    if type(old) in LAYERS or computed:
        return plain.train(old.training)
    # A layer of the user's own class, such as one that normalizes its weights: its forward stays.
    new = copy.deepcopy(old)
    new._parameters.update(plain._parameters)
    setattr(new, "out_features" if isinstance(old, nn.Linear) else "out_channels", outputs)
    return new
