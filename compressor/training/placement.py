"""Device placement of a training: in this process alone, or together with the others that a launcher started."""

from __future__ import annotations

import warnings
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
        spread: Returns the first process's tensor in all processes; the others pass one of the same shape.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    total: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    spread: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


def place(device: str | torch.device) -> Placement:
    """Find the device of a training in this process alone.

    Args:
        device: "auto" for this machine's accelerator or else its CPU, or a name such as "cpu" or "cuda:1".

    Raises:
        CompressorError: There is no such device.
    """
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
    return Placement(chosen)


def place_together(device: str | torch.device) -> Placement:
    """Find the device of this process's share of a training, and connect all processes; each has to call it.

    All Accelerate objects share their state, so it does not handle precision here: two trainings of different precision
    in one process would conflict, and preparing a module would replace its `forward` by one that a copy of the module
    still shares with the original.

    Args:
        device: "cpu", or "cuda" for the GPU of the process's local rank.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import broadcast

    accelerator = Accelerator(
        cpu=torch.device(device).type == "cpu",
        mixed_precision="no",
        # each process has the batch-norm statistics of its own share; the trainer averages them after an epoch
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )

    def wrap(module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames broadcast_buffers
            wrapped: nn.Module = accelerator.prepare_model(module)
        return wrapped

    return Placement(
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
        wrap,
        lambda tensor: accelerator.reduce(tensor, reduction="sum"),
        lambda tensor: broadcast(tensor.to(accelerator.device), from_process=0),
    )
