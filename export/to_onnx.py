"""From a torch module to one ONNX file that every TensorRT from 8.0 to 11 can read.

This module and `torch_formats` are the only ones of the package that import torch.

The exporter that traces the module is used, and not the newer one built on `torch.export`: that one writes
opset 18 at the least and lowers it with a converter that fails on the mean over axes of a global pooling,
while TensorRT 8.0 and 8.2 read opset 13 at the most and 8.4 to 8.6 opset 17. The tracing exporter writes 13
and 17 as such, names nodes after the modules they come from, folds batch norms into convolutions, and takes
0.2 s where the other takes 2.5 s.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.jit._trace import TracerWarning

from export.errors import ExportError
from export.files import sha256_bytes, write_bytes
from export.ort import first_line
from export.tidy import check, shapes, tidy, write_metadata

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

OPSETS = range(13, 21)
"""Opsets that the tracing exporter writes and that some TensorRT reads."""

JETPACK4_OPSET = 13
DEFAULT_OPSET = 17


@dataclass(frozen=True)
class OnnxInfo:
    """What was written.

    Attributes:
        path: The file.
        sha256: Its checksum.
        size: Its size in bytes.
        opset: The opset of its operators.
        inputs, outputs: Names with shapes; an open batch is the string "batch".
        nodes: How many operators it has.
    """

    path: Path
    sha256: str
    size: int
    opset: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    nodes: int


def export_onnx(
    model: nn.Module,
    example_input: torch.Tensor,
    path: str | Path,
    *,
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, Any] | None = None,
    dynamic_batch: bool = False,
    input_name: str = "input",
    output_name: str = "output",
) -> OnnxInfo:
    """Write `model` as one ONNX file, without external data, and check it.

    The same network gives the same bytes each time. The model is left as it is, on its device and in its
    mode.

    Args:
        model: Takes one float tensor and returns a tensor, or a tuple of tensors.
        example_input: A batch (N, C, H, W) of the shape the file is for; its values do not matter.
        path: Where the file goes; it appears there whole or not at all.
        opset: 17 reads everywhere from TensorRT 8.4 on; 13 is for JetPack 4.
        metadata: Facts to carry in the file; what is no string is written as JSON.
        dynamic_batch: Leave the batch open. An engine then needs a profile, and is slower as a rule.
        input_name: Name of the input.
        output_name: Name of the output; several outputs are numbered from 0.

    Raises:
        ExportError: the model cannot be traced, an operator has no ONNX form, its output is not finite, or
            the file cannot be written.
    """
    if opset not in OPSETS:
        raise ExportError(
            f"Opset {opset} cannot be written: expected {OPSETS[0]} to {OPSETS[-1]}.",
            f"Use {DEFAULT_OPSET}, or {JETPACK4_OPSET} for JetPack 4.",
        )
    import onnx

    copied, sample = frozen_copy(model), example_input.detach().cpu().float()
    names = _output_names(copied, sample, output_name)
    _replace_uneven_pools(copied, sample)
    raw = _trace(copied, sample, opset, input_name, names, dynamic_batch)
    proto = tidy(onnx.load_model_from_string(raw))
    write_metadata(proto, metadata or {})
    check(proto, opset)
    content = proto.SerializeToString(deterministic=True)
    write_bytes(Path(path), content)
    return OnnxInfo(
        path=Path(path),
        sha256=sha256_bytes(content),
        size=len(content),
        opset=opset,
        inputs=shapes(proto.graph.input),
        outputs=shapes(proto.graph.output),
        nodes=len(proto.graph.node),
    )


def reference_outputs(
    model: nn.Module, inputs: npt.NDArray[Any], *, batch_size: int = 64
) -> list[npt.NDArray[np.float32]]:
    """What torch computes for `inputs` (N, C, H, W) in evaluation mode: one array for each output.

    The model is put back into the mode that it was in.
    """
    import numpy as np

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parts: list[tuple[torch.Tensor, ...]] = []
    try:
        with torch.no_grad():
            for start in range(0, len(inputs), batch_size):
                chunk = np.ascontiguousarray(inputs[start : start + batch_size], dtype=np.float32)
                parts.append(_as_tuple(model(torch.from_numpy(chunk).to(device))))
    finally:
        for module, training in modes:
            module.training = training
    count = len(parts[0])
    return [np.concatenate([part[index].float().cpu().numpy() for part in parts]) for index in range(count)]


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode: tracing must not touch the caller's module."""
    copied = copy.deepcopy(model).cpu().float().eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    return copied


