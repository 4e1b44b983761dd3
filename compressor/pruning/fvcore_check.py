"""Verifies the multiply-adds of a pruned network against fvcore's count."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from torch import nn

    from compressor.pruning.construct import Ints
    from compressor.pruning.space import PruningSpace

PRODUCTS = ("conv", "mm", "matmul", "attention", "einsum", "linear", "bilinear", "lstm", "gru", "fft")
"""Parts of the names of operators with many multiply-adds."""


class Disagreement(CompressorError):
    """An independent check contradicts the slim network: an internal error, not a user error."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            "This is an internal error: nothing is exported, and the run's results so far are kept. Do not deploy "
            "the network; report this with recipe.yaml and channels.json of the run's folder.",
        )


@dataclass(frozen=True)
class Check:
    """Result of an independent check: True if confirmed, None if it could not run (a contradiction raises)."""

    confirmed: bool | None
    words: str

    def record(self) -> dict[str, Any]:
        """Return the check as stored in the manifest."""
        return {"confirmed": self.confirmed, "words": self.words}


def confirm_macs(space: PruningSpace, widths: Ints, slim: nn.Module) -> Check:
    """Compare fvcore's multiply-adds of the built network with those of the space, in total and by layer.

    Args:
        space: The space that the network was pruned from.
        widths: Widths of the plan, (G,).
        slim: The delivered network.

    Raises:
        Disagreement: fvcore's count differs from `space.macs` or `space.layer_macs`.
    """
    expected = int(space.macs(widths))
    try:
        total, by_module, unseen = count_macs(slim, space.example_input)
    except Exception as error:  # fvcore's tracer runs user code and may raise anything
        return Check(None, f"not checked: fvcore cannot trace the network ({first_line(error)})")
    if total != expected:
        raise Disagreement(
            f"fvcore counts {total:,} multiply-adds of the slim network, the pruning space says {expected:,}."
        )
    layers: Counter[str] = Counter()
    for layer, macs in zip(space.layers, space.layer_macs(widths).tolist(), strict=True):
        layers[layer.name] += macs if layer.counted else 0
    plain = {name for name, module in slim.named_modules() if type(module) in _plain_layers()}
    for name, macs in layers.items():
        if name in plain and by_module.get(name, 0) != macs:
            raise Disagreement(
                f"fvcore counts {by_module.get(name, 0):,} multiply-adds of the slim network's layer '{name}', the "
                f"pruning space says {macs:,}."
            )
    words = f"confirmed by fvcore: {total:,} multiply-adds"
    return Check(True, f"{words}; it does not count {_listed(unseen)}" if unseen else words)


def _plain_layers() -> frozenset[type[nn.Module]]:
    """Return the modules whose forward pass is one operation on their own weight; subclasses may differ."""
    from torch import nn

    return frozenset({nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d})


def count_macs(model: nn.Module, example: tuple[Any, ...]) -> tuple[int, dict[str, int], dict[str, int]]:
    """Count a network's multiply-adds with fvcore in eval mode.

    Returns:
        Total multiply-adds; multiply-adds by module; number of occurrences of each operator that is not counted.
    """
    from compressor.pruning.facts import moved

    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), "cpu")
    with evaluated(model), _quiet():
        from fvcore.nn import FlopCountAnalysis  # its import emits deprecation warnings of torch

        analysis = FlopCountAnalysis(model, moved(example, device))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        return (
            int(analysis.total()),
            {name: int(macs) for name, macs in analysis.by_module().items()},
            dict(analysis.unsupported_ops()),
        )


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Switch the network to eval mode, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("fvcore")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _listed(unseen: dict[str, int], most: int = 6) -> str:
    """List operators, those with multiply-adds first: 'aten::add (16), aten::mul (4) and 2 more kinds'."""
    order = sorted(unseen, key=lambda name: (not any(part in name for part in PRODUCTS), -unseen[name], name))
    shown = ", ".join(f"{name.removeprefix('aten::')} ({unseen[name]})" for name in order[:most])
    return shown + (f" and {len(order) - most} more kinds" if len(order) > most else "")


def first_line(error: Exception) -> str:
    """Return an error's class and the first line of its message."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"
