"""Transfers a pruning space to other processes: plain values to rebuild it, and its weights as safetensors.

The rebuilt space allows all prunable groups, in steps of one channel. It accepts the plans of any space of the same
network, because groups that a plan does not name stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.pruning.artefact import build_dense, find_factory, record_of, set_tensors
from compressor.pruning.registry import modules_of_rules
from compressor.pruning.skeleton import named_tensors
from compressor.pruning.space import PruningSpace


def blueprint(space: PruningSpace) -> dict[str, Any]:
    """Return plain values from which `rebuild` creates a space of the same network, given its weights.

    Raises:
        CompressorError: the network has no factory by which another process could build it, or a rule was registered
            by the script that runs, which another process cannot import.
    """
    if "__main__" in (rules := modules_of_rules()):
        raise CompressorError(
            "A layer rule is registered in the script that runs, and the processes of workers and of functions that "
            "are budgets cannot import it.",
            "Move the rule to a module, and import that in the script.",
        )
    model = space.model
    factory = find_factory(model, record_of(model, space.outputs, space.example_input))
    if factory is None:
        raise CompressorError(
            "Several workers, and functions that are budgets, build the network in separate processes, but no "
            f"factory was found that builds the dense {type(model).__qualname__}.",
            "Specify the network as package.module:factory, or use one worker and only built-in budgets.",
        )
    return {
        "factory": factory,
        "inputs": [list(tensor.shape) for tensor in space.example_input],
        "training": model.training,
        "rules": rules,
    }


def rebuild(plain: Mapping[str, Any], tensors: Mapping[str, Tensor], device: str = "cpu") -> PruningSpace:
    """Return the space that `blueprint` described, with these weights and the layer rules of that process."""
    for module in plain["rules"]:
        import_module(module)
    model = build_dense(plain["factory"])
    set_tensors(model, dict(tensors), device)
    model.train(bool(plain["training"]))
    inputs = tuple(torch.zeros(*shape, device=device) for shape in plain["inputs"])
    return PruningSpace(model, inputs, granularity=1, min_width=1)


def reweigh(space: PruningSpace, tensors: Mapping[str, Tensor], last: bool) -> None:
    """Replace the weights of a rebuilt space, in place.

    Args:
        last: Whether the original weights are in channels-last format.
    """
    space.model.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    with torch.no_grad():
        for name, tensor in named_tensors(space.model).items():
            tensor.copy_(tensors[name])


def read_tensors(source: bytes | str) -> dict[str, Tensor]:
    """Read tensors in safetensors format from bytes or from a file, which is memory-mapped."""
    from safetensors.torch import load, load_file

    return dict(load_file(source) if isinstance(source, str) else load(source))
