"""Properties of a recipe's device: runtime, precision, latency table, channel steps and ONNX opset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.core.errors import CompressorError
from compressor.core.progress import say

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.latency.remote_bundle import Precision
    from compressor.latency.table import LatencyTable
    from compressor.pruning.space import PruningSpace
    from compressor.recipe import Recipe


def steps_of(recipe: Recipe, space: PruningSpace, example: Tensor) -> dict[str, int]:
    """Measure the channel steps at which latency jumps on the recipe's device.

    Raises:
        CompressorError: The device is not this machine's CPU: its table is estimated or too coarse.
    """
    from compressor.latency.devices import recommended_steps
    from compressor.latency.ort_process import OrtProcess
    from compressor.latency.steps import measured_steps, refuse_table
    from compressor.latency.surface import ALIGNMENT
    from export.device.here import CPU

    if recipe.device.startswith("ssh:"):
        raise CompressorError(
            f"Channel steps are measured on this machine only, not on {recipe.device}.",
            "Use --granularity auto, or a number such as 8.",
        )
    if recipe.device != "local":
        raise refuse_table(latency_table(recipe, space, example))
    if runtime_of(recipe) != CPU:
        raise CompressorError(
            "Channel steps are measured on this machine's CPU only, and this run is for its GPU.",
            f"Use --granularity auto, or choose the CPU: export COMPRESSOR_BACKEND={CPU}",
        )
    return measured_steps(
        space,
        example,
        OrtProcess(recipe.threads),
        otherwise=recommended_steps(space.groups, runtime_of(recipe), recipe.precision),
        least_stride=ALIGNMENT,
    )


def check_device(recipe: Recipe) -> None:
    """Raise an error for an unknown device before anything is loaded for it."""
    from compressor.latency.table import check_known
    from export.device.here import gpu_backend

    if recipe.device != "local":
        check_known(recipe.device)
    elif recipe.precision != "fp32" and gpu_backend() is None:
        raise CompressorError(
            f"Networks run in fp32 on this machine's CPU, not in {recipe.precision}.",
            "Omit --precision, name a --device, or export it afterwards: compress export RUN --precision fp16",
        )


def runtime_of(recipe: Recipe) -> str:
    """Return the runtime of the recipe's device, by the name that latency tables use."""
    from export.device.here import CPU, ORT_CUDA, gpu_backend

    if recipe.device != "local":
        return "tensorrt"
    backend = gpu_backend()
    return CPU if backend is None else backend.kind if backend.kind == ORT_CUDA else "tensorrt"


def latency_table(
    recipe: Recipe, space: PruningSpace, example: Tensor, profile_limit_s: float | None = None
) -> LatencyTable:
    """Return the device's latency table: measured (or cached) for this machine or over ssh, otherwise loaded."""
    from compressor.latency.table import LatencyTable

    if recipe.device.startswith("ssh:"):
        from compressor.latency.over_ssh import ssh_table

        return ssh_table(
            recipe.device,
            space,
            example,
            model=recipe.model,
            precision=device_precision(recipe),
            opset=recipe.export.opset,
        )
    if recipe.device != "local":
        table = LatencyTable.load(recipe.device, precision=recipe.precision, space=space)
        if table.estimated:
            say(f"The latency of {recipe.device} is estimated, not measured.")
        return table
    from export.device.here import gpu_backend

    if (backend := gpu_backend()) is not None:
        from compressor.latency import local_gpu

        limit_s = local_gpu.TIME_LIMIT_S if profile_limit_s is None else profile_limit_s
        precision = device_precision(recipe)
        return local_gpu.gpu_table(space, example, backend, precision, time_limit_s=limit_s)
    from compressor.latency.local import TIME_LIMIT_S, local_table

    limit_s = TIME_LIMIT_S if profile_limit_s is None else profile_limit_s
    return local_table(space, example, threads=recipe.threads, time_limit_s=limit_s)


def device_precision(recipe: Recipe) -> Precision:
    """Return the precision in which a resolved recipe's networks are timed on its device."""
    return "fp32" if recipe.precision == "auto" else recipe.precision


def opset_of(recipe: Recipe, target: str | None = None) -> int:
    """Return the ONNX opset for a device: the recipe's, or a lower one if the board's TensorRT needs it."""
    from export.device.bundle import TARGETS, find_target

    board = find_target(target) if target else TARGETS.get(recipe.device)
    return min(recipe.export.opset, board.opset) if board else recipe.export.opset
