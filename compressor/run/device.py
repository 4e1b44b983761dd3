"""Properties of a recipe's device: precision, latency table, and ONNX opset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.latency.provider import TableProvider
from compressor.latency.request import Request

if TYPE_CHECKING:

    from compressor.latency.schema import Precision
    from compressor.latency.table import LatencyTable
    from compressor.pruning.space import PruningSpace
    from compressor.recipe import Recipe


def resolved(recipe: Recipe) -> Recipe:
    """Return a recipe with every field filled in; `auto` is the first precision of a device that does not run FP16."""
    if recipe.precision == "auto":
        precisions = provider_of(recipe).precisions
        if "fp16" not in precisions:
            recipe = recipe.changed({"precision": precisions[0]})
    return recipe.resolved()


def provider_of(recipe: Recipe) -> TableProvider:
    """Return the provider of a recipe's device."""
    return TableProvider.for_device(recipe.device)


def request_of(recipe: Recipe, profile_limit_s: float | None = None, *, renew: bool = False) -> Request:
    """Return what a resolved recipe needs a latency table for."""
    return Request(
        model=recipe.model,
        precision=device_precision(recipe),
        opset=recipe.export.opset,
        threads=recipe.threads,
        batch=recipe.batch,
        streams=recipe.streams,
        time_limit_s=profile_limit_s,
        renew=renew,
    )


def latency_table(
    recipe: Recipe, space: PruningSpace, example: Any, profile_limit_s: float | None = None
) -> LatencyTable:
    """Return the device's latency table: measured (or cached) for this machine or over ssh, otherwise loaded."""
    return provider_of(recipe).table(space, example, request_of(recipe, profile_limit_s))


def device_precision(recipe: Recipe) -> Precision:
    """Return the precision in which a resolved recipe's networks are timed on its device."""
    return "fp32" if recipe.precision == "auto" else recipe.precision


def int8_runtime(recipe: Recipe) -> str:
    """Return what a recipe's INT8 files are for: ONNX Runtime on this machine's CPU, else TensorRT."""
    return provider_of(recipe).int8_form


def check_precision(recipe: Recipe) -> None:
    """Refuse a device that does not run networks in the recipe's precision, before anything is loaded.

    Raises:
        CompressorError: The device is unknown or cannot be used so.
    """
    provider = provider_of(recipe)
    if "mixed" in (recipe.precision, *recipe.export.precisions) and "mixed" not in provider.precisions:
        raise CompressorError(
            "Mixed precision is chosen by times that are measured meanwhile: on this machine's CPU, or with TensorRT "
            f"on its GPU or on a device that ssh reaches. This run is for {provider.title}.",
            "Use int8, which keeps sensitive layers in floats, or give the device's address: --device ssh://user@host",
        )
    provider.check(recipe.precision)
    if recipe.budgets.energy is None:
        return
    if provider.is_here and device_precision(recipe) != "fp32":
        raise CompressorError(
            f"An energy budget counts FP32 networks, and this run is for {recipe.precision}.", "Use --precision fp32."
        )
    if recipe.precision == "mixed":
        raise CompressorError(
            "An energy budget counts networks in one precision, and this run is for mixed.",
            "Use --precision fp32, fp16 or int8.",
        )


def opset_of(recipe: Recipe, target: str | None = None) -> int:
    """Return the ONNX opset for a device: the recipe's, or a lower one if the board's TensorRT needs it."""
    from export.device.bundle import TARGETS, find_target

    board = find_target(target) if target else TARGETS.get(recipe.device)
    return min(recipe.export.opset, board.opset) if board else recipe.export.opset
