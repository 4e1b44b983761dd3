"""Channel steps of a device: the distance between widths at which its latency jumps.

A kernel computes channels in blocks, so that its time is a staircase over the width. For one group of each kind, the
width is scanned while all others stay dense. The time of the operators that use the group's channels is then fitted by
a line, and by a line plus a staircase of every possible step. A staircase is accepted if it fits better than noise
would explain (a difference of 10 in Schwarz's criterion; G. Schwarz, "Estimating the dimension of a model", 1978),
rises by more than the noise, and accounts for a substantial part of the slope.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compressor.core.errors import CompressorError
from compressor.core.progress import bar, say
from compressor.latency.assemble import export_candidate
from compressor.latency.machine import middle

if TYPE_CHECKING:

    from compressor.latency.networks import Device
    from compressor.latency.table import LatencyTable
    from compressor.pruning.groups import Group
    from compressor.pruning.space import PruningSpace

Floats = npt.NDArray[np.float64]

SPAN = 128
"""Units below the dense width that are scanned."""

POINTS = 32
"""Widths of one scan."""

LEAST_POINTS = 8
PASSES = 2
SECONDS_A_WIDTH = 0.15
MOST_SCANS = 3
EVIDENCE = 10.0
"""Difference in Schwarz's criterion from which a staircase is accepted."""

SURE = 0.02
"""Largest noise, as a share of the whole rise, at which the absence of jumps is accepted."""

STEEP = 0.3
"""Smallest share of the rise over one step that the jump must account for; a smaller jump does not justify a step."""


@dataclass(frozen=True)
class Scan:
    """One group's latency over its width.

    Attributes:
        group: Its name.
        widths: Scanned, ascending, in the group's units.
        ms: Time of the operators that use the group's channels.
        step: Units between jumps; None if there are none.
        stride: Units between scanned widths.
        sure: Whether the scan is dense and precise enough to detect a jump.
    """

    group: str
    widths: tuple[int, ...]
    ms: tuple[float, ...]
    step: int | None
    stride: int
    sure: bool


