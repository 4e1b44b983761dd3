"""Reads the results of a bundle, which are not trusted, and computes latency and parity from them.

All measurements must belong to the bundle, to one device in one power mode, and to one version of TensorRT. The
script's own medians are for display only: latency is computed here, with the percentiles of all other runtimes.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Mapping

from export.convert.parity import DEVICE_TOLERANCES, Parity, compare_outputs
from export.device.archive import CHECKSUMS, json_object, printable, require_checksums, unpack
from export.device.bundle import REFERENCE, Bundle, open_bundle, require_format
from export.device.tegrastats import typical_mw
from export.engine.bench import LatencyStats, summarise
from export.errors import ExportError
from export.files import sha256_bytes

LARGEST_RESULTS = 256 << 20
"""Maximum size of results in bytes; tens of megabytes are usual."""

SLOWEST_MS = 60_000.0
FASTEST_MS = 0.001
MOST_TURNS = 999
_TIMES = re.compile(r"(?P<turn>[1-9]\d{0,2})-(?P<slot>[1-9]\d{0,3})\.txt")
_CLOCK = re.compile(r"[0-9a-f]+\.\w+")  # a clock is named after an address (17000000.gpu), a temperature is not
_AGAIN = "Run sh run.sh on the device again: it resumes where it stopped."


@dataclass(frozen=True)
class Board:
    """The device, as its script identified it.

    Attributes:
        tensorrt, jetpack, l4t: Versions; the latter two are empty if it is not a Jetson.
        model, gpu, compute_capability: The board, and its GPU as trtexec names it.
        power_mode: Name of the power mode; empty if there is none.
        clock: Maximum clock of the GPU with its unit.
        board: A hash that distinguishes boards of the same model.
    """

    tensorrt: str
    jetpack: str
    l4t: str
    model: str
    gpu: str
    compute_capability: str
    power_mode: str
    clock: str
    board: str

    @property
    def title(self) -> str:
        """The device's name in messages."""
        return self.model or self.gpu or "the device"


@dataclass(frozen=True)
class Turn:
    """One measurement of one network.

    Attributes:
        turn, slot: The turn, and the position in the bundle's order, both counted from 1.
        times_ms: Time of each run, in order.
        clocks: Name -> MHz after the measurement.
        power_mw: Power of the whole module meanwhile; None if it was not recorded.
    """

    turn: int
    slot: int
    times_ms: tuple[float, ...]
    clocks: Mapping[str, int]
    power_mw: float | None = None


@dataclass(frozen=True)
class NetworkResult:
    """The result of one network.

    Attributes:
        name, precision: As in the bundle.
        status: "ok", "build-failed", "measure-failed" or "verify-failed".
        reason: Why the status is not "ok"; empty if it is.
        onnx_sha256: Checksum of the ONNX file on the device.
        engine_bytes: Size of the engine on the device.
        flags: Flags of trtexec.
        turns: Its measurements in order; empty if it could not be built or measured.
        layers: (name, milliseconds) of TensorRT's layers; empty if there is no profile.
        latency: GPU time of one run (of a batch) over all turns; None if it was not measured.
        parity: Outputs against the FP32 reference; None if they were not verified.
    """

    name: str
    precision: str
    status: str
    reason: str
    onnx_sha256: str
    engine_bytes: int
    flags: str
    turns: tuple[Turn, ...]
    layers: tuple[tuple[str, float], ...]
    latency: LatencyStats | None
    parity: Parity | None

    @property
    def times_ms(self) -> list[float]:
        """Times of all runs of all turns."""
        return [time for turn in self.turns for time in turn.times_ms]

    @property
    def run_mj(self) -> float | None:
        """Energy of one run of the whole module, idle power included: the median of the turns; None if not recorded.

        Runs follow one another without a gap, so that a run has the power for its mean time.
        """
        found = [turn.power_mw * statistics.fmean(turn.times_ms) / 1e3 for turn in self.turns if turn.power_mw]
        return statistics.median(found) if found else None

    def describe(self) -> str:
        """One line for display."""
        text = f"{self.name} ({self.precision}): {self.status}" + (f", {self.reason}" if self.reason else "")
        if self.latency is not None:
            stats = self.latency
            text += f"; median {stats.median_ms:.3f} ms, p90 {stats.p90_ms:.3f} ms, p99 {stats.p99_ms:.3f} ms"
            if (stats.batch, stats.streams) != (1, 1):
                text += (
                    f" for a batch of {stats.batch} in {stats.streams} stream{'s' if stats.streams > 1 else ''}, "
                    f"{stats.inputs_per_s:.1f} inputs a second"
                )
        if self.parity is not None:
            text += f"; largest difference {self.parity.max_abs:.2g} (allowed {self.parity.allowed:.2g})"
        return text

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for a JSON file, without the single measurements."""
        content = asdict(self)
        del content["turns"], content["layers"]
        return content


@dataclass(frozen=True)
class DeviceResults:
    """The results of a bundle.

    Attributes:
        bundle: Checksum that identifies the bundle.
        target: The device that the bundle is for.
        board: The device that it was measured on.
        facts: The facts stored in the bundle, such as the run's id.
        networks: Name -> result, for each network that was tried.
        digest: Checksum of the results' list of checksums, which identifies the results.
        turns, duration_s, warmup_s: Number of turns, and the seconds of measurement and warm-up in each.
        batch, streams: Inputs of one run, and copies of a network that ran at the same time.
    """

    bundle: str
    target: str
    board: Board
    facts: Mapping[str, Any]
    networks: Mapping[str, NetworkResult]
    digest: str
    turns: int
    duration_s: int
    warmup_s: int
    batch: int = 1
    streams: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The facts of the device and of each network as plain values for a JSON file."""
        named = ("model", "power_mode", "l4t", "jetpack", "tensorrt")
        return {
            "target": self.target,
            "board": {name: getattr(self.board, name) for name in named},
            "facts": dict(self.facts),
            "networks": [network.to_dict() for network in self.networks.values()],
        }


