"""Quantises an ONNX file to INT8 with Q/DQ pairs, for TensorRT 8.5 to 11 or for ONNX Runtime's CPU kernels.

`calibrated` says where each runtime wants the pairs. Here files are written: with all nodes that can be quantised, with
a choice of them, or with as few of the sensitive ones in float as an accuracy requires.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from export.convert.calibrated import (
    FORMS,
    LEVELS,
    METHODS,
    PERCENTILE,
    TENSORRT,
    Calibrated,
    check_calibration,
    enclosed,
    quantisable,
)
from export.convert.half import half_rest, open_fp32
from export.convert.onnx_header import OnnxHeader
from export.convert.ort import onnx_outputs
from export.convert.rounding import round_weights
from export.convert.tidy import write_metadata
from export.errors import DropError, ExportError
from export.files import replacing, sha256_bytes, write_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

RESTS = ("fp32", "fp16")
ROUNDINGS = ("nearest", "outputs")
_JUDGED_ON = 32  # inputs on which the effect of single nodes is measured; most of them
OVERFLOW_INPUTS = 32
"""Inputs on which overflows of FP16 are looked for."""



@dataclass(frozen=True)
class QuantInfo:
    """The facts of a written INT8 file.

    Attributes:
        path, sha256, size: The file, its checksum and size in bytes; weights are stored as floats.
        method: The calibration method.
        samples: Number of calibration inputs.
        quantised: Nodes that compute in INT8.
        kept: Nodes that could be quantised but stay in float.
        trained: Number of activations whose ranges are those of a training.
        levels: Largest whole number of a weight: 127, or 64 where ONNX Runtime's sums on this CPU saturate.
    """

    path: Path
    sha256: str
    size: int
    method: str
    samples: int
    quantised: tuple[str, ...]
    kept: tuple[str, ...]
    trained: int = 0
    levels: int = LEVELS


def quantize_onnx(
    source: str | Path,
    target: str | Path,
    calibration: npt.NDArray[Any],
    *,
    method: str = "minmax",
    percentile: float = PERCENTILE,
    keep: Iterable[str] = (),
    only: Iterable[str] | None = None,
    rest: str = "fp32",
    runtime: str = TENSORRT,
    rounding: str = "nearest",
    trained: Mapping[str, tuple[float, float]] | None = None,
) -> QuantInfo:
    """Quantise an FP32 ONNX file to INT8.

    Args:
        source: The FP32 file.
        target: The INT8 file, written atomically.
        calibration: Real inputs (N, C, H, W), preprocessed as for the network; 100 to 500 are usual.
        method: The calibration of activation ranges: "minmax" takes the full range, "entropy" and
            "percentile" clip rare large values.
        percentile: Percentile of the values that "percentile" keeps.
        keep: Names of nodes to keep in float.
        only: Names of the nodes to quantise; None is all that can be quantised.
        rest: Precision of the other nodes, "fp32" or "fp16". TensorRT 10 and newer follow it.
        runtime: What the file is for, a key of `FORMS`. TensorRT refuses the form of "onnxruntime", and ONNX Runtime
            computes that of "tensorrt" right, but mostly in floats and so without gain.
        rounding: How weights are rounded: each to the "nearest", or for the "outputs" of its layer, which takes about
            a second for each layer of a network of 224 pixels; see `rounding`.
        trained: Ranges that a training with fake quantisation has found: qualified name of a module -> least and
            largest input. They take the place of calibrated ones.

    Raises:
        ExportError: the file is damaged, not FP32 or has nothing to quantise, the calibration inputs are
            missing, constant, not finite or have the wrong shape, or a name is unknown.
    """
    if rest not in RESTS:
        raise ExportError(f"The other nodes compute in {' or '.join(RESTS)}, not in {rest!r}.")
    if runtime not in FORMS:
        raise ExportError(f"INT8 is written for {' or '.join(FORMS)}, not for {runtime!r}.")
    if rest == "fp16" and not FORMS[runtime].symmetric:
        raise ExportError(f"The other nodes compute in fp32 where INT8 is for {runtime}.", "Leave --rest out.")
    if rounding not in ROUNDINGS:
        raise ExportError(f"Weights are rounded to the {' or '.join(ROUNDINGS)}, not to {rounding!r}.")
    if method not in METHODS:
        raise ExportError(f"Calibration method {method!r} is unknown: expected one of {', '.join(METHODS)}.")
    proto, header = open_fp32(source)
    inputs = check_calibration(calibration, header)
    able = quantisable(proto)
    if not able:
        raise ExportError(f"{source} has no convolution, product or residual sum to quantise.")
    unknown = sorted({*keep, *(only or ())} - {node.name for node in header.nodes})
    if unknown:
        raise ExportError(f"{source} has no node {unknown[0]}.")
    wanted = set(able if only is None else only) - set(keep)
    chosen = [name for name in able if name in wanted]
    if not chosen:
        raise ExportError(f"{source} has no node left to quantise: all nodes stay in float.")
    calibrated = Calibrated(proto, header.inputs[0], inputs, method, percentile, runtime, trained)
    return write_quantised(calibrated, header, target, chosen, rest=rest, rounding=rounding)


def write_quantised(
    calibrated: Calibrated,
    header: OnnxHeader,
    target: str | Path,
    nodes: Sequence[str],
    *,
    rest: str = "fp32",
    rounding: str = "nearest",
) -> QuantInfo:
    """Write a calibrated network with some of its nodes in INT8.

    Args:
        calibrated: The network.
        header: Header of its FP32 file.
        target: The INT8 file, written atomically.
        nodes: Names of the nodes to quantise; those that are `enclosed` by them are quantised too.
        rest, rounding: As in `quantize_onnx`.
    """
    import onnx

    nodes = enclosed(calibrated.proto, nodes, calibrated.runtime)
    weights = calibrated if rounding == "nearest" else calibrated.with_weights(round_weights(calibrated, nodes))
    made = with_rest(weights, nodes, rest)
    kept = [name for name in quantisable(calibrated.proto) if name not in set(nodes)]
    facts: dict[str, Any] = {
        **header.metadata, "precision": "int8", "rest": rest,
        "calibration": {"method": calibrated.method, "samples": len(calibrated.inputs)},
    }  # fmt: skip
    if calibrated.trained:
        facts["trained_ranges"] = len(calibrated.trained)
    if calibrated.runtime != TENSORRT:
        facts["runtime"] = calibrated.runtime
    if calibrated.levels != LEVELS:
        facts["weight_levels"] = calibrated.levels
    if rounding != "nearest":
        facts["rounding"] = rounding
    write_metadata(made, {**facts, "float_nodes": kept} if kept else facts)
    made.producer_name, _, made.producer_version = header.producer.partition(" ")
    onnx.checker.check_model(made, full_check=True)
    written = made.SerializeToString(deterministic=True)
    write_bytes(Path(target), written)
    return QuantInfo(
        path=Path(target),
        sha256=sha256_bytes(written),
        size=len(written),
        method=calibrated.method,
        samples=len(calibrated.inputs),
        quantised=tuple(nodes),
        kept=tuple(kept),
        trained=len(calibrated.trained),
        levels=calibrated.levels,
    )


def with_rest(calibrated: Calibrated, nodes: Sequence[str], rest: str) -> Any:
    """Return the network with these nodes in INT8 and the others in a precision of `RESTS`.

    Args:
        calibrated: The network.
        nodes: Names of nodes, maybe none; with those that are `enclosed` by them.
        rest: Precision of the others.
    """
    made = calibrated.quantise(nodes) if nodes else copy.deepcopy(calibrated.proto)
    if rest == "fp16":
        half_rest(made, calibrated.inputs[:OVERFLOW_INPUTS])
    return made


@dataclass(frozen=True)
class WithinInfo:
    """The result of `quantize_within`.

    Attributes:
        quant: The INT8 file.
        before, after: Scores of the FP32 file and of the INT8 file.
        all_int8: Score with all nodes in INT8.
    """

    quant: QuantInfo
    before: float
    after: float
    all_int8: float


def quantize_within(
    source: str | Path,
    target: str | Path,
    calibration: npt.NDArray[Any],
    score: Callable[[Path], float],
    *,
    max_drop: float,
    method: str = "minmax",
    percentile: float = PERCENTILE,
    rest: str = "fp32",
    runtime: str = TENSORRT,
    rounding: str = "nearest",
    trained: Mapping[str, tuple[float, float]] | None = None,
) -> WithinInfo:
    """Quantise to INT8 with at most `max_drop`, keeping as few of the most sensitive nodes in float as possible.

    Args:
        source, target, calibration, method, percentile, rest, runtime, rounding, trained: As in `quantize_onnx`.
        score: Returns the accuracy of a file, 0 to 1, such as `accuracy_onnx` on the test split.
        max_drop: Maximum drop of the score against the FP32 file, 0 to 1.

    Raises:
        ExportError: as `quantize_onnx`, or no choice of nodes is within `max_drop` (`DropError`); `target` is kept.
    """
    if not 0 <= max_drop < 1:
        raise ExportError(f"The maximum drop must be from 0 to below 1, got {max_drop}.")
    goal = Path(target)
    before = score(Path(source))
    with replacing(goal) as trial:

        def attempt(keep: list[str]) -> tuple[QuantInfo, float]:
            info = quantize_onnx(
                source,
                trial,
                calibration,
                method=method,
                percentile=percentile,
                keep=keep,
                rest=rest,
                runtime=runtime,
                rounding=rounding,
                trained=trained,
            )
            return info, score(trial)

        info, all_int8 = attempt([])
        after = all_int8
        if before - after > max_drop:
            proto, header = open_fp32(source)
            able, inputs = quantisable(proto), check_calibration(calibration, header)
            fitted, judged = held_out(inputs)
            calibrated = Calibrated(proto, header.inputs[0], fitted, method, percentile, runtime, trained)
            found = dict(zip(able, sensitivities(calibrated, [[name] for name in able], judged)))
            ranked = sorted(able, key=lambda name: (-found[name], name))
            info, after = _fewest(ranked, attempt, before - max_drop)
    return WithinInfo(quant=replace(info, path=goal), before=before, after=after, all_int8=all_int8)


def _fewest(
    ranked: list[str], attempt: Callable[[list[str]], tuple[QuantInfo, float]], least: float
) -> tuple[QuantInfo, float]:
    """Keep 1, 2, 4, ... of the most sensitive nodes until the score suffices, then bisect for the fewest."""
    low, high = 0, 1
    best, tried = 0.0, 0
    while True:
        count = min(high, len(ranked) - 1)
        if count <= tried:
            raise DropError(
                f"INT8 reaches an accuracy of {best:.2%} at best, with {tried} of {len(ranked)} nodes in float; "
                f"at least {least:.2%} is required.",
                "Allow a larger drop, or calibrate on more inputs or by percentile.",
            )
        info, after = attempt(ranked[:count])
        tried = count
        best = max(best, after)
        if after >= least:
            break
        low, high = count, high * 2
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        fewer, reached = attempt(ranked[:middle])
        if reached >= least:
            high, info, after = middle, fewer, reached
        else:
            low = middle
    return attempt(ranked[:high]) if len(info.kept) != high else (info, after)


def held_out(inputs: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Split calibration inputs into those that give the ranges and those that judge; a few inputs do both."""
    number = min(_JUDGED_ON, len(inputs) // 4)
    return (inputs[:-number], inputs[-number:]) if number else (inputs, inputs)


def sensitivities(
    calibrated: Calibrated, groups: Sequence[Sequence[str]], judged: npt.NDArray[Any]
) -> list[float]:
    """Measure the noise that quantising each group of nodes alone adds to the outputs; see `noise`.

    Args:
        calibrated: The network.
        groups: Names of nodes.
        judged: Inputs, other than those that gave the ranges.
    """
    exact = onnx_outputs(calibrated.proto.SerializeToString(), judged)
    return [
        noise(exact, onnx_outputs(calibrated.quantise(group).SerializeToString(), judged)) for group in groups
    ]


def noise(exact: Sequence[npt.NDArray[Any]], found: Sequence[npt.NDArray[Any]]) -> float:
    """Squared difference of outputs as a share of the exact ones' variance over the inputs; the mean of all outputs.

    The noise of layers that are quantised together is about the sum of their own: their errors are small and hardly
    depend on one another.
    """
    import numpy as np

    shares = []
    for right, judged in zip(exact, found):
        wide = right.astype(np.float64)
        variance = float(np.square(wide - wide.mean(axis=0)).mean()) or float(np.square(wide).mean())
        shares.append(float(np.square(judged - wide).mean()) / max(variance, 1e-30))
    return float(np.mean(shares))
