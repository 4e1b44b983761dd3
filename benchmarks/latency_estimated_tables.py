"""Fit the estimated latency tables of the Jetson modules and write one file for each into latency_tables/.

    python benchmarks/latency_estimated_tables.py --measurements PUBLISHED.csv [--write]

PUBLISHED.csv has the columns device, model, input, num_classes, precision, batch, latency_ms and source, one
published measurement a row. Constants of all devices are fitted together: each is a mean over all devices,
plus a deviation of the device's generation, plus one of the device, and deviations are drawn to zero, so that
a device with three measurements borrows what it does not know from its relatives, and one with none takes its
generation's. How strongly they are drawn, and whether a launch takes as many cycles or as long on relatives with
another clock, cannot be separated with so few measurements: all combinations of these assumptions are fitted, and their
constants averaged, so that none is chosen by its error. Their levels were chosen from variants tried with all errors
in view, and an average of seven of the eight was seen first: the errors hold some hindsight (docs/method/latency.md).
Printed and stored for each device: the error of the fit, and the error on each measurement when it is left out
(where a device has one only, it is then predicted from the other devices).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from benchmarks.latency_modules import MODULES, Row, blocks, read_rows
from compressor.latency.estimate import ELEMENT_BYTES, KINDS, SOFTNESS
from compressor.latency.schema import (
    DeviceFields,
    ErrorFields,
    RooflineFields,
    RuntimeFields,
    TableFields,
    rounded,
)
from compressor.latency.table import LatencyTable

Floats = npt.NDArray[np.float64]
TABLES = Path(__file__).resolve().parent.parent / "latency_tables"
WRAPPER = "torch2trt benchmarks"
"""A source whose times hold the synchronisation of its Python wrapper: it gets an offset of its own in the
fit.
"""

FRAMEWORK = "tf_to_trt_image_classification README"
"""A source that ran on a 2018 release inside another framework: it gets a factor of its own in the fit."""


CONSTANTS = (*(f"efficiency {kind}" for kind in KINDS), "bandwidth", "launch", "int8")
START = np.log([0.35, 0.25, 0.1, 0.3, 0.5, 0.02, 0.6])
"""First guess: shares of the peaks, the launch in milliseconds, and how much of the FP16 share INT8
reaches.
"""
DRAWN = np.asarray([0.35, 0.35, 0.35, 0.35, 0.25, 0.7, 0.3])
"""How far a constant of a generation or a device usually lies from the mean, in logarithms."""
BANDWIDTH, LAUNCH = CONSTANTS.index("bandwidth"), CONSTANTS.index("launch")
NUISANCES = np.log([0.2, 1.0])
"""First guesses of the wrapper's offset in milliseconds and of the framework's factor."""

TRUST = 0.10
"""How far published numbers of one device scatter among themselves, in logarithms."""


@dataclass(frozen=True)
class Assumptions:
    """What a fit takes for granted.

    Attributes:
        cycles: A launch takes as many clock cycles on related devices; else as long.
        launch: How far the launch usually lies from the mean, in logarithms.
        own: How far a device usually lies from its generation, in terms of how far this lies from the mean.
    """

    cycles: bool
    launch: float
    own: float


ASSUMPTIONS = [Assumptions(*each) for each in itertools.product((False, True), (0.35, 0.7), (0.5, 1.0))]


class Fit:
    """Constants of every generation and device, fitted to `rows` under each of `ASSUMPTIONS` and averaged."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.fits: list[OneFit] = []
        for assumptions in ASSUMPTIONS:
            start = self.fits[-1].solution if self.fits else None
            self.fits.append(OneFit(rows, assumptions, start))

    def constants(self, device: str) -> Floats:
        """The constants of a device; of its generation alone where it was never measured."""
        return np.asarray(np.exp(np.mean([fit.logs(device) for fit in self.fits], axis=0)))

    def predict(self, row: Row) -> float:
        """Milliseconds as the row's source would have published them, its own offset or factor included."""
        wrapper, framework = np.exp(np.mean([fit.solution[-len(NUISANCES) :] for fit in self.fits], axis=0))
        offset = float(wrapper) if row.source == WRAPPER else 0.0
        factor = float(framework) if row.source == FRAMEWORK else 1.0
        return factor * predict(roofline(row.device, row.precision, self.constants(row.device)), row) + offset


