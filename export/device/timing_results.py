"""Reads and checks the results of a timing bundle, which are not trusted.

All measurements must belong to the bundle, to one device in one power mode, and to one version of TensorRT.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from export.device.archive import CHECKSUMS, json_object, printable, require_checksums, unpack
from export.device.timing_bundle import FORMAT, MANIFEST
from export.device.timings import Board, Timed, Timings, Turn
from export.errors import ExportError
from export.files import sha256_bytes

LARGEST_RESULTS = 256 << 20
"""Maximum size of results in bytes; tens of megabytes are usual."""

SLOWEST_MS = 60_000.0
FASTEST_MS = 0.001
MOST_TURNS = 999
_TIMES = re.compile(r"(?P<turn>[1-9]\d{0,2})-(?P<slot>[1-9]\d{0,3})\.txt")
_AGAIN = "Run sh run.sh on the device again: it resumes where it stopped."


def read_manifest(files: Mapping[str, bytes], source: Path) -> dict[str, Any]:
    """Read the manifest of a timing bundle.

    Raises:
        ExportError: the bundle is damaged, or not a timing bundle.
    """
    manifest = json_object(files, MANIFEST, source)
    if manifest.get("kind") != "timing":
        raise ExportError(
            f"{source} is not a timing bundle.", "Give a folder written by: compress profile --bundle"
        )
    if manifest.get("format") != FORMAT:
        raise ExportError(f"{source} was written by another version of the program.", "Write the bundle again.")
    return manifest


def read_timings(results: Path, bundle: Path, given: Mapping[str, bytes]) -> Timings:
    """Read the measurements of a device.

    Args:
        results: `results.tar.gz` or the folder `results`.
        bundle: The bundle, for messages.
        given: The bundle's `bundle.json` and its list of checksums, by name.

    Raises:
        ExportError: the results are damaged, unsafe or incomplete, belong to another bundle, or mix devices, power
            modes or versions.
    """
    manifest = read_manifest(given, bundle)
    files = unpack(results, largest=LARGEST_RESULTS)
    if "results.json" not in files:
        raise ExportError(f"{results} has no results.json: the script has not finished.", _AGAIN)
    require_checksums(files, results)
    found = json_object(files, "results.json", results)
    if found.get("format") != FORMAT:
        raise ExportError(f"{results} was written by another version of the program.", "Write the bundle again.")
    if found.get("bundle") != sha256_bytes(given[CHECKSUMS]):
        raise ExportError(
            f"{results} belongs to another bundle than {bundle}.", "Give the bundle that was measured."
        )
    board = _board(found)
    known = {str(entry["name"]): entry for entry in manifest["networks"]}
    try:
        turns = int(found["processes"])
        if not 1 <= turns <= MOST_TURNS:
            raise ValueError(f"{turns} turns")
        networks = {
            name: _timed(name, known, files, found, board, results) for name in _names(found, known, results)
        }
        timings = Timings(
            board,
            networks,
            sha256_bytes(files[CHECKSUMS]),
            turns,
            int(found["duration_s"]),
            int(found["warmup_s"]),
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ExportError(f"{results} cannot be parsed: {error!r}.", _AGAIN) from error
    _require_complete(timings, manifest["order"], results)
    return timings


def _names(found: Mapping[str, Any], known: Mapping[str, Any], results: Path) -> list[str]:
    names = [str(entry["name"]) for entry in found["networks"]]
    for name in names:
        if name not in known:
            raise ExportError(f"{results} names {printable(name)}, which the bundle does not have.")
    if len(set(names)) != len(names):
        raise ExportError(f"{results} has a network twice.", "Copy all of it again.")
    missing = sorted(set(known) - set(names))
    if missing:
        raise ExportError(f"{results} has no result for {len(missing)} networks, such as {missing[0]}.", _AGAIN)
    return names


def _timed(
    name: str,
    known: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, bytes],
    found: Mapping[str, Any],
    board: Board,
    results: Path,
) -> Timed:
    entry = next(each for each in found["networks"] if each["name"] == name)
    if entry["onnx_sha256"] != known[name]["sha256"]:
        raise ExportError(f"{results} used another {name}.onnx than the bundle's.")
    if entry["status"] != "ok":
        return Timed(name, (), printable(entry.get("reason") or entry["status"]), ())
    turns = []
    for file in sorted(files):
        folder, _, rest = file.partition("/")
        match = _TIMES.fullmatch(rest) if folder == name else None
        if match is None:
            continue
        state = json_object(files, f"{file[: -len('.txt')]}.json", results)
        _same_state(state, board, file, results)
        clocks = {str(key): int(value) for key, value in state["after"].items() if _is_clock(str(key))}
        turns.append(Turn(int(match["turn"]), int(match["slot"]), _times(files[file], file, results), clocks))
    layers = _layers(files[f"{name}/profile.json"]) if f"{name}/profile.json" in files else ()
    return Timed(name, tuple(turns), "", layers)


def _same_state(state: Mapping[str, Any], board: Board, file: str, results: Path) -> None:
    """Refuse a measurement with another device, power mode or version than the results state."""
    for key, what, stated in (
        ("board", "board", board.identity),
        ("tensorrt", "version of TensorRT", board.tensorrt),
        ("power_mode", "power mode", board.power_mode),
    ):
        got = printable(state.get(key, ""))
        if got != stated:
            raise ExportError(
                f"{results} mixes measurements: {file} is of the {what} {got!r}, the rest of {stated!r}.",
                "Delete the folder results on the device and measure again.",
            )


def _times(content: bytes, file: str, results: Path) -> tuple[float, ...]:
    """Parse a file with one time in whole nanoseconds on each line; return milliseconds."""
    lines = content.split()
    if not lines or not all(line.isdigit() and len(line) <= 12 for line in lines):
        raise ExportError(f"{results}: {file} is not a list of times.", "Copy all of it again.")
    times = tuple(int(line) / 1e6 for line in lines)
    wrong = [time for time in times if not FASTEST_MS <= time <= SLOWEST_MS]
    if wrong:
        raise ExportError(
            f"{results}: {file} has a time of {wrong[0]:g} ms, expected {FASTEST_MS:g} to {SLOWEST_MS:g} ms."
        )
    return times


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


def _require_complete(timings: Timings, order: Sequence[str], results: Path) -> None:
    """Refuse results in which a network that was built lacks a measurement of any turn and slot."""
    missing = [
        f"{name} in turn {turn}"
        for turn in range(1, timings.turns + 1)
        for slot, name in enumerate(order, start=1)
        if not timings.networks[name].reason
        and not any((each.turn, each.slot) == (turn, slot) for each in timings.networks[name].turns)
    ]
    if missing:
        raise ExportError(f"{len(missing)} measurements are missing in {results}, such as {missing[0]}.", _AGAIN)


def _board(found: Mapping[str, Any]) -> Board:
    called = {"identity": "board"}
    names = [field.name for field in fields(Board)]
    return Board(**{name: printable(found.get(called.get(name, name), "")) for name in names})


def _is_clock(name: str) -> bool:
    """Whether a reading is a clock, named after an address (17000000.gpu), or a temperature (GPU-therm)."""
    return re.fullmatch(r"[0-9a-f]+\.\w+", name) is not None