class _FixedPool(nn.Module):
    """Adaptive average pooling from one size to another, as two products with constant matrices.

    The exporter can write it only where the output's size divides the input's, which fails for the heads of VGG and
    AlexNet on small images.
    """

    def __init__(self, given: tuple[int, int], wanted: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("rows", self._means(given[0], wanted[0]))
        self.register_buffer("columns", self._means(given[1], wanted[1]).T.contiguous())

    @staticmethod
    def _means(given: int, wanted: int) -> torch.Tensor:
        """The matrix (wanted, given) whose rows average the cells that torch averages."""
        matrix = torch.zeros(wanted, given)
        for place in range(wanted):
            start, end = place * given // wanted, -((-(place + 1) * given) // wanted)
            matrix[place, start:end] = 1.0 / (end - start)
        return matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(torch.matmul(self.get_buffer("rows"), x), self.get_buffer("columns"))


def _replace_uneven_pools(model: nn.Module, sample: torch.Tensor) -> None:
    """Put `_FixedPool` in the place of pools that the exporter cannot write."""
    seen: dict[nn.Module, tuple[tuple[int, int], tuple[int, int]]] = {}

    def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        given, wanted = inputs[0].shape[-2:], output.shape[-2:]
        seen[module] = ((int(given[0]), int(given[1])), (int(wanted[0]), int(wanted[1])))

    pools = [module for module in model.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
    hooks = [module.register_forward_hook(watch) for module in pools]
    with torch.no_grad():
        model(sample)
    for hook in hooks:
        hook.remove()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            given, wanted = seen.get(child, ((1, 1), (1, 1)))
            if any(size % part for size, part in zip(given, wanted)):
                setattr(parent, name, _FixedPool(given, wanted))


def _as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    values = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs) if _is_list(outputs) else ()
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        raise ExportError(
            f"The model returns a {type(outputs).__name__}; a tensor or a tuple of tensors was expected.",
            "Wrap it in a module that returns its tensors.",
        )
    return values


def _is_list(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _output_names(model: nn.Module, sample: torch.Tensor, name: str) -> list[str]:
    try:
        with torch.no_grad():
            outputs = _as_tuple(model(sample))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ExportError(
            f"The model does not run on an input of shape {tuple(sample.shape)}: {first_line(error)}."
        ) from error
    if not all(bool(torch.isfinite(value).all()) for value in outputs):
        raise ExportError(
            "The model's output is not finite on the example input, nor would it be on the device.",
            "Look for NaN or infinite weights and for variances of zero in batch norms.",
        )
    return [name] if len(outputs) == 1 else [f"{name}_{index}" for index in range(len(outputs))]


class _Off:
    """Says no, whether it is asked or called."""

    def __bool__(self) -> bool:
        return False

    def __call__(self) -> bool:
        return False


@contextmanager
def _exporter_silenced() -> Iterator[None]:
    """Silence what the tracing exporter says about itself, and nothing else."""
    # it asks whether its log is on by the function's name, without calling it, and so always prints the graph of a
    # network that it cannot write
    switch = "_jit_is_onnx_log_enabled"
    asked = getattr(torch._C, switch, None)
    with warnings.catch_warnings():
        for message in (
            "You are using the legacy TorchScript-based ONNX export",
            "The feature will be removed",
            ".*Constant folding",
        ):
            warnings.filterwarnings("ignore", message=message)
        # sizes that become constants are what a file of one shape is about; parity is checked on real inputs
        warnings.filterwarnings("ignore", category=TracerWarning)
        try:
            if asked is not None:
                setattr(torch._C, switch, _Off())
            yield
        finally:
            if asked is not None:
                setattr(torch._C, switch, asked)


def _trace(
    model: nn.Module,
    sample: torch.Tensor,
    opset: int,
    input_name: str,
    names: Sequence[str],
    dynamic: bool,
) -> bytes:
    buffer = io.BytesIO()
    open_axes = {name: {0: "batch"} for name in (input_name, *names)} if dynamic else None
    try:
        with _exporter_silenced(), torch.no_grad():
            torch.onnx.export(
                model,
                (sample,),
                buffer,  # type: ignore[arg-type]  # its annotation knows of paths only
                opset_version=opset,
                input_names=[input_name],
                output_names=list(names),
                dynamic_axes=open_axes,
                dynamo=False,
            )
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # OnnxExporterError is a RuntimeError
        raise ExportError(
            f"The model cannot be written as ONNX opset {opset}: {first_line(error)}.",
            "Replace the operation by one that ONNX has, or try a higher opset if the device allows it.",
        ) from error
    return buffer.getvalue()
