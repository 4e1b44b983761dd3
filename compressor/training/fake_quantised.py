"""Training for INT8: convolutions and products compute with inputs and weights that are rounded as in the INT8 file.

torchao's fake quantisation rounds, and gradients pass through it where a value lies within its range. A weight has one
scale for each output channel, of its largest value at every step, as the export takes it. A batch norm after it scales
whole output channels, so that folding it into the weights changes no rounded number. A layer's input has one range,
the moving average of the extremes of the batches; the export takes it in place of a calibrated one.

Activations that no such layer reads, such as those between a convolution and a sum, are not rounded; their ranges are
calibrated.
"""

from __future__ import annotations

import logging
import math
from importlib.util import find_spec
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from compressor.core.errors import CompressorError

INPUT = "input_rounding"
"""Name of the module in a layer that rounds its input."""

MOMENTUM = 0.01
"""Weight of a batch in the moving average of a range."""

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def require_torchao() -> None:
    """Raise an error if torchao, which rounds, is not installed.

    Raises:
        CompressorError: It is not.
    """
    if find_spec("torchao") is None:
        raise CompressorError(
            "training.quantize: int8 rounds with torchao, which is not installed.",
            "Install it with: pip install 'compressor[qat]'",
        )


class FakeQuantised:
    """A network whose layers round their inputs and weights until `remove` is called.

    Args:
        network: Changed in place; its parameters stay the ones that are trained.
        symmetric: Whether inputs have a symmetric range, as TensorRT wants it; else any that has zero in it.
        levels: Largest whole number of a weight.
    """

    def __init__(self, network: nn.Module, *, symmetric: bool, levels: int) -> None:
        self._layers = [(name, each) for name, each in network.named_modules() if isinstance(each, LAYERS)]
        self._rounded: list[nn.Module] = []
        self._hooks: list[Any] = []
        for _, layer in self._layers:
            layer.add_module(INPUT, _of_inputs(symmetric))
            self._hooks.append(layer.register_forward_pre_hook(_round_input))
            if isinstance(layer._parameters.get("weight"), nn.Parameter):  # else it is computed
                parametrize.register_parametrization(layer, "weight", _of_weights(levels))
                self._rounded.append(layer)

    def remove(self) -> dict[str, tuple[float, float]]:
        """Give the network its layers back, with the trained weights.

        Returns:
            Least and largest input of each layer by its name; layers that saw no input are left out.
        """
        found = {}
        for name, layer in self._layers:
            seen = getattr(layer, INPUT).activation_post_process
            low, high = float(seen.min_val), float(seen.max_val)
            if math.isfinite(low) and math.isfinite(high) and low < high:
                found[name] = (low, high)
            delattr(layer, INPUT)
        for hook in self._hooks:
            hook.remove()
        for module in self._rounded:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        return found


def _round_input(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    first, *others = given
    return (getattr(layer, INPUT)(first.float()), *others)


def _torchao() -> Any:
    """Import the part of torchao that rounds, without its warnings of other versions of torch."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from torchao.quantization import pt2e
    finally:
        logging.disable(before)
    return pt2e


def _of_inputs(symmetric: bool) -> nn.Module:
    """Return what rounds a layer's input, as ONNX Runtime's quantiser chooses scale and zero point for a range."""
    import torch

    kind: dict[str, Any] = {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine, "quant_min": 0, "quant_max": 255}
    if symmetric:
        kind = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric, "quant_min": -127, "quant_max": 127}
    library = _torchao()
    made: nn.Module = library.FakeQuantize(
        library.MovingAverageMinMaxObserver, averaging_constant=MOMENTUM, **kind
    )
    return made


def _of_weights(levels: int) -> nn.Module:
    """Return what rounds weights, by the largest one of each output channel at this step."""
    import torch

    library = _torchao()
    made: nn.Module = library.FakeQuantize(
        library.MovingAveragePerChannelMinMaxObserver,
        averaging_constant=1.0,  # of this step alone
        ch_axis=0,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        quant_min=-levels,
        quant_max=levels,
    )
    return made
