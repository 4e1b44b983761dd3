"""Weights that are rounded for a layer's outputs instead of one by one, and biases that keep their means.

Rounding to the nearest is best for each weight, but not for the layer: where inputs vary together, the error of one
weight can be made good by weights that are rounded after it. Layer by layer, in the order of the network:

1. The layer's inputs are those of the network as it is quantised so far, so that errors of earlier layers count.
2. Its weights are rounded one input after the other, and each error is moved to the weights that are not yet rounded,
   as least squares says (Frantar and Alistarh 2022, optimal brain compression; Frantar et al. 2023, GPTQ).
3. The bias takes up the difference of the mean outputs from those of the FP32 layer.

This follows from second moments of the inputs, and needs no labels and no training. The rounded weights are stored as
floats that the file's scales represent exactly: any runtime that rounds to the nearest computes with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from export.convert.calibrated import Calibrated
from export.convert.ort import open_session, run_session

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.floating[Any]]

IMAGES = 64
"""Calibration inputs that are used; most of them."""

SAMPLES_PER_INPUT, FEWEST_SAMPLES = 6, 2048
"""Output positions that are used, over all images: for each input of an output, and fewest."""

LARGEST = 2400
"""Inputs of one output up to which errors are moved; other layers are left to the nearest."""

DAMPING = 0.01
"""Added to the inputs' variance where errors are moved, in units of its mean."""


def round_weights(calibrated: Calibrated, nodes: Sequence[str]) -> Any:
    """Return the FP32 network with weights that are rounded for the outputs of the nodes that are quantised.

    Args:
        calibrated: The network, with the inputs that gave its ranges.
        nodes: Names of the nodes to quantise.
    """
    import numpy as np
    from onnx import numpy_helper

    proto = type(calibrated.proto)()
    proto.CopyFrom(calibrated.proto)
    quantised = calibrated.quantise(nodes, float_biases=True)
    networks = [{tensor.name: tensor for tensor in each.graph.initializer} for each in (proto, quantised)]
    read_by = {node.name: node.input[0] for node in quantised.graph.node}
    images = calibrated.inputs[-IMAGES:]
    layers = [layer for layer in _layers(proto) if layer.node.name in set(nodes)]
    goals = _goals(calibrated.proto, layers, images)
    for index, layer in enumerate(layers):
        values = _values(quantised, [read_by[layer.node.name]], images)
        inputs = np.concatenate(
            [layer.patches(value, (index, image), len(images)) for image, (value,) in enumerate(values)], axis=1
        )
        old = [numpy_helper.to_array(networks[0][name]) for name in layer.stored]
        rows, bias = _rounded(layer.rows(old[0]), inputs, goals[index], len(old) > 1, calibrated.levels)
        new = [layer.unrolled(rows, old[0].shape), *([bias.reshape(-1)] if len(old) > 1 else [])]
        for tensors in networks:
            for name, value in zip(layer.stored, new):
                tensors[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
        scale = f"{layer.stored[0]}_scale"  # of the network as it is quantised so far
        steps = _scale(rows, calibrated.levels).reshape(-1).astype(np.float32)
        networks[1][scale].CopyFrom(numpy_helper.from_array(steps, scale))
    return proto


@dataclass(frozen=True)
class _Layer:
    """A node with stored weights, as matrices (groups, outputs, inputs) that patches of its input are multiplied by.

    Attributes:
        node: The node.
        stored: Names of its weight and, if it has one, its bias.
        kernel: Size of its kernel; empty for a product.
        groups: Groups of a convolution.
        inputs: Inputs of one output.
        transposed: Whether a product's weight has a row for each output.
    """

    node: Any
    stored: tuple[str, ...]
    kernel: tuple[int, ...]
    groups: int
    inputs: int
    transposed: bool

    def rows(self, weight: Floats) -> Floats:
        """Return a stored weight as matrices."""
        if self.kernel:
            return weight.reshape(self.groups, len(weight) // self.groups, -1)
        return (weight if self.transposed else weight.T)[None]

    def unrolled(self, rows: Floats, shape: tuple[int, ...]) -> Floats:
        """Return matrices as a stored weight of this shape."""
        if self.kernel:
            return rows.reshape(shape)
        found: Floats = rows[0] if self.transposed else rows[0].T
        return found

    def patches(self, x: Floats, seed: tuple[int, int], images: int) -> Floats:
        """Return the inputs of randomly drawn output positions: (groups, n, inputs).

        Args:
            x: The node's input for one image.
            seed: Numbers of the layer and of the image: the same ones draw the same positions.
            images: Number of all images.
        """
        import numpy as np

        if self.kernel:
            facts = {entry.name: list(entry.ints) for entry in self.node.attribute}
            rank = len(self.kernel)
            strides, dilations = (facts.get(name) or [1] * rank for name in ("strides", "dilations"))
            pads = facts.get("pads") or [0] * (2 * rank)
            x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:])])
            spans = tuple(dilation * (size - 1) + 1 for size, dilation in zip(self.kernel, dilations))
            windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=tuple(range(2, 2 + rank)))
            every = [slice(None, None, step) for step in (*strides, *dilations)]
            windows = np.moveaxis(windows[(slice(None), slice(None), *every)], 1, 1 + rank)
            shape = windows.shape[: 1 + rank]  # image and position; then channel and kernel
        else:
            windows = x.reshape(-1, x.shape[-1])
            shape = windows.shape[:1]
        each = math.ceil(max(FEWEST_SAMPLES, SAMPLES_PER_INPUT * self.inputs) / images)
        count = math.prod(shape)
        places = np.arange(count)
        if each < count:
            places = np.sort(np.random.default_rng(seed).choice(count, each, replace=False))
        found = windows[np.unravel_index(places, shape)]
        return np.moveaxis(found.reshape(len(places), self.groups, -1), 1, 0)


