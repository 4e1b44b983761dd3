"""Writes a bundle for a Jetson, a single archive: networks, reference outputs, a script and checksums.

    make_bundle("slim.tar.gz", [Path("model.onnx"), Path("model.fp16.onnx")], reference, target="jetson-nano")

On the board: `tar -xzf slim.tar.gz && sh slim/run.sh`. `export.device.bundle_results` reads the results.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.convert.onnx_header import OnnxHeader, parse_header
from export.convert.parity import AGREEMENTS, DEVICE_TOLERANCES
from export.device.archive import CHECKSUMS, PLAIN, checksums, pack
from export.device.targets import Target, find_target
from export.engine.reference import Reference
from export.errors import ExportError
from export.files import read_bytes, sha256_bytes, write_bytes

FORMAT = 1
SCRIPT = "run_on_device.sh"
COMMON = "on_device_common.sh"
"""The scripts' shared part, which replaces their include line."""


@dataclass(frozen=True)
class BundleInfo:
    """The facts of a written bundle.

    Attributes:
        path, sha256, size: The file, its checksum and size in bytes.
        identity: Checksum of the list of checksums; results name their bundle by it.
        target: The Jetson module that it is for.
        networks: Name of each network -> its precision.
    """

    path: Path
    sha256: str
    size: int
    identity: str
    target: Target
    networks: Mapping[str, str]


def make_bundle(
    path: str | Path,
    networks: Sequence[str | Path],
    reference: Reference,
    *,
    target: str,
    facts: Mapping[str, Any] | None = None,
) -> BundleInfo:
    """Write a bundle; the same networks and reference give the same bytes.

    Args:
        path: The archive, such as `slim.tar.gz`; it unpacks to a folder of the same name.
        networks: ONNX files with batch size 1; their precisions may differ.
        reference: Inputs (N, C, H, W) and the FP32 network's outputs (N, ...); a few are enough.
        target: A key of `TARGETS`.
        facts: More entries for `bundle.json`, such as the run's id.

    Raises:
        ExportError: the target is unknown or cannot run a network, a network is damaged or has another batch size or
            shape than the reference, or a name has other characters than letters, digits, dots and dashes.
    """
    goal, module = Path(path), find_target(target)
    folder = re.sub(r"\.(tar\.gz|tgz)$", "", goal.name)
    if not goal.name.endswith((".tar.gz", ".tgz")) or not PLAIN.fullmatch(folder):
        raise ExportError(
            f"Expected a bundle named NAME.tar.gz, of letters, digits, dots and dashes; got {goal.name!r}."
        )
    if not networks:
        raise ExportError("A bundle needs at least one network, got none.")
    files: dict[str, bytes] = {}
    lines: list[str] = []
    described: list[dict[str, Any]] = []
    for network in (Path(item) for item in networks):
        content = read_bytes(network, "ONNX file")
        header = parse_header(content, str(network))
        name = network.name[: -len(".onnx")] if network.name.endswith(".onnx") else network.name
        _check(header, network, name, module, reference)
        if f"models/{name}.onnx" in files:
            raise ExportError(f"Two networks have the name {name}.")
        files[f"models/{name}.onnx"] = content
        lines.append(_line(name, header, reference))
        described.append(
            {
                "name": name,
                "precision": header.precision,
                "sha256": sha256_bytes(content),
                "opset": header.opset,
            }
        )
    files.update(_reference_files(reference))
    files["models.txt"] = "".join(lines).encode()
    files["workspace.txt"] = f"{module.workspace_mib}\n".encode()
    files["run.sh"] = device_script(SCRIPT)
    files["README.txt"] = _readme(folder, module, described).encode()
    content_facts = {
        "format": FORMAT,
        "target": module.name,
        "networks": described,
        "samples": len(reference.inputs),
        "output_shape": list(reference.outputs.shape[1:]),
        "facts": dict(facts or {}),
    }
    files["bundle.json"] = (json.dumps(content_facts, indent=2, sort_keys=True) + "\n").encode()
    files[CHECKSUMS] = checksums(files)
    packed = pack(files, folder, executable=frozenset(["run.sh"]))
    write_bytes(goal, packed)
    return BundleInfo(
        path=goal,
        sha256=sha256_bytes(packed),
        size=len(packed),
        identity=sha256_bytes(files[CHECKSUMS]),
        target=module,
        networks={entry["name"]: entry["precision"] for entry in described},
    )