class OneFit:
    """Constants of every generation and device, fitted to `rows` under one set of assumptions."""

    def __init__(self, rows: Sequence[Row], assumptions: Assumptions, start: Floats | None = None) -> None:
        self.assumptions = assumptions
        self.drawn = DRAWN.copy()
        self.drawn[LAUNCH] = assumptions.launch
        self.generations = sorted({module.generation for module in MODULES.values()})
        self.devices = sorted({row.device for row in rows})
        size = (1 + len(self.generations) + len(self.devices)) * len(CONSTANTS) + len(NUISANCES)
        if start is None:
            start = np.zeros(size)
            start[: len(CONSTANTS)] = START
            start[-len(NUISANCES) :] = NUISANCES
        self._prepare(rows)
        self.solution = least_squares(self._residuals, start).x

    def logs(self, device: str) -> Floats:
        """The logarithms of a device's constants."""
        return self._logs(self.solution, device)

    def _logs(self, x: Floats, device: str) -> Floats:
        table = x[: -len(NUISANCES)].reshape(-1, len(CONSTANTS))
        total = table[0] + table[1 + self.generations.index(MODULES[device].generation)]
        if device in self.devices:
            total = total + table[1 + len(self.generations) + self.devices.index(device)]
        total = np.array(total)
        if self.assumptions.cycles:
            total[LAUNCH] += np.log(1000.0 / MODULES[device].mhz)
        return total

    def _prepare(self, rows: Sequence[Row]) -> None:
        """Every operator of every row in one array: what it takes at a share of 1 of the peaks."""
        compute, memory, kinds, starts = [], [], [], []
        for row in rows:
            module = MODULES[row.device]
            macs, moved = row.operators.work(row.c_in, row.c_out, blocks(module, row.precision))
            starts.append(sum(len(part) for part in kinds))
            compute.append(2e-9 * macs[0] / module.peaks[row.precision])
            memory.append(1e-6 * moved[0] * ELEMENT_BYTES[row.precision] / module.bandwidth_gbs)
            kinds.append(row.operators.kind)
        lengths = [len(part) for part in kinds]
        self._row = np.repeat(np.arange(len(rows)), lengths)
        self._compute, self._memory, self._kind = map(np.concatenate, (compute, memory, kinds))
        self._starts = np.asarray(starts)
        self._launches = np.concatenate([row.operators.launches for row in rows])
        self._measured = np.asarray([row.latency_ms for row in rows])
        self._wrapped = np.asarray([float(row.source == WRAPPER) for row in rows])
        self._framed = np.asarray([float(row.source == FRAMEWORK) for row in rows])
        self._int8 = np.asarray([float(row.precision == "int8") for row in rows])
        self._device = [row.device for row in rows]

    def _residuals(self, x: Floats) -> Floats:
        logs = {device: self._logs(x, device) for device in self.devices}
        each = np.stack([logs[device] for device in self._device])
        shares = np.minimum(each[:, : len(KINDS)] + self._int8[:, None] * each[:, [-1]], 0.0)
        compute = self._compute / np.exp(shares[self._row, self._kind])
        memory = self._memory / np.exp(np.minimum(each[:, BANDWIDTH], 0.0))[self._row]
        time = (compute**SOFTNESS + memory**SOFTNESS) ** (1 / SOFTNESS)
        time = time + self._launches * np.exp(each[:, LAUNCH])[self._row]
        predicted = np.add.reduceat(time, self._starts) * np.exp(self._framed * x[-1])
        predicted = predicted + self._wrapped * np.exp(x[-2])
        table = x[: -len(NUISANCES)].reshape(-1, len(CONSTANTS))
        generations = len(self.generations)
        drawn = [
            (table[0] - START) / (2 * DRAWN),
            (table[1 : 1 + generations] / self.drawn).ravel(),
            (table[1 + generations :] / (self.assumptions.own * self.drawn)).ravel(),
            (x[-len(NUISANCES) :] - NUISANCES) / [1.0, 0.5],
        ]
        errors = np.log(predicted / self._measured) / TRUST
        return np.concatenate(
            [np.sign(errors) * np.sqrt(np.log1p(errors**2)), *drawn]
        )  # Cauchy: outliers count little


def roofline(
    device: str, precision: str, constants: Floats, errors: ErrorFields | None = None
) -> RooflineFields:
    """A device's fields from its fitted constants."""
    module = MODULES[device]
    share = constants[CONSTANTS.index("int8")] if precision == "int8" else 1.0
    efficiency = {kind: float(min(1.0, constants[i] * share)) for i, kind in enumerate(KINDS)}
    return RooflineFields(
        tflops=module.peaks[precision],
        bandwidth_gbs=module.bandwidth_gbs,
        efficiency=efficiency,
        bandwidth_efficiency=float(min(1.0, constants[CONSTANTS.index("bandwidth")])),
        launch_ms=float(constants[CONSTANTS.index("launch")]),
        network_ms=0.0,
        block=blocks(module, precision),
        errors=errors or ErrorFields(measurements=0),
    )


