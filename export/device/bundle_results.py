"""Reads the results of a board, checks them against their bundle, and computes latency and parity.

The script's own medians are for display only. A run's records are computed here from the times and outputs that
trtexec wrote, with the same percentiles as for all other runtimes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.convert.parity import DEVICE_TOLERANCES, Parity, compare_outputs
from export.device.archive import CHECKSUMS, json_object, printable, require_checksums, unpack
from export.device.bundle import FORMAT
from export.engine.stats import LatencyStats, summarise
from export.errors import ExportError
from export.files import sha256_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

_HINT = "Give the results that run.sh wrote for this bundle."


@dataclass(frozen=True)
class NetworkResult:
    """The result of one network on the board.

    Attributes:
        name, precision: As in the bundle.
        status: "ok", "build-failed", "measure-failed" or "verify-failed".
        reason: Why the status is not "ok".
        onnx_sha256: Checksum of the ONNX file on the board.
        engine_bytes: Size of the engine on the board.
        flags: Flags of trtexec.
        latency: GPU time of one input over all processes; None if it was not measured.
        parity: Outputs against the FP32 reference; None if they were not verified.
    """

    name: str
    precision: str
    status: str
    reason: str
    onnx_sha256: str
    engine_bytes: int
    flags: str
    latency: LatencyStats | None
    parity: Parity | None

    def describe(self) -> str:
        """One line for display."""
        text = f"{self.name} ({self.precision}): {self.status}" + (f", {self.reason}" if self.reason else "")
        if self.latency is not None:
            stats = self.latency
            text += f"; median {stats.median_ms:.3f} ms, p90 {stats.p90_ms:.3f} ms, p99 {stats.p99_ms:.3f} ms"
        if self.parity is not None:
            text += f"; largest difference {self.parity.max_abs:.2g} (allowed {self.parity.allowed:.2g})"
        return text


@dataclass(frozen=True)
class DeviceResults:
    """The results of a bundle.

    Attributes:
        target: The Jetson module that the bundle is for.
        board: Model, power mode, L4T, JetPack and TensorRT of the board.
        facts: The facts stored in the bundle, such as the run's id.
        networks: One result for each network that was tried.
    """

    target: str
    board: Mapping[str, str]
    facts: Mapping[str, Any]
    networks: tuple[NetworkResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for a JSON file."""
        return asdict(self)


def read_results(results: str | Path, bundle: str | Path) -> DeviceResults:
    """Read the results of a board.

    Args:
        results: `results.tar.gz` or the folder `results`.
        bundle: The bundle that ran on the board.

    Raises:
        ExportError: either is missing, damaged, unsafe or of another format, they do not belong together,
            or a number in them is invalid.
    """
    given = unpack(bundle)
    require_checksums(given, bundle)
    described = json_object(given, "bundle.json", bundle)
    files = unpack(results)
    require_checksums(files, results)
    found = json_object(files, "results.json", results)
    if described.get("format") != FORMAT or found.get("format") != FORMAT:
        raise ExportError(
            f"{results} or {bundle} was written by another version of the program.", "Write the bundle again."
        )
    if found.get("bundle") != sha256_bytes(given[CHECKSUMS]):
        raise ExportError(f"{results} belongs to another bundle than {bundle}.", _HINT)
    known = {entry["name"]: entry for entry in described["networks"]}
    board = {
        key: printable(found.get(key, "")) for key in ("model", "power_mode", "l4t", "jetpack", "tensorrt")
    }
    try:
        networks = tuple(
            _network(entry, known, files, given, described, board["tensorrt"], results)
            for entry in found["networks"]
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ExportError(f"{results} cannot be parsed: {error!r}.", _HINT) from error
    return DeviceResults(
        target=str(described["target"]), board=board, facts=described.get("facts", {}), networks=networks
    )


def _network(
    entry: Mapping[str, Any],
    known: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, bytes],
    given: Mapping[str, bytes],
    described: Mapping[str, Any],
    version: str,
    results: str | Path,
) -> NetworkResult:
    name = str(entry["name"])
    if name not in known:
        raise ExportError(f"{results} names {printable(name)}, which the bundle does not have.", _HINT)
    if entry["onnx_sha256"] != known[name]["sha256"]:
        raise ExportError(f"{results} used another {name}.onnx than the bundle's.", _HINT)
    status = printable(entry["status"])
    measured = status in ("ok", "verify-failed")
    times = [
        value for file in sorted(files) if _is_times(file, name) for value in compute_times(files[file], file)
    ]
    if measured and not times:
        raise ExportError(f"{results} has no times for {name}.", _HINT)
    parity = _parity(name, files, given, described, known[name]["precision"]) if status == "ok" else None
    return NetworkResult(
        name=name,
        precision=str(known[name]["precision"]),
        status=status,
        reason=printable(entry.get("reason", ""), 300),
        onnx_sha256=str(entry["onnx_sha256"]),
        engine_bytes=int(entry["engine_bytes"]),
        flags=printable(entry.get("flags", ""), 300),
        latency=summarise(times, runtime="trtexec", version=version) if measured else None,
        parity=parity,
    )


def _is_times(file: str, name: str) -> bool:
    return file.startswith(f"{name}/times-") and file.endswith(".json")


def compute_times(content: bytes, name: str) -> list[float]:
    """Read the GPU time of each run in milliseconds from a times file of trtexec.

    Raises:
        ExportError: the file is not a times file.
    """
    try:
        return [float(entry["computeMs"]) for entry in json.loads(content)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExportError(f"{name} is not a times file of trtexec: {error!r}.", _HINT) from error


def output_values(content: bytes, name: str) -> list[float]:
    """Read the values of the first output from an output file of trtexec.

    Raises:
        ExportError: the file is not an output file.
    """
    try:
        return [float(value) for value in json.loads(content)[0]["values"]]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ExportError(f"{name} is not an output file of trtexec: {error!r}.", _HINT) from error


def _parity(
    name: str,
    files: Mapping[str, bytes],
    given: Mapping[str, bytes],
    described: Mapping[str, Any],
    precision: str,
) -> Parity:
    import numpy as np

    shape = tuple(int(size) for size in described["output_shape"])
    right, judged = [], []
    for index in range(int(described["samples"])):
        wanted = given[f"reference/output-{index:02d}.txt"].split()
        right.append(np.array([int(value) for value in wanted], dtype=np.float64) / 1e6)
        file = f"{name}/output-{index:02d}.json"
        judged.append(np.array(output_values(files[file], file)))
    reference: npt.NDArray[Any] = np.stack(right).reshape(-1, *shape)
    return compare_outputs(
        reference, np.stack(judged).reshape(reference.shape), tolerance=DEVICE_TOLERANCES[precision]
    )
