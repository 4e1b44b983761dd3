"""Many networks to be timed on a device, in one folder: ONNX files, one shell script, a list and checksums.

    write_timing_bundle(Path("carry"), networks, ["dense", "n01", "n02", "dense"], target=..., facts=lambda: {})

On the device: `sh carry/run.sh`. It measures the networks in the order given, several times, there and back, and
writes `results` and `results.tar.gz`, which `export.device.timing_results` reads. The networks are measured and not
verified: a candidate's weights are random.
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
    """Fill a folder that is empty or does not exist; networks are written as they come.

    Args:
        folder: Where; it needs a plain name, because scripts handle it.
        networks: (name, ONNX file of batch 1), each name once.
        order: Names in the order of measuring; those that occur twice are measured twice in each turn, so that the
            first and the last show whether the device held still.
        target: Whose opset, INT8 units and memory count.
        facts: More to write into `bundle.json`, asked for when all networks are written.
        profile: Whether the time of each layer is measured too.

    Returns:
        Bytes of the folder.

    Raises:
        ExportError: a name or a network does not fit, or the folder cannot be written.
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
            raise ExportError(f"{name!r} is no plain name of a network, or occurs twice.")
        require_readable(name, header, target)
        put(f"models/{name}.onnx", content)
        lines.append(f"{name} {header.precision}\n")
        described.append(
            {"name": name, "precision": header.precision, "sha256": hashes[f"models/{name}.onnx"]}
        )
    unknown = sorted(set(order) ^ {entry["name"] for entry in described})
    if unknown:
        raise ExportError(f"The order and the networks differ in {unknown[0]}.")
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
    """The files of a bundle's folder that its checksums list, for `export.device.archive.pack`.

    Raises:
        ExportError: one is missing or cannot be read.
    """
    sums = read_bytes(folder / CHECKSUMS, "list of checksums")
    names = [line.partition("  ")[2] for line in sums.decode().splitlines()]
    return {CHECKSUMS: sums, **{name: read_bytes(folder / name, "file of the bundle") for name in names}}


def _readme(folder: str, target: Target, networks: int) -> str:
    return f"""{networks} small networks for the {target.title}, to be timed on the device itself.

On the device (JetPack 4.6 or newer, or anything else with trtexec):

  sudo nvpmodel -q                 # which power mode; choose the one that the network will run in
  sudo jetson_clocks               # holds the clocks still, or the numbers wander
  sh {folder}/run.sh

It builds one engine for each network with trtexec, measures all in turns, three times, and writes the folder
results and results.tar.gz beside run.sh. Building takes up to some minutes for each network. Interrupted, it goes
on where it was when it is started again. Leave the device alone meanwhile. The engines are removed at the end.

Bring the folder or results.tar.gz back and read it in with:

  compress profile --import {folder}

  sh run.sh --help                 # options
  TRTEXEC=/path/to/trtexec sh run.sh
"""
