"""Device placement of training: one device, or one of several processes launched by Accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from compressor.core.errors import CompressorError


@dataclass(frozen=True)
class Placement:
    """A device and the rank of this process.

    Attributes:
        device: Device of weights and batches.
        rank: Rank of this process.
        world: Number of processes.
        wrap: Wraps a module so that its gradients are averaged over all processes; returns the module itself
            in a single process.
        total: Sums a tensor over all processes.
    """

    device: torch.device
    rank: int
    world: int
    wrap: Callable[[nn.Module], nn.Module]
    total: Callable[[torch.Tensor], torch.Tensor]


def place(device: str | torch.device) -> Placement:
    """Find the device, and the other processes if `accelerate launch` or `torchrun` started several.

    Args:
        device: "auto" for this machine's accelerator or else its CPU, or a name such as "cpu" or "cuda:1".

    Raises:
        CompressorError: There is no such device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _among_several(torch.device(device).type == "cpu" if device != "auto" else False)
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        chosen = found or torch.device("cpu")
    else:
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:  # torch raises AssertionError if built without CUDA
            reason = (str(error).splitlines() or ["it is not available"])[0]
            raise CompressorError(
                f"There is no device {device!r} here: {reason}.", "Use cpu or auto."
            ) from error
    return Placement(chosen, 0, 1, lambda module: module, lambda tensor: tensor)


def _among_several(cpu: bool) -> Placement:
    """Query Accelerate, which is not used in single processes.

    All its instances share their state, so it does not handle precision here: two trainings of different precision in
    one process would conflict, and preparing a module would replace its `forward` by one that a copy of the module
    still shares with the original.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=cpu, mixed_precision="no")
    return Placement(
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
        lambda module: accelerator.prepare_model(module),
        lambda tensor: accelerator.reduce(tensor, reduction="sum"),
    )
