"""Exports a torch module to an ONNX file that TensorRT 8.0 to 11 can read.

This module, `module`, `program`, `rewrites` and `trees` are the only ones of the package that import torch.

It uses the tracing exporter instead of the newer one based on `torch.export`. The newer one writes opset 18 or higher
and lowers it with a converter that fails on the mean over axes of a global pooling, while TensorRT 8.0 and 8.2 read
opsets up to 13, and 8.4 to 8.6 up to 17. The tracing exporter writes opsets 13 and 17 directly, names nodes after
their modules, folds batch norms into convolutions, and takes 0.2 s instead of 2.5 s. `rewrites` replaces operations
that it cannot write; `batches` handles batch sizes that it turns into constants. Its files are sometimes wrong, so
each file is compared with the module before it is written.
"""

from __future__ import annotations

import copy
import io
import linecache
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.jit._trace import TracerWarning

from export.convert.batches import SIZES, NotOpen, generalise
from export.convert.ort import first_line, onnx_outputs, open_session, portions, run_session
from export.convert.parity import (
    AGREEMENTS,
    TOLERANCES,
    Parity,
    compare_outputs,
    gross_difference,
    require,
    worst,
)
from export.convert.rewrites import Writable
from export.convert.tidy import check, shapes, tidy, write_metadata
from export.convert.trees import mapped, moved, names_in, rebuilt, rows, tensors_in
from export.errors import ExportError
from export.files import sha256_bytes, write_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

OPSETS = range(13, 21)
"""Opsets that the tracing exporter writes and that a supported TensorRT reads."""

JETPACK4_OPSET = 13
DEFAULT_OPSET = 17

OPEN_BATCHES = (1, 3, 17)
"""Batch sizes with which a file with a dynamic batch is checked."""


@dataclass(frozen=True)
class OnnxInfo:
    """The facts of a written ONNX file.

    Attributes:
        path: The file.
        sha256: Its checksum.
        size: Its size in bytes.
        opset: Its opset.
        inputs, outputs: Name -> shape; a dynamic batch is the string "batch".
        nodes: Number of operators.
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
    example_input: Any,
    path: str | Path,
    *,
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, Any] | None = None,
    dynamic_batch: bool = False,
    batches: Sequence[int] = OPEN_BATCHES,
    compare: bool = True,
    open_outputs: str | None = None,
    input_name: str = "input",
    output_name: str = "output",
) -> OnnxInfo:
    """Export `model` to one ONNX file without external data, and check its outputs against the module.

    Equal networks give equal files. The model is not changed; it keeps its device and mode.

    Args:
        model: Takes tensors, also in tuples and dictionaries, and returns some.
        example_input: A batch (N, ...) with the input shape of the file, or a tuple of the positional arguments;
            values do not matter but for whole numbers.
        path: The file, written atomically.
        opset: 17 is supported from TensorRT 8.4 on; 13 is for JetPack 4.
        metadata: Facts to store in the file; values other than strings are written as JSON.
        dynamic_batch: Whether the batch is dynamic. An engine then needs a profile, and is usually slower.
        batches: Batch sizes with which a file with a dynamic batch is checked.
        compare: Whether to check the file on random inputs; False if only its latency matters, or
            if the caller compares it on real ones.
        open_outputs: Name of the first axis of all outputs if the values of the input determine its size, as the number
            of boxes that a detector finds; None for outputs of fixed size.
        input_name: Name of the input; several have their number or key added.
        output_name: Name of the output; several have their number or key added.

    Raises:
        ExportError: the model cannot be traced, an operator has no ONNX form, its output is not finite, the file
            has other outputs or cannot have a dynamic batch, or it cannot be written; `path` is then unchanged.
    """
    if opset not in OPSETS:
        raise ExportError(
            f"Opset {opset} cannot be written: expected {OPSETS[0]} to {OPSETS[-1]}.",
            f"Use {DEFAULT_OPSET}, or {JETPACK4_OPSET} for JetPack 4.",
        )
    trace = _Trace(
        frozen_copy(model),
        arguments(example_input),
        opset,
        input_name,
        output_name,
        tuple(batches) if dynamic_batch else (),
        open_outputs,
    )
    proto = trace.checked() if compare else trace.plain()
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
    model: nn.Module, inputs: Any, *, runs: Sequence[tuple[int, int]] | None = None
) -> list[npt.NDArray[np.float32]]:
    """Compute the outputs of a torch module in evaluation mode: one array for each output.

    The mode of the model is restored.

    Args:
        model: The network.
        inputs: An array of floats (N, ...), or a tuple of the positional arguments, of tensors with N rows.
        runs: The first input and the number of inputs of each run; None for batches of 64.
    """
    import numpy as np

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parts: list[tuple[torch.Tensor, ...]] = []
    try:
        with torch.no_grad():
            whole = arguments(inputs)
            number = len(tensors_in(whole)[0])
            for start, size in runs or [(start, 64) for start in range(0, number, 64)]:
                parts.append(as_tuple(model(*moved(rows(whole, number, slice(start, start + size)), device))))
    finally:
        for module, training in modes:
            module.training = training
    count = len(parts[0])
    return [
        np.concatenate([np.atleast_1d(part[index].float().cpu().numpy()) for part in parts])
        for index in range(count)
    ]


def arguments(inputs: Any) -> tuple[Any, ...]:
    """Return inputs as positional arguments on the CPU: a tensor or array alone, or a tuple; numbers as float32."""
    import numpy as np

    if isinstance(inputs, np.ndarray):
        inputs = torch.from_numpy(np.ascontiguousarray(inputs))

    def plain(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().cpu()
        return tensor.float() if tensor.is_floating_point() else tensor

    found: tuple[Any, ...] = mapped(plain, inputs if isinstance(inputs, tuple) else (inputs,))
    return found


def frozen_copy(model: nn.Module) -> nn.Module:
    """Copy a model to the CPU in evaluation mode, so that tracing does not change the caller's module."""
    copied = copy.deepcopy(model).cpu().float().eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    return copied


