"""The network with each part in FP32 or INT8: plans by noise and time, measured on this machine's CPU, and one of them.

The parts' noise and times give a few plans, from all in FP32 to the fastest (`export.convert.mixed`). Each of them is
written, timed in turns with the FP32 network, and scored, because neither times nor accuracies of parts add up exactly.

Which one is taken: of the plans that lose no more than is allowed the fastest, since INT8 is wanted for nothing else.
Of plans that the measurement cannot tell apart from it, the one that adds the least noise, which tells them apart where
the score of some thousand images does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.manifest import LayerPrecision, PrecisionPlan
from compressor.core.progress import bar, say
from compressor.latency.backends.cpu import measured
from compressor.latency.precisions import part_prices
from compressor.latency.provider import Request, Turns
from export.convert.calibrated import ONNXRUNTIME, Calibrated, check_calibration, enclosed
from export.convert.half import open_fp32
from export.convert.mixed import parts_of, plans, predicted_ms
from export.convert.ort import onnx_outputs
from export.convert.quantize import held_out, noise, sensitivities, write_quantised
from export.files import read_bytes, write_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

    from export.convert.mixed import Parts, Prices

MOST_PLANS = 8
"""Plans that are measured, with all parts in FP32 and all in INT8 among them."""

REPEATS = 4
"""Pairs of processes in which a plan is timed."""

SAME = 0.01
"""Relative difference of two measured times that counts as none."""


@dataclass(frozen=True)
class MixedInfo:
    """A mixed file.

    Attributes:
        plans: The measured plans, of which one is chosen.
        layers: Each quantisable layer, in the order of the file.
        images: Inputs that gave the ranges.
        rounding: How the weights are rounded.
        rule: How the plan was chosen.
    """

    plans: tuple[PrecisionPlan, ...]
    layers: tuple[LayerPrecision, ...]
    images: int
    rounding: str
    rule: str

    @property
    def chosen(self) -> PrecisionPlan:
        """The plan of the file."""
        return next(plan for plan in self.plans if plan.chosen)


def write_mixed(
    source: Path,
    target: Path,
    calibration: npt.NDArray[Any],
    score: Callable[[Path], float],
    *,
    max_drop: float,
    method: str = "minmax",
    rounding: str = "nearest",
    request: Request | None = None,
) -> MixedInfo:
    """Write the FP32 network with its parts in the precisions that the measured times and the score choose.

    Args:
        source, target: FP32 file and new file.
        calibration: Real inputs (N, C, H, W); the last ones judge the noise and give no ranges for it.
        score: Returns the accuracy of a file, 0 to 1.
        max_drop: Maximum drop of the score against the FP32 file, 0 to 1.
        method: How ranges are calibrated.
        rounding: How the weights of the chosen plan are rounded, if that adds less noise than to the nearest.
        request: Threads and streams with which plans are timed; None for one of each.

    Raises:
        ExportError: The file or the inputs are not usable.
    """
    load = request or Request()
    proto, header = open_fp32(source)
    fitted, judged = held_out(check_calibration(calibration, header))
    calibrated = Calibrated(proto, header.inputs[0], fitted, method, runtime=ONNXRUNTIME)
    parts = parts_of(proto, ONNXRUNTIME)
    say(f"Measuring the noise and the times of {len(parts.parts)} parts in FP32 and INT8.")
    alone = sensitivities(calibrated, [part.nodes for part in parts.parts], judged)
    prices = part_prices(calibrated, parts, alone, threads=load.threads)
    every = tuple(range(len(parts.parts)))

    def whole(plan: tuple[int, ...]) -> tuple[int, ...]:
        """Return a plan with the parts that the others make INT8."""
        names = set(enclosed(proto, parts.nodes(plan), ONNXRUNTIME))
        return tuple(index for index in every if names.issuperset(parts.parts[index].nodes))

    wanted = list(dict.fromkeys([*map(whole, plans(parts, prices, MOST_PLANS - 1)), every]))
    exact, before = onnx_outputs(source, judged), score(source)
    found: list[PrecisionPlan] = []

    def write(nodes: Sequence[str]) -> None:
        if nodes:
            write_quantised(calibrated, header, target, nodes)
        else:
            write_bytes(target, read_bytes(source, "ONNX file"))

    with bar("Measuring plans", len(wanted)) as progress:
        for plan in wanted:
            nodes = parts.nodes(plan)
            write(nodes)
            ratio = measured(source, target, load, Turns(repeats=REPEATS)).ratio if nodes else None
            found.append(
                PrecisionPlan(
                    int8=len(nodes),
                    predicted_ratio=predicted_ms(parts, prices, plan) / predicted_ms(parts, prices, ()),
                    ratio=1.0 if ratio is None else ratio.value,
                    interval=[1.0, 1.0] if ratio is None else [ratio.low, ratio.high],
                    noise=noise(exact, onnx_outputs(target, judged)),
                    score=score(target),
                )
            )
            progress.advance(1, note=f"{found[-1].ratio:.3f} of FP32")
    place, rule = chosen_of(found, before, max_drop)
    nodes = parts.nodes(wanted[place])
    if rounding != "nearest" and nodes:
        write_quantised(calibrated, header, target, nodes, rounding=rounding)
        less = noise(exact, onnx_outputs(target, judged))
        if less < found[place].noise:  # as fast: only weights differ
            found[place] = found[place].model_copy(update={"noise": less, "score": score(target)})
        else:
            rounding = "nearest"
    if rounding == "nearest" or not nodes:
        write(nodes)
    found[place] = found[place].model_copy(update={"chosen": True})
    return MixedInfo(tuple(found), tuple(_layers(parts, prices, set(wanted[place]))), len(fitted), rounding, rule)


def chosen_of(found: Sequence[PrecisionPlan], before: float, max_drop: float) -> tuple[int, str]:
    """Return the place of the plan that is taken, and why.

    Args:
        found: The measured plans, the FP32 network among them.
        before: Score of the FP32 file.
        max_drop: How much of it may be lost.
    """
    good = [place for place, plan in enumerate(found) if before - plan.score <= max_drop + 1e-9]
    fastest = min(good, key=lambda place: found[place].ratio)
    limit = max(found[fastest].high, (1 + SAME) * found[fastest].ratio)
    alike = [place for place in good if found[place].ratio <= limit]
    return (
        min(alike, key=lambda place: found[place].noise),
        f"the fastest that loses at most {100 * max_drop:g} points on the search split, and of those whose times "
        "cannot be told apart from it the one with the least noise",
    )


def _layers(parts: Parts, prices: Prices, chosen: set[int]) -> Iterator[LayerPrecision]:
    for index, part in enumerate(parts.parts):
        for name in part.nodes:
            yield LayerPrecision(
                name=name,
                precision="int8" if index in chosen else "fp32",
                noise=prices.noise[index],
                fp32_ms=prices.float_ms[index],
                int8_ms=prices.int8_ms[index],
            )