def read_results(results: str | Path, bundle: str | Path, kind: str = "network") -> DeviceResults:
    """Read the results of a device.

    Args:
        results: `results.tar.gz` or the folder `results`.
        bundle: The bundle that ran on the device; see `export.device.bundle.open_bundle`.
        kind: Kind of the bundle. Results of a timing bundle must be complete.

    Raises:
        ExportError: either is missing, damaged, unsafe, incomplete or of another format, they do not belong together,
            a number in them is invalid, or they mix devices, power modes or versions.
    """
    given = open_bundle(bundle, kind)
    files = unpack(results, largest=LARGEST_RESULTS)
    if "results.json" not in files:
        raise ExportError(f"{results} has no results.json: the script has not finished.", _AGAIN)
    require_checksums(files, results)
    found = json_object(files, "results.json", results)
    require_format(found, results)
    if found.get("bundle") != given.identity:
        raise ExportError(f"{results} belongs to another bundle than {bundle}.", "Give the bundle that was measured.")
    board = Board(**{field.name: printable(found.get(field.name, "")) for field in fields(Board)})
    try:
        turns = int(found["processes"])
        if not 1 <= turns <= MOST_TURNS:
            raise ValueError(f"{turns} turns")
        streams = int(given.manifest.get("streams", 1))
        if int(found.get("streams", 1)) != streams:
            raise ExportError(f"{results} was measured with another number of streams than the bundle's.", _AGAIN)
        _require_names([str(entry["name"]) for entry in found["networks"]], given, kind, results)
        reader = _Reader(given, files, board, turns, results)
        return DeviceResults(
            bundle=given.identity,
            target=str(given.manifest["target"]),
            board=board,
            facts=given.manifest.get("facts", {}),
            networks={str(entry["name"]): reader.network(entry) for entry in found["networks"]},
            digest=sha256_bytes(files[CHECKSUMS]),
            turns=turns,
            duration_s=int(found["duration_s"]),
            warmup_s=int(found["warmup_s"]),
            batch=reader.batch,
            streams=streams,
        )
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise ExportError(f"{results} cannot be parsed: {error!r}.", _AGAIN) from error


def _require_names(names: list[str], bundle: Bundle, kind: str, results: str | Path) -> None:
    """Refuse results with unknown or repeated networks; those of a timing bundle must have all networks."""
    known = [str(entry["name"]) for entry in bundle.manifest["networks"]]
    for name in names:
        if name not in known:
            raise ExportError(f"{results} names {printable(name)}, which the bundle does not have.")
    if len(set(names)) != len(names):
        raise ExportError(f"{results} has a network twice.", "Copy all of it again.")
    missing = sorted(set(known) - set(names))
    if missing and kind == "timing":
        raise ExportError(f"{results} has no result for {len(missing)} networks, such as {missing[0]}.", _AGAIN)