def check_parity(
    model: nn.Module,
    onnx_path: str | Path,
    inputs: Any,
    *,
    tolerance: float = TOLERANCES["fp32"],
    min_agreement: float = AGREEMENTS["fp32"],
    threads: int = 1,
) -> Parity:
    """Compare an ONNX file with the torch module that it was exported from, on real inputs.

    Args:
        model: The module; run in evaluation mode, and its mode is restored.
        onnx_path: The file.
        inputs: Real inputs (N, ...), as an array or a tensor, or a tuple of the positional arguments.
        tolerance: Maximum absolute difference for outputs of up to 1; scaled with larger outputs.
        min_agreement: Minimum top-1 agreement.
        threads: Threads of ONNX Runtime.

    Returns:
        The parity of the worst output.

    Raises:
        ExportError: the difference or the agreement misses its threshold, or the file cannot be run.
    """

    from export.convert.onnx_header import read_header

    whole = arguments(inputs)
    arrays = [tensor.numpy() for tensor in tensors_in(whole)]
    exported = onnx_outputs(onnx_path, arrays, threads=threads)
    declared = next(iter(read_header(onnx_path).shapes.values()))[0]
    reference = reference_outputs(model, whole, runs=portions(len(arrays[0]), declared if declared > 0 else None))
    if len(exported) != len(reference):
        raise ExportError(f"{onnx_path} has {len(exported)} outputs, the network has {len(reference)}.")
    found = [
        compare_outputs(right, judged, tolerance=tolerance) for right, judged in zip(reference, exported)
    ]
    return require(worst(found), str(onnx_path), min_agreement=min_agreement)


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    """The outputs of a model as a tuple of tensors, from nested tuples, lists and dictionaries.

    Raises:
        ExportError: the model returned something else.
    """
    values = tuple(tensors_in(outputs))
    if not values:
        raise ExportError(
            f"The model returns a {type(outputs).__name__}; tensors were expected, also in tuples and dictionaries.",
            "Wrap it in a module that returns its tensors.",
        )
    return values


class _Flat(nn.Module):
    """A network as a function of its tensors, one argument for each, that returns a tuple of tensors."""

    def __init__(self, network: nn.Module, example: tuple[Any, ...]) -> None:
        super().__init__()
        self.network = network
        self.example = example
        self.eval()  # the exporter restores the mode of the outermost module in all of them

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return as_tuple(self.network(*rebuilt(self.example, list(tensors))))