def device_script(name: str) -> bytes:
    """A script of this folder with the shared part included, so that a device needs a single file."""
    here = Path(__file__).parent
    own, line = (here / name).read_bytes(), f"# include {COMMON}\n".encode()
    if own.count(line) != 1:
        raise ExportError(f"{name} does not include {COMMON} once.", "Install the program again.")
    return own.replace(line, (here / COMMON).read_bytes())


def _check(header: OnnxHeader, path: Path, name: str, target: Target, reference: Reference) -> None:
    if not PLAIN.fullmatch(name):
        raise ExportError(
            f"{path.name!r} cannot go into a bundle: use letters, digits, dots and dashes in its name."
        )
    if len(header.inputs) != 1 or not PLAIN.fullmatch(header.inputs[0]):
        raise ExportError(
            f"{path} needs one input with a name of letters, digits, dots and dashes; got {list(header.inputs)}."
        )
    shape = header.shapes[header.inputs[0]]
    if shape != (1, *reference.inputs.shape[1:]):
        raise ExportError(
            f"{path} takes {list(shape)}; a bundle needs [1, {', '.join(map(str, reference.inputs.shape[1:]))}], "
            "one input of the reference.",
            "Export it with a batch of 1.",
        )
    if header.external_data:
        raise ExportError(f"{path} has its weights in other files.", "Export it as one file.")
    require_readable(path, header, target)


def require_readable(name: object, header: OnnxHeader, target: Target) -> None:
    """Refuse a file whose opset or precision the board does not support.

    Args:
        name: The file's name in messages.
        header: The file's header.
        target: The board.

    Raises:
        ExportError: the message names the unsupported opset or precision.
    """
    if header.opset > target.opset:
        raise ExportError(
            f"{name} has ONNX opset {header.opset}; the {target.title} reads opsets up to {target.opset}.",
            f"Export it again with opset {target.opset}.",
        )
    if header.precision == "int8" and not target.int8:
        raise ExportError(f"The {target.title} has no INT8 units.", "Use FP16.")


def _line(name: str, header: OnnxHeader, reference: Reference) -> str:
    """One line: name, precision, input, allowed difference in millionths, number of samples that must agree."""
    import numpy as np

    count = len(reference.inputs)
    allowed = DEVICE_TOLERANCES[header.precision] * max(1.0, float(np.abs(reference.outputs).max()))
    least = math.floor(min(AGREEMENTS[header.precision], 1 - 1 / count) * count)
    return f"{name} {header.precision} {header.inputs[0]} {round(allowed * 1e6)} {least}\n"


def _reference_files(reference: Reference) -> dict[str, bytes]:
    """Inputs in trtexec's format, and outputs in millionths, which a shell can compare."""
    import numpy as np

    if not np.isfinite(reference.outputs).all() or float(np.abs(reference.outputs).max()) >= 1e12:
        raise ExportError("The reference's outputs must be finite and below 10^12.")
    files = {}
    for index, (given, right) in enumerate(zip(reference.inputs, reference.outputs)):
        numbers = np.trunc(right.astype(np.float64).reshape(-1) * 1e6).astype(np.int64)
        files[f"reference/input-{index:02d}.bin"] = np.ascontiguousarray(given, dtype="<f4").tobytes()
        files[f"reference/output-{index:02d}.txt"] = "".join(f"{number}\n" for number in numbers).encode()
    return files


def _readme(folder: str, target: Target, networks: Sequence[Mapping[str, Any]]) -> str:
    listed = "\n".join(f"  {entry['name']}.onnx ({entry['precision']})" for entry in networks)
    return f"""A network for the {target.title}, to build and measure on the board itself.

{listed}

On the board (JetPack 4.6 or newer):

  tar -xzf {folder}.tar.gz
  cd {folder}
  sudo nvpmodel -q                 # shows the power mode; select the one that the network will run in
  sudo jetson_clocks               # fixes the clocks; otherwise latencies vary
  sh run.sh

It builds one engine for each network with trtexec, measures it in three processes of 15 seconds after 2
seconds of warm-up, compares its outputs with the reference, and writes the folder results and
results.tar.gz. Run it again after an interruption: it resumes where it stopped. Copy results.tar.gz back to the
machine that wrote the bundle.

A build takes minutes. An engine works only on this kind of board and with this TensorRT: do not copy engines.

  sh run.sh --help                 # options
  TRTEXEC=/path/to/trtexec sh run.sh
"""