class _Reader:
    """Reads the result of each network from the files of the results."""

    def __init__(
        self, bundle: Bundle, files: Mapping[str, bytes], board: Board, turns: int, results: str | Path
    ) -> None:
        self.bundle, self.files, self.board, self.turns, self.results = bundle, files, board, turns, results
        self.known = {str(entry["name"]): entry for entry in bundle.manifest["networks"]}
        self.batch, self.streams = (int(bundle.manifest.get(name, 1)) for name in ("batch", "streams"))

    def network(self, entry: Mapping[str, Any]) -> NetworkResult:
        """Check and convert one entry of `results.json`."""
        name = str(entry["name"])
        known = self.known[name]
        if entry["onnx_sha256"] != known["sha256"]:
            raise ExportError(f"{self.results} used another {name}.onnx than the bundle's.")
        status = printable(entry["status"])
        measured, profile = status in ("ok", "verify-failed"), f"{name}/profile.json"
        turns = self._turns(name) if measured else ()
        times = [time for turn in turns for time in turn.times_ms]
        return NetworkResult(
            name=name,
            precision=str(known["precision"]),
            status=status,
            reason="" if status == "ok" else printable(entry.get("reason") or status, 300),
            onnx_sha256=str(entry["onnx_sha256"]),
            engine_bytes=int(entry["engine_bytes"]),
            flags=printable(entry.get("flags", ""), 300),
            turns=turns,
            layers=_layers(self.files[profile]) if measured and profile in self.files else (),
            latency=summarise(
                times, runtime="trtexec", version=self.board.tensorrt, batch=self.batch, streams=self.streams
            )
            if measured
            else None,
            parity=self._parity(name) if status == "ok" and "samples" in self.bundle.manifest else None,
        )

    def _turns(self, name: str) -> tuple[Turn, ...]:
        """The measurements of a network in order, of which none may be missing."""
        found: dict[tuple[int, int], Turn] = {}
        for file in self.files:
            folder, _, rest = file.partition("/")
            match = _TIMES.fullmatch(rest) if folder == name else None
            if match is None:
                continue
            state = json_object(self.files, f"{file[: -len('.txt')]}.json", self.results)
            self._require_same(state, file)
            clocks = {
                str(key): int(value) for key, value in state["after"].items() if _CLOCK.fullmatch(str(key))
            }
            place = (int(match["turn"]), int(match["slot"]))
            times = run_times(self.files[file], f"{self.results}: {file}")
            found[place] = Turn(*place, times, clocks, self._power(name, *place))
        slots = [slot for slot, each in enumerate(self.bundle.manifest["order"], start=1) if each == name]
        missing = [
            turn for turn in range(1, self.turns + 1) for slot in slots if (turn, slot) not in found
        ]
        if missing or not found:
            raise ExportError(
                f"{max(len(missing), 1)} measurements are missing in {self.results}, such as {name} in turn "
                f"{missing[0] if missing else 1}.",
                _AGAIN,
            )
        return tuple(found[place] for place in sorted(found))

    def _power(self, name: str, turn: int, slot: int) -> float | None:
        """The module's power during a measurement, if the bundle asks for it."""
        file = f"{name}/power-{turn}-{slot}.log"
        if not self.bundle.manifest.get("energy"):
            return None
        if file not in self.files:
            raise ExportError(f"{self.results} lacks {file}, the power during a measurement.", _AGAIN)
        return typical_mw(self.files[file].decode("ascii", errors="replace"), f"{self.results}: {file}")

    def _require_same(self, state: Mapping[str, Any], file: str) -> None:
        """Refuse a measurement with another device, power mode or version than the results state."""
        for key, what in (("board", "board"), ("tensorrt", "version of TensorRT"), ("power_mode", "power mode")):
            got, stated = printable(state.get(key, "")), getattr(self.board, key)
            if got != stated:
                raise ExportError(
                    f"{self.results} mixes measurements: {file} is of the {what} {got!r}, the rest of {stated!r}.",
                    "Delete the folder results on the device and measure again.",
                )

    def _parity(self, name: str) -> Parity:
        """Compare the outputs that trtexec wrote with the reference outputs of the bundle."""
        import numpy as np

        manifest = self.bundle.manifest
        right, judged = [], []
        for index in range(int(manifest["samples"])):
            wanted = self.bundle.files[REFERENCE.format(self.known[name]["reference"], index)].split()
            right.append(np.array([int(value) for value in wanted], dtype=np.float64) / 1e6)
            file = f"{name}/output-{index:02d}.json"
            judged.append(np.array(output_values(self.files[file], file)))
        reference = np.stack(right).reshape(-1, *(int(size) for size in manifest["output_shape"]))
        return compare_outputs(
            reference,
            np.stack(judged).reshape(reference.shape),
            tolerance=DEVICE_TOLERANCES[self.known[name]["precision"]],
        )


def run_times(content: bytes, name: str) -> tuple[float, ...]:
    """Parse a file with one time in whole nanoseconds on each line; return milliseconds.

    Raises:
        ExportError: the file is not a list of times, or a time is not plausible.
    """
    lines = content.split()
    if not lines or not all(line.isdigit() and len(line) <= 12 for line in lines):
        raise ExportError(f"{name} is not a list of times.", "Copy all of it again.")
    times = tuple(int(line) / 1e6 for line in lines)
    wrong = [time for time in times if not FASTEST_MS <= time <= SLOWEST_MS]
    if wrong:
        raise ExportError(f"{name} has a time of {wrong[0]:g} ms, expected {FASTEST_MS:g} to {SLOWEST_MS:g} ms.")
    return times


def output_values(content: bytes, name: str) -> list[float]:
    """Read the values of the first output from an output file of trtexec.

    Raises:
        ExportError: the file is not an output file.
    """
    try:
        return [float(value) for value in json.loads(content)[0]["values"]]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ExportError(f"{name} is not an output file of trtexec: {error!r}.", _AGAIN) from error


def _layers(content: bytes) -> tuple[tuple[str, float], ...]:
    """(name, milliseconds) of each layer; empty if trtexec's profile cannot be parsed."""
    try:
        found = [
            (str(entry["name"]), float(entry.get("medianMs", entry.get("averageMs"))))
            for entry in json.loads(content)
            if "name" in entry
        ]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return ()
    return tuple(found) if all(0 <= time <= SLOWEST_MS for _, time in found) else ()