def _outputs(model: nn.Module, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """Run the model; refuse it if it fails or its outputs are not finite."""
    return _finite(_result(model, inputs))


def _result(model: nn.Module, inputs: Sequence[Any]) -> Any:
    """Run the model; refuse it if it fails."""
    try:
        with torch.no_grad():
            return model(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors_in(tuple(inputs)))
        raise ExportError(f"The model does not run on an input of shape {shapes}: {first_line(error)}.") from error


def _finite(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of a model's result; refuse it if they are not finite."""
    outputs = as_tuple(result)
    if not all(bool(torch.isfinite(value).all()) for value in outputs):
        raise ExportError(
            "The model's output on the example input is not finite.",
            "Look for NaN or infinite weights, and for zero variances in batch norms.",
        )
    return outputs


class _Trace:
    """Traces one model and checks the graph.

    Args:
        model: A frozen copy.
        example: The positional arguments, (N, ...) each.
        opset: Opset of the file.
        input_name, output_name: As in `export_onnx`.
        batches: Batch sizes for which the graph must be right; empty for a fixed batch.
        open_outputs: As in `export_onnx`.
    """

    def __init__(
        self,
        model: nn.Module,
        example: tuple[Any, ...],
        opset: int,
        input_name: str,
        output_name: str,
        batches: tuple[int, ...],
        open_outputs: str | None,
    ) -> None:
        self._sample, self._opset = tuple(tensors_in(example)), opset
        result = _result(model, example)
        _finite(result)
        plain = len(example) == 1 and isinstance(example[0], torch.Tensor)
        flat = isinstance(result, (tuple, list)) and all(isinstance(each, torch.Tensor) for each in result)
        # a wrapper adds to the names of the nodes
        self._model = model if plain and (flat or isinstance(result, torch.Tensor)) else _Flat(model, example)
        self._inputs_names = names_in(example[0] if len(example) == 1 else example, input_name, plain=input_name)
        self._batches, self._open_outputs = batches, open_outputs
        self._names = names_in(result, output_name, plain=output_name)
        self._places: list[str] = []  # lines of forward that convert a tensor to a Python number

    def plain(self) -> Any:
        """The traced graph, without a check."""
        return self._graph(self._sample)

    def checked(self) -> Any:
        """The traced graph, checked for every batch size against the model.

        Raises:
            ExportError: the outputs differ; the message names the cause.
        """
        graph = self.plain()
        own = (len(self._sample[0]),)
        if (wrong := self._wrong(graph, own)) is not None:
            raise ExportError(f"The exported file differs from the network: {wrong}.", self._hint())
        if not self._batches or self._wrong(graph, self._batches) is None:
            return graph
        try:
            graph = tidy(generalise(*(self._graph(self._inputs(size)) for size in SIZES)))
        except NotOpen as error:
            raise self._fixed(str(error)) from error
        if (wrong := self._wrong(graph, self._batches)) is not None:
            raise self._fixed(wrong)
        return graph

    def _graph(self, sample: Sequence[torch.Tensor]) -> Any:
        import onnx

        axes = self._open_axes()
        raw, places = _trace(self._model, sample, self._opset, self._inputs_names, self._names, axes)
        self._places = places or self._places
        graph = tidy(onnx.load_model_from_string(raw))
        if axes:
            self._declare(graph, axes)
        return graph

    def _declare(self, graph: Any, axes: Mapping[str, Mapping[int, str]]) -> None:
        """Declare the sizes of the outputs' fixed axes, which the exporter may not know."""
        for value, output in zip(graph.graph.output, _outputs(self._model, self._sample)):
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if axis not in axes[value.name]:
                    dim.dim_value = output.shape[axis]

    def _open_axes(self) -> dict[str, dict[int, str]]:
        """The axes of inputs and outputs whose size is not fixed; those equal to the batch size are named "batch"."""
        if self._open_outputs is not None:
            return {name: {0: self._open_outputs} for name in self._names}
        if not self._batches:
            return {}
        first, second = (_outputs(self._model, self._inputs(size)) for size in (2, 3))
        batched = zip(self._inputs_names, self._sample, self._inputs(len(self._sample[0]) + 1))
        axes: dict[str, dict[int, str]] = {
            name: {0: "batch"} for name, one, other in batched if one.shape != other.shape
        }
        for name, one, other in zip(self._names, first, second):
            sizes = list(enumerate(zip(one.shape, other.shape)))
            axes[name] = {
                axis: "batch" if pair == (2, 3) else f"{name}_{axis}"
                for axis, pair in sizes
                if pair[0] != pair[1]
            }
        return axes

    def _inputs(self, size: int) -> tuple[torch.Tensor, ...]:
        """A batch of random inputs, all different; whole numbers are those of the example."""
        generator, count = torch.Generator().manual_seed(size), len(self._sample[0])

        def drawn(sample: torch.Tensor) -> torch.Tensor:
            shape = (size, *sample.shape[1:]) if sample.dim() and len(sample) == count else sample.shape
            if sample.is_floating_point():
                return torch.randn(shape, generator=generator)
            return sample[:1].expand(shape).contiguous() if sample.dim() else sample

        return tuple(drawn(sample) for sample in self._sample)

    def _wrong(self, graph: Any, sizes: tuple[int, ...]) -> str | None:
        """Describe how a graph differs from the model for these batch sizes; None if it does not."""
        try:
            session = open_session(graph.SerializeToString())
            for size in sizes:
                inputs = self._inputs(size)
                feeds = {name: each.numpy() for name, each in zip(self._inputs_names, inputs)}
                found = run_session(session, feeds)
                right = [value.numpy() for value in _outputs(self._model, inputs)]
                if (wrong := gross_difference(right, found, size)) is not None:
                    return wrong
        except ExportError as error:
            return f"ONNX Runtime cannot run it ({error.message.rstrip('.')})"
        return None

    def _fixed(self, why: str) -> ExportError:
        said = f" Tensors become Python numbers in {_listed(self._places)}." if self._places else ""
        return ExportError(
            f"The network's forward fixes the batch size, so that a dynamic batch cannot be exported: {why}.{said}",
            "Keep the batch size symbolic in forward: x.flatten(1), x.reshape(x.shape[0], ...), "
            "x.new_zeros(x.shape[0], ...), without int(...), len(x) or a branch on it. Or export a fixed batch.",
        )

    def _hint(self) -> str:
        inputs = self._inputs(len(self._sample[0]))
        if any(not torch.equal(*pair) for pair in zip(*(_outputs(self._model, inputs) for _ in range(2)))):
            return "Two runs of the network on the same input differ: its forward is random even in evaluation mode."
        if self._places:
            return f"The control flow must not depend on the values of the input: see {_listed(self._places)}."
        return "Try another opset, or replace the operation: the exporter or ONNX Runtime computes it wrongly."


def _listed(places: Sequence[str]) -> str:
    return "; ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


_OWN = tuple(str(folder) + os.sep for folder in (Path(__file__).parents[1], Path(torch.__file__).parent))


def _place() -> str | None:
    """The running line of the network's code for messages: `net.py:12 "n = int(x.shape[0])"`."""
    for frame, line in traceback.walk_stack(None):
        name = frame.f_code.co_filename
        if not name.startswith(_OWN) and Path(name).name != "warnings.py":
            return f'{Path(name).name}:{line} "{linecache.getline(name, line).strip()[:80]}"'
    return None


class _Off:
    """A false value that also returns False when it is called."""

    def __bool__(self) -> bool:
        return False

    def __call__(self) -> bool:
        return False


@contextmanager
def _exporter_silenced() -> Iterator[list[str]]:
    """Suppress the tracing exporter's own messages and warnings, and no others.

    Yields:
        The lines of forward in which a tensor became a Python number.
    """
    # the exporter tests this function itself, not its result, and so always prints the graph of a network that it
    # cannot write
    switch = "_jit_is_onnx_log_enabled"
    before = getattr(torch._C, switch, None)
    with warnings.catch_warnings():
        for message in (
            "You are using the legacy TorchScript-based ONNX export",
            "The feature will be removed",
            "`torch.jit.script` is deprecated",
            ".*Constant folding",
            "Exporting a model to ONNX with a batch_size other than 1",
            "ONNX export mode is set to TrainingMode.EVAL",
        ):
            warnings.filterwarnings("ignore", message=message)
        places: list[str] = []
        shown = warnings.showwarning

        def noted(message: Any, category: Any, *where: Any) -> None:
            if not issubclass(category, TracerWarning):
                shown(message, category, *where)
            elif (place := _place()) is not None and place not in places:
                places.append(place)

        warnings.showwarning = noted  # type: ignore[assignment]  # restored with the filters
        warnings.filterwarnings("always", category=TracerWarning)
        try:
            if before is not None:
                setattr(torch._C, switch, _Off())
            yield places
        finally:
            if before is not None:
                setattr(torch._C, switch, before)


def _trace(
    model: nn.Module,
    sample: Sequence[torch.Tensor],
    opset: int,
    inputs: Sequence[str],
    names: Sequence[str],
    open_axes: dict[str, dict[int, str]],
) -> tuple[bytes, list[str]]:
    """Trace a model; return the file's bytes and the lines of forward in which tensors became Python numbers."""
    buffer = io.BytesIO()
    try:
        with _exporter_silenced() as places, torch.no_grad(), Writable(opset, model):
            torch.onnx.export(
                model,
                tuple(sample),
                buffer,  # type: ignore[arg-type]  # its annotation allows only paths
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(names),
                dynamic_axes=open_axes or None,
                dynamo=False,
            )
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # OnnxExporterError is a RuntimeError
        raise ExportError(
            f"The model cannot be written as ONNX opset {opset}: {first_line(error)}.",
            "Replace the operation by one that ONNX supports, or try a higher opset if the device allows it.",
        ) from error
    return buffer.getvalue(), places