def predict(fields: RooflineFields, row: Row) -> float:
    """The estimate for one network."""
    times = row.operators.milliseconds(fields, row.precision, row.c_in, row.c_out)
    return float(times.sum()) + fields.network_ms


def left_out(rows: Sequence[Row]) -> dict[int, float]:
    """Each measurement predicted from all the others: row -> predicted / measured - 1."""
    errors = {}
    for index, row in enumerate(rows):
        fit = Fit([other for place, other in enumerate(rows) if place != index])
        errors[index] = fit.predict(row) / row.latency_ms - 1.0
        print(
            f"  {row.device:22s} {row.precision} {errors[index]:+7.1%}  of {row.latency_ms:8.3f} ms",
            flush=True,
        )
    return errors


def table(
    device: str, fit: Fit, rows: Sequence[Row], errors: dict[int, float], foreign: float
) -> LatencyTable:
    """The file of one device."""
    module = MODULES[device]
    fields = {}
    for precision in module.peaks:
        own = [i for i, row in enumerate(rows) if row.device == device and row.precision == precision]
        fitted = [abs(fit.predict(rows[i]) / rows[i].latency_ms - 1.0) for i in own]
        out = [abs(errors[i]) for i in own if i in errors]
        fields[precision] = roofline(
            device,
            precision,
            fit.constants(device),
            ErrorFields(
                measurements=len(own),
                fitted_mape=rounded(float(np.mean(fitted))) if fitted else None,
                left_out_mape=rounded(float(np.mean(out))) if out else None,
                left_out_worst=rounded(float(np.max(out))) if out else None,
            ),
        )
    mine = sorted({row.source for row in rows if row.device == device})
    basis = (
        f"constants fitted to {sum(row.device == device for row in rows)} published latencies of this module and, by a "
        "hierarchical prior, to those of the other modules"
        if mine
        else "no latency of this module was published among the sources: its constants are those of its generation, "
        f"and whole devices left out of the fit are predicted with a mean error of {foreign:.0%}"
    )
    return LatencyTable(
        TableFields(
            device=DeviceFields(
                name=device, sku=module.sku, compute_capability=module.capability, clocks=module.clock
            ),
            runtime=RuntimeFields(name="tensorrt"),
            precision="fp16",
            date=date.today().isoformat(),
            how="estimated",
            protocol=f"Estimated, not measured. A roofline with launches for each operator; {basis}.",
            sources=tuple(mine or sorted({row.source for row in rows})),
            block=blocks(module, "fp16"),
            roofline=fields,
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, print the errors, and write the tables where asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measurements", type=Path, required=True, help="CSV of published latencies")
    parser.add_argument("--write", action="store_true", help=f"write the tables into {TABLES.name}/")
    parser.add_argument("--quick", action="store_true", help="skip the errors of left-out measurements")
    given = parser.parse_args(arguments)
    rows = read_rows(given.measurements)
    fit = Fit(rows)
    by_device = defaultdict(list)
    for index, row in enumerate(rows):
        by_device[row.device].append(index)
    foreign = []
    for device in by_device:
        others = Fit([row for row in rows if row.device != device])
        foreign += [abs(others.predict(rows[i]) / rows[i].latency_ms - 1.0) for i in by_device[device]]
    errors = {} if given.quick else left_out(rows)
    print(f"{'device':24s} {'n':>3s} {'fitted':>8s} {'left out':>9s} {'worst':>7s}")
    for device, indices in by_device.items():
        fitted = np.mean([abs(fit.predict(rows[i]) / rows[i].latency_ms - 1.0) for i in indices])
        out = [abs(errors[i]) for i in indices if i in errors] or [float("nan")]
        print(f"{device:24s} {len(indices):3d} {fitted:8.1%} {np.mean(out):9.1%} {np.max(out):7.1%}")
    print(f"devices never seen: {np.mean(foreign):.1%} on average")
    for device in MODULES:
        pairs = zip(CONSTANTS, fit.constants(device), strict=True)
        print(f"{device:24s} " + ", ".join(f"{name} {value:.3g}" for name, value in pairs))
        if given.write:
            table(device, fit, rows, errors, float(np.mean(foreign))).write(TABLES / f"{device}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