def find_step(widths: Sequence[int], ms: Sequence[float], noise_ms: float = 0.0) -> int | None:
    """Find the step after each multiple of which latency jumps; None if there are no jumps.

    Args:
        widths: Widths at equal distances, ascending.
        ms: Their times.
        noise_ms: Typical error of a time; a smaller jump is not accepted.
    """
    x, y = np.asarray(widths, dtype=np.float64), np.asarray(ms, dtype=np.float64)
    if len(x) < LEAST_POINTS:
        return None
    stride = int(min(np.diff(x)))
    line = _fit(np.stack([np.ones_like(x), x], axis=1), y)
    best: tuple[float, int] | None = None
    for step in range(2 * stride, int(x[-1] - x[0]) // 2 + 1, stride):
        columns = np.stack([np.ones_like(x), x, np.ceil(x / step)], axis=1)
        score, (_, slope, jump) = _fit(columns, y)
        if jump <= 2 * noise_ms or jump < STEEP * (jump + max(slope, 0.0) * step):
            continue
        if best is None or score < best[0]:
            best = (score, step)
    return best[1] if best is not None and best[0] < line[0] - EVIDENCE else None


def _fit(columns: Floats, y: Floats) -> tuple[float, Floats]:
    """Return Schwarz's criterion and the coefficients of a least-squares fit, repeated without the worst outliers."""
    coefficients = np.linalg.lstsq(columns, y, rcond=None)[0]
    errors = np.abs(columns @ coefficients - y)
    limit = 5 * float(np.median(errors))
    kept = errors <= limit if limit > 0 else np.ones(len(y), dtype=bool)
    if kept.sum() >= max(LEAST_POINTS, int(0.8 * len(y))):
        coefficients = np.linalg.lstsq(columns[kept], y[kept], rcond=None)[0]
    errors = np.minimum(np.abs(columns @ coefficients - y), max(limit, 1e-12))
    floor = (
        1e-4 * float(np.abs(y).max())
    ) ** 2  # limit of the clock's resolution: an exact fit must not win by rounding errors
    score = len(y) * float(np.log(np.mean(errors**2) + floor)) + columns.shape[1] * float(np.log(len(y)))
    return float(score), np.asarray(coefficients, dtype=np.float64)


def scan(
    space: PruningSpace, group: Group, example: Any, device: Device, *, least_stride: int = 1
) -> Scan:
    """Measure one group's latency over its width, all other groups dense.

    Args:
        space: A space with granularity 1.
        group: A group of the space.
        example: The network's arguments for one input.
        device: Runs the networks.
        least_stride: Fewest channels between scanned widths.
    """
    touched = [
        place
        for place, layer in enumerate(space.layers)
        if group.index in {index for index, _ in (*layer.in_channels.terms, *layer.out_channels.terms)}
    ]
    span = min(SPAN, group.width)
    stride = max(1, -(-least_stride // group.unit))
    while span // stride > POINTS:
        stride *= 2
    legal = set(space.choices(group.index).tolist())
    widths = [
        each for each in range(stride, group.width + 1, stride) if each > group.width - span and each in legal
    ]
    ranking = space.rank()
    order = np.random.default_rng(0)
    times: list[list[float]] = [[] for _ in widths]
    networks: dict[int, Any] = {}
    for _ in range(PASSES):
        for place in order.permutation(len(widths)):
            row = np.array(space.dense_widths)
            row[group.index] = widths[place]
            if place not in networks:
                networks[place] = export_candidate(space, ranking, example, row)
            measured = device.measure(networks[place], SECONDS_A_WIDTH)
            times[place].append(sum(middle(measured.operators_ms[:, layer]) for layer in touched))
    passes = np.asarray(times)
    noise = float(np.median(np.ptp(passes, axis=1))) / np.sqrt(2) if len(widths) else 0.0
    ms = passes.min(axis=1) if len(widths) else np.zeros(0)
    sure = len(widths) >= 2 * LEAST_POINTS and noise <= SURE * float(np.ptp(ms))
    return Scan(
        group.name, tuple(widths), tuple(map(float, ms)), find_step(widths, list(ms), noise), stride, sure
    )


def measured_steps(
    space: PruningSpace,
    example: Any,
    device: Device,
    *,
    otherwise: Mapping[str, int],
    least_stride: int = 1,
    time_limit_s: float = 90.0,
) -> dict[str, int]:
    """Measure the channel steps of all groups, by scans of one group of each kind.

    Groups whose channels are used by the same kinds of operators share a scan. There are at most `MOST_SCANS`, the
    widest kinds first.

    Args:
        space: A space with granularity 1.
        example: The network's arguments for one input.
        device: Runs the networks.
        otherwise: Steps of groups that are too narrow for a measured step, or whose kind was not scanned in time.
        least_stride: Fewest channels between scanned widths.
        time_limit_s: No further scan is started after this many seconds.

    Returns:
        Step of each group, for the argument `granularity` of `PruningSpace`.
    """
    started = time.monotonic()
    kinds: dict[object, list[Group]] = {}
    for group in space.groups:
        kinds.setdefault(_kind(space, group), []).append(group)
    order = sorted(kinds, key=lambda kind: -sum(group.width * group.unit for group in kinds[kind]))
    found: dict[object, int] = {}
    chosen = order[:MOST_SCANS]
    with bar("Scanning widths for jumps of the latency", len(chosen)) as progress:
        for kind in chosen:
            if time.monotonic() - started > time_limit_s:
                break
            widest = max(kinds[kind], key=lambda group: group.width)
            result = scan(space, widest, example, device, least_stride=least_stride)
            progress.advance(1, result.group)
            if result.step is None and not result.sure:
                say(
                    f"{result.group}: no latency jump was found, but none can be excluded: the default step is used."
                )
                continue
            found[kind] = (result.step or result.stride) * widest.unit
            say(
                f"{result.group}: latency jumps every {result.step * widest.unit} channels."
                if result.step
                else f"{result.group}: latency grows without jumps from {result.widths[0]} to {result.widths[-1]}."
            )
    usual = Counter(found.values()).most_common(1)
    steps = {}
    for kind, groups in kinds.items():
        step = found.get(kind, usual[0][0] if usual else 0)
        for group in groups:
            fits = 0 < 2 * step <= group.width * group.unit
            steps[group.name] = step if fits else int(otherwise[group.name])
    return steps


def _kind(space: PruningSpace, group: Group) -> object:
    """Return a group's kind: the operators that produce its channels and those that read them."""
    touched: set[tuple[str, tuple[int, ...], bool]] = set()
    for layer in space.layers:
        for terms, made in ((layer.in_channels.terms, False), (layer.out_channels.terms, True)):
            if group.index in {index for index, _ in terms}:
                touched.add((layer.kind, tuple(layer.kernel), made))
    return frozenset(touched)


def refuse_table(table: LatencyTable) -> CompressorError:
    """Return the error for a device's table without steps: it is estimated, or too coarse."""
    if table.estimated:
        return CompressorError(
            f"The latency table of {table.device} is estimated: it has no measured jumps.",
            "Use --granularity auto, or a number such as 8.",
        )
    points = max(len(set(entry.c_out)) for entry in table.fields.entries.values())
    return CompressorError(
        f"The latency table of {table.device} has at most {points} widths of an operator: too few to detect jumps.",
        "Steps are measured on this machine only (--device local). Use --granularity auto, or a number such as 8.",
    )
