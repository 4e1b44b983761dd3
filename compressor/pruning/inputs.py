"""Checks of the arguments of `PruningSpace`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.pruning.facts import example_tensors


def checked_model(model: Any) -> None:
    """Refuse models that cannot be pruned.

    Raises:
        CompressorError: It is not a module, has no parameters, has parameters without data, or is scripted.
    """
    if not isinstance(model, nn.Module):
        raise CompressorError(
            f"The model must be a torch.nn.Module, not {type(model).__name__}.", "Build it first."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CompressorError("A scripted or traced module hides its structure.", "Pass the original module.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise CompressorError(f"The model is wrapped in {type(model).__name__}.", "Pass `model.module`.")
    parameters = list(model.named_parameters())
    if not parameters:
        raise CompressorError(
            f"{type(model).__name__} has no parameters: there is nothing to prune.", "Is it the right one?"
        )
    for name, value in parameters:
        if isinstance(value, nn.parameter.UninitializedParameter):
            raise CompressorError(
                f"Parameter '{name}' has no shape yet (lazy module).", "Run the model once first."
            )
        if value.device.type == "meta":
            raise CompressorError(
                f"The model is on the meta device: parameter '{name}' has no values.",
                "Load its weights: model.to_empty(device='cpu'), then load_state_dict().",
            )
    devices = {str(value.device) for _, value in parameters}
    if len(devices) > 1:
        raise CompressorError(
            f"The model is spread over several devices: {', '.join(sorted(devices))}.", "Move it to one."
        )


def checked_inputs(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """Return the example as positional arguments for one input.

    Raises:
        CompressorError: The example has no tensor, or is on another device than the model.
    """
    args = example if isinstance(example, tuple) else (example,)
    tensors = example_tensors(args)
    if not tensors:
        raise CompressorError(
            f"The example input must contain a tensor, got {type(example).__name__}.",
            "Pass for example torch.randn(1, 3, 224, 224).",
        )
    device = next(model.parameters()).device
    for tensor in tensors:
        if tensor.device != device:
            raise CompressorError(
                f"The example input is on {tensor.device}, the model on {device}.",
                "Move one of them: example.to(device).",
            )
    batches = {tensor.shape[0] if tensor.dim() > 1 else 1 for tensor in tensors}
    if len(batches) == 1 and batches != {1} and all(isinstance(arg, Tensor) for arg in args):
        return tuple(arg[:1] for arg in args)
    return args
