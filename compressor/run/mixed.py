"""The network with each part in floats or INT8: plans by noise and time, measured on the device, and one of them.

The parts' noise and times give a few plans, from all in floats to the fastest (`export.convert.mixed`). Each of them is
written, timed in turns with the network in floats, and scored, because neither times nor accuracies of parts add up
exactly. Floats are FP32 on this machine's CPU and FP16 with TensorRT.

Which one is taken: of the plans that lose no more than is allowed the fastest, since INT8 is wanted for nothing else.
Of plans that the measurement cannot tell apart from it, the one that adds the least noise, which tells them apart where
the score of some thousand images does not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.manifest import LayerPrecision, PrecisionPlan
from compressor.core.progress import bar, say
from compressor.latency.precisions import part_prices
from compressor.run.contract import interval_of
from export.convert.calibrated import Calibrated, check_calibration, enclosed
from export.convert.half import convert_half, open_fp32
from export.convert.mixed import Parts, parts_of, plans, plans_by_noise, predicted_ms
from export.convert.ort import onnx_outputs
from export.convert.quantize import OVERFLOW_INPUTS, held_out, noise, sensitivities, write_quantised
from export.errors import DropError, ExportError
from export.files import read_bytes, write_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

    from compressor.latency.precisions import PrecisionTimer
    from export.convert.mixed import Prices
    from export.convert.onnx_header import OnnxHeader

MOST_PLANS = 8
"""Plans that are measured, with all parts in floats and all in INT8 among them."""

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


Plan = tuple[int, ...]
"""The parts in INT8."""


@dataclass(frozen=True)
class _Subject:
    """The network whose plans are written: its FP32 file, its ranges, its parts, and the precision of the others."""

    source: Path
    header: OnnxHeader
    calibrated: Calibrated
    parts: Parts
    floats: str

    def whole(self, plan: Plan) -> Plan:
        """Return a plan with the parts that the others make INT8."""
        names = set(enclosed(self.calibrated.proto, self.parts.nodes(plan), self.calibrated.runtime))
        return tuple(index for index, part in enumerate(self.parts.parts) if names.issuperset(part.nodes))

    def write(self, plan: Plan, path: Path, rounding: str = "nearest") -> Path:
        """Write the file of a plan."""
        if plan:
            nodes = self.parts.nodes(plan)
            write_quantised(self.calibrated, self.header, path, nodes, rest=self.floats, rounding=rounding)
        elif self.floats == "fp16":
            convert_half(self.source, path, inputs=self.calibrated.inputs[:OVERFLOW_INPUTS])
        else:
            write_bytes(path, read_bytes(self.source, "ONNX file"))
        return path


def write_mixed(
    source: Path,
    target: Path,
    calibration: npt.NDArray[Any],
    score: Callable[[Path], float],
    timer: PrecisionTimer,
    *,
    max_drop: float,
    method: str = "minmax",
    rounding: str = "nearest",
) -> MixedInfo:
    """Write the FP32 network with its parts in the precisions that the measured times and the score choose.

    Args:
        source, target: FP32 file and new file.
        calibration: Real inputs (N, C, H, W); the last ones judge the noise and give no ranges for it.
        score: Returns the accuracy of a file, 0 to 1.
        timer: The device: form of the file, precision of the parts that are not in INT8, and times.
        max_drop: Maximum drop of the score against the FP32 file, 0 to 1.
        method: How ranges are calibrated.
        rounding: How the weights of the chosen plan are rounded, if that adds less noise than to the nearest.

    Raises:
        ExportError: The file or the inputs are not usable, no plan can be measured, or all lose more than is allowed.
    """
    proto, header = open_fp32(source)
    fitted, judged = held_out(check_calibration(calibration, header))
    calibrated = Calibrated(proto, header.inputs[0], fitted, method, runtime=timer.runtime)
    subject = _Subject(source, header, calibrated, parts_of(proto, timer.runtime), timer.floats)
    parts, floats = subject.parts, timer.floats.upper()
    say(f"Measuring the noise and the times of {len(parts.parts)} parts in {floats} and INT8 on {timer.where}.")
    alone = sensitivities(calibrated, [part.nodes for part in parts.parts], judged)
    times = part_prices(calibrated, parts, alone, timer)
    prices = None if isinstance(times, str) else times
    if isinstance(times, str):
        say(times)
        say("Plans are made by the noise of their parts alone, and measured as whole networks.")
    tried = plans_by_noise(alone, MOST_PLANS) if prices is None else plans(parts, prices, MOST_PLANS - 1)
    wanted = list(dict.fromkeys([(), *map(subject.whole, tried), tuple(range(len(parts.parts)))]))
    exact, before = onnx_outputs(source, judged), score(source)
    found: dict[Plan, PrecisionPlan] = {}
    problem = ""
    with tempfile.TemporaryDirectory(prefix="compressor-plans-") as folder, bar("Measuring plans", len(wanted)) as seen:
        files = [subject.write(plan, Path(folder) / f"{place}.onnx") for place, plan in enumerate(wanted)]
        for plan, path, ratio in zip(wanted, files, _with_floats(timer, files), strict=True):
            if isinstance(ratio, str):
                problem = f"The plan with {len(parts.nodes(plan))} layers in INT8 has no time on {timer.where}: {ratio}"
                say(problem)
                continue
            found[plan] = PrecisionPlan(
                int8=len(parts.nodes(plan)),
                predicted_ratio=_predicted(parts, prices, plan),
                ratio=ratio[0],
                interval=ratio[1],
                noise=noise(exact, onnx_outputs(path, judged)),
                score=score(path),
            )
            seen.advance(1, note=f"{ratio[0]:.3f} of {floats}")
        if problem and len(found) == 1:
            raise ExportError(f"No plan of precisions has been measured. {problem}")
        place, rule = chosen_of(list(found.values()), before, max_drop)
        plan = list(found)[place]
        if rounding != "nearest" and plan:
            rounded = subject.write(plan, Path(folder) / "rounded.onnx", rounding)
            less = noise(exact, onnx_outputs(rounded, judged))
            if less < found[plan].noise:  # as fast: only weights differ
                found[plan] = found[plan].model_copy(update={"noise": less, "score": score(rounded)})
                files[wanted.index(plan)] = rounded
            else:
                rounding = "nearest"
        write_bytes(target, read_bytes(files[wanted.index(plan)], "ONNX file"))
    found[plan] = found[plan].model_copy(update={"chosen": True})
    if prices is None:
        rule += "; parts could not be timed one by one, so that the plans were made by noise alone"
    layers = tuple(_layers(parts, alone, prices, set(plan), timer.floats))
    return MixedInfo(tuple(found.values()), layers, len(fitted), rounding, rule)


def _with_floats(timer: PrecisionTimer, files: Sequence[Path]) -> Iterator[tuple[float, list[float | None]] | str]:
    """Time all files in turns with the first one, which is in floats: yields shares with their intervals."""
    yield 1.0, [1.0, 1.0]
    for ratio in timer.ratios(files[0], files[1:]):
        yield ratio if isinstance(ratio, str) else (ratio.value, interval_of(ratio))


def _predicted(parts: Parts, prices: Prices | None, plan: Plan) -> float | None:
    """Return the share of the time in floats by the times of the parts; None where none is known."""
    return None if prices is None else predicted_ms(parts, prices, plan) / predicted_ms(parts, prices, ())


def chosen_of(found: Sequence[PrecisionPlan], before: float, max_drop: float) -> tuple[int, str]:
    """Return the place of the plan that is taken, and why.

    Args:
        found: The measured plans, the network in floats among them.
        before: Score of the FP32 file.
        max_drop: How much of it may be lost.

    Raises:
        DropError: All lose more.
    """
    good = [place for place, plan in enumerate(found) if before - plan.score <= max_drop + 1e-9]
    if not good:
        best = max(plan.score for plan in found)
        raise DropError(
            f"No plan of precisions keeps the score of FP32 on the search split ({before:.2%}) within {max_drop:.2%}: "
            f"{best:.2%} at best.",
            "Allow a larger drop, or keep FP32.",
        )
    fastest = min(good, key=lambda place: found[place].ratio)
    limit = max(found[fastest].high, (1 + SAME) * found[fastest].ratio)
    alike = [place for place in good if found[place].ratio <= limit]
    return (
        min(alike, key=lambda place: found[place].noise),
        f"the fastest that loses at most {100 * max_drop:g} points on the search split, and of those whose times "
        "cannot be told apart from it the one with the least noise",
    )


def _layers(
    parts: Parts, alone: Sequence[float], prices: Prices | None, chosen: set[int], floats: str
) -> Iterator[LayerPrecision]:
    for index, part in enumerate(parts.parts):
        for name in part.nodes:
            yield LayerPrecision(
                name=name,
                precision="int8" if index in chosen else floats,
                noise=alone[index],
                float_ms=None if prices is None else prices.float_ms[index],
                int8_ms=None if prices is None else prices.int8_ms[index],
            )