def _layers(proto: Any) -> Iterator[_Layer]:
    """Yield the convolutions and products whose weights can be rounded here."""
    stored = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    uses: dict[str, int] = {}
    for node in proto.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    for node in proto.graph.node:
        facts = {entry.name: entry for entry in node.attribute}
        shape = stored.get(node.input[1]) if len(node.input) > 1 else None
        own = tuple(name for name in node.input[1:] if name)
        padded = "auto_pad" in facts and facts["auto_pad"].s not in (b"", b"NOTSET")
        if shape is None or padded or any(uses[name] > 1 or name not in stored for name in own):
            continue
        if node.op_type == "Conv":
            groups = facts["group"].i if "group" in facts else 1
            layer = _Layer(node, own, shape[2:], groups, math.prod(shape[1:]), False)
        elif node.op_type in ("Gemm", "MatMul") and len(shape) == 2:
            transposed = "transB" in facts and facts["transB"].i == 1
            layer = _Layer(node, own, (), 1, shape[1] if transposed else shape[0], transposed)
        else:
            continue
        if layer.inputs <= LARGEST:
            yield layer


def _goals(proto: Any, layers: Sequence[_Layer], images: Floats) -> list[Floats]:
    """Return the mean outputs of the layers at their positions in the FP32 network, (groups, outputs) each."""
    import numpy as np
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    sums: list[list[Floats]] = [[] for _ in layers]
    counts = [0] * len(layers)
    for image, values in enumerate(_values(proto, [layer.node.input[0] for layer in layers], images)):
        for index, (layer, value) in enumerate(zip(layers, values)):
            patches = layer.patches(value, (index, image), len(images))
            sums[index].append(patches.sum(axis=1, dtype=np.float64))
            counts[index] += patches.shape[1]
    found = []
    for layer, parts, count in zip(layers, sums, counts):
        weight, *bias = (arrays[name] for name in layer.stored)
        output = (layer.rows(weight) @ (np.sum(parts, axis=0) / count)[:, :, None])[:, :, 0]
        found.append(output + (bias[0].reshape(output.shape) if bias else 0))
    return found


def _values(proto: Any, names: Sequence[str], images: Floats) -> Iterator[list[Floats]]:
    """Yield some values of a network for each image."""
    import onnx

    given = proto.graph.input[0].name
    inside = sorted({name for name in names if name != given})
    part = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(proto)).extract_model([given], inside)
    session = open_session(part.SerializeToString()) if inside else None
    for start in range(len(images)):
        image = images[start : start + 1]
        found = dict(zip(inside, run_session(session, {given: image}))) if session else {}
        yield [image if name == given else found[name] for name in names]


def _rounded(old: Floats, x: Floats, y: Floats, constant: bool, levels: int) -> tuple[Floats, Floats]:
    """Return the rounded weights (groups, outputs, inputs) of a layer and its bias (groups, outputs).

    Args:
        old: Its weights.
        x: Its inputs (groups, n, inputs) in the quantised network.
        y: Its mean outputs (groups, outputs) in the FP32 network.
        constant: Whether it has a bias.
        levels: Largest whole number of a weight.
    """
    import numpy as np

    wide, scale = x.astype(np.float64), _scale(old, levels).astype(np.float64)
    mean = wide.mean(axis=1, keepdims=True) if constant else np.zeros(1)
    rounded = (scale * _moved(old / scale, wide - mean, levels)).astype(np.float32)
    if not constant:
        return rounded, np.zeros(rounded.shape[:2])
    return rounded, y - (mean @ np.swapaxes(rounded, 1, 2))[:, 0]


def _scale(rows: Floats, levels: int) -> Floats:
    """Return what one step is for each output's weights, (groups, outputs, 1), as ONNX Runtime chooses it."""
    import numpy as np

    largest = np.abs(rows).max(axis=2, keepdims=True)
    return np.where(largest > 0, largest / levels, 1.0)


def _moved(rows: Floats, x: Floats, levels: int) -> Floats:
    """Round scaled weights (groups, outputs, inputs), one input after the other, those that vary most first.

    The largest weight of each output stays the largest: it gives the scale.
    """
    import numpy as np

    square = np.swapaxes(x, 1, 2) @ x
    groups, count = np.arange(len(rows))[:, None], rows.shape[2]
    variance = np.trace(square, axis1=1, axis2=2) / count
    square = square + np.maximum(DAMPING * variance, 1e-12)[:, None, None] * np.eye(count)
    order = np.argsort(-np.diagonal(square, axis1=1, axis2=2), axis=1)
    square = square[groups[:, :, None], order[:, :, None], order[:, None, :]]
    factor = np.swapaxes(np.linalg.cholesky(np.linalg.inv(square)), 1, 2)  # upper
    left = np.take_along_axis(rows, order[:, None, :], axis=2).copy()
    largest = np.abs(left).argmax(axis=2)
    signs = np.sign(np.take_along_axis(left, largest[:, :, None], axis=2))[:, :, 0]
    whole = np.empty_like(left)
    for place in range(count):
        value = np.clip(np.rint(left[:, :, place]), -levels, levels)
        whole[:, :, place] = np.where(largest == place, levels * signs, value)
        gap = (left[:, :, place] - whole[:, :, place]) / factor[:, place, place][:, None]
        left[:, :, place + 1 :] -= gap[:, :, None] * factor[:, place, None, place + 1 :]
    found = np.empty_like(whole)
    np.put_along_axis(found, np.broadcast_to(order[:, None, :], whole.shape), whole, axis=2)
    return found
