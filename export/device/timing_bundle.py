"""Writes a timing bundle: a folder of many ONNX files, one shell script, a list and checksums.

    write_timing_bundle(Path("bundle"), networks, ["dense", "n01", "n02", "dense"], target=..., facts=lambda: {})

On the device: `sh bundle/run.sh`. It measures the networks in several turns, alternately in the given and the reverse
order, and writes `results` and `results.tar.gz`, which `export.device.timing_results` reads. The networks are not
verified, because the weights of a candidate are random.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable

from export.convert.onnx_header import parse_header
from export.device.archive import CHECKSUMS, PLAIN
from export.device.bundle import device_script, require_readable
from export.device.targets import Target
from export.errors import ExportError
from export.files import read_bytes, sha256_bytes, write_bytes

FORMAT = 1
SCRIPT = "time_on_device.sh"
MANIFEST = "bundle.json"


def write_timing_bundle(
    folder: Path,
    networks: Iterable[tuple[str, bytes]],
    order: Sequence[str],
    *,
    target: Target,
    facts: Callable[[], Mapping[str, Any]],
    profile: bool = True,
) -> int:
    """Write a timing bundle to an empty or new folder; the networks are consumed one at a time.

    Args:
        folder: The folder; its name must be safe in a shell.
        networks: (name, ONNX file with batch size 1); names are unique.
        order: Names in the order of measurement. A repeated name is measured again in each turn: the same network
            first and last shows the drift of the device.
        target: The device; it determines the opset, INT8 support and workspace.
        facts: Returns more entries for `bundle.json`; called after all networks are written.
        profile: Whether to measure the time of each layer as well.

    Returns:
        Size of the folder in bytes.

    Raises:
        ExportError: a name or a network is not supported, or the folder cannot be written.
    """
    described: list[dict[str, Any]] = []
    hashes: dict[str, str] = {}
    lines: list[str] = []
    size = 0

    def put(name: str, content: bytes) -> None:
        nonlocal size
        write_bytes(folder / name, content)
        hashes[name] = sha256_bytes(content)
        size += len(content)

    for name, content in networks:
        header = parse_header(content, f"{name}.onnx")
        if not PLAIN.fullmatch(name) or any(entry["name"] == name for entry in described):
            raise ExportError(
                f"The name {name!r} occurs twice, or has other characters than letters, digits, dots and dashes."
            )
        require_readable(name, header, target)
        put(f"models/{name}.onnx", content)
        lines.append(f"{name} {header.precision}\n")
        described.append(
            {"name": name, "precision": header.precision, "sha256": hashes[f"models/{name}.onnx"]}
        )
    unknown = sorted(set(order) ^ {entry["name"] for entry in described})
    if unknown:
        raise ExportError(f"{unknown[0]} is only in one of the order and the networks.")
    put("networks.txt", "".join(lines).encode())
    put("order.txt", "".join(f"{name}\n" for name in order).encode())
    put("workspace.txt", f"{target.workspace_mib}\n".encode())
    if profile:
        put("profile.txt", b"yes\n")
    put("run.sh", device_script(SCRIPT))
    put("README.txt", _readme(folder.name, target, len(described)).encode())
    manifest = {
        "format": FORMAT, "kind": "timing", "target": target.name, "order": list(order), "networks": described,
        "profile": profile, "facts": dict(facts()),
    }  # fmt: skip
    put(MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    write_bytes(folder / CHECKSUMS, "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode())
    (folder / "run.sh").chmod(0o755)
    return size


def folder_files(folder: Path) -> dict[str, bytes]:
    """Read the files that a bundle folder's checksums list, for `export.device.archive.pack`.

    Raises:
        ExportError: a file is missing or cannot be read.
    """
    sums = read_bytes(folder / CHECKSUMS, "list of checksums")
    names = [line.partition("  ")[2] for line in sums.decode().splitlines()]
    return {CHECKSUMS: sums, **{name: read_bytes(folder / name, "file of the bundle") for name in names}}


def _readme(folder: str, target: Target, networks: int) -> str:
    return f"""{networks} small networks for the {target.title}, to time on the device itself.

On the device (JetPack 4.6 or newer, or anything else with trtexec):

  sudo nvpmodel -q                 # shows the power mode; select the one that the network will run in
  sudo jetson_clocks               # fixes the clocks; otherwise latencies vary
  sh {folder}/run.sh

It builds one engine for each network with trtexec, measures all in turns, three times, and writes the folder
results and results.tar.gz beside run.sh. A build takes up to a few minutes for each network. Run it again after an
interruption: it resumes where it stopped. Do not use the device in the meantime. The engines are removed at the end.

Copy the folder or results.tar.gz back and import it with:

  compress profile --import {folder}

  sh run.sh --help                 # options
  TRTEXEC=/path/to/trtexec sh run.sh
"""
