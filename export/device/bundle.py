"""Writes bundles: networks, a script, a manifest and checksums, which a device with trtexec builds and measures.

There are two kinds. A "network" bundle has one network in several precisions, the dense network that it was made of if
given, and reference outputs, with which the device verifies its engines; it is a single archive. A "timing" bundle has
many networks to time for a latency table; it is a folder. Their weights are random, so that nothing is verified.

    make_bundle("slim.tar.gz", [Path("model.onnx"), Path("model.fp16.onnx")], reference, target="jetson-nano")
    write_bundle(Path("bundle"), networks, target=TARGETS["jetson-nano"], order=["dense", "n01", "n02", "dense"])

On the device: `sh run.sh` in the bundle's folder. It measures the networks in several turns, alternately in the given
and the reverse order, and writes `results` and `results.tar.gz`, which `export.device.results` reads.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

from export.convert.onnx_header import OnnxHeader, parse_header
from export.convert.parity import AGREEMENTS, DEVICE_TOLERANCES, Reference
from export.device.archive import CHECKSUMS, PLAIN, json_object, pack, require_checksums, unpack
from export.device.readme import network_readme, timing_readme
from export.errors import ExportError
from export.files import disk_error, read_bytes, sha256_bytes, write_bytes

FORMAT = 3
MANIFEST = "bundle.json"
KINDS = {"network": "compress export --bundle", "timing": "compress profile --bundle"}
"""Kind -> the command that writes it."""

PROGRAM = tuple(Path(__file__).parent / name for name in ("infer.py", "infer_tensorrt.py"))
"""The program that runs a classifier's file, and its part for engines; a run's folder and a bundle have copies."""

DENSE = "dense"
"""Beginning of the names of dense networks. The slim network that one is compared with is called alike otherwise."""

OUTPUT, DENSE_OUTPUT = "output", "dense-output"
REFERENCE = "reference/{}-{:02d}.txt"
_REFERENCE = re.compile(r"reference/(dense-)?output-\d{2,}\.txt")


@dataclass(frozen=True)
class Target:
    """A Jetson module.

    Attributes:
        name: Its key in `TARGETS`.
        title: Its name in messages.
        compute_capability: Compute capability of its GPU.
        memory_gb: Memory shared by CPU and GPU.
        opset: The newest ONNX opset that all its JetPack versions read.
        int8: Whether its GPU has INT8 units.
        dla: Number of deep-learning accelerators.
    """

    name: str
    title: str
    compute_capability: str
    memory_gb: int
    opset: int
    int8: bool
    dla: int

    @property
    def workspace_mib(self) -> int:
        """Workspace of the builder in MiB; small on boards with 4 GB of shared memory."""
        return 256 if self.memory_gb <= 4 else 1024


TARGETS = {
    target.name: target
    for target in (
        Target("jetson-nano", "Jetson Nano", "5.3", 4, 13, False, 0),
        Target("jetson-tx2", "Jetson TX2", "6.2", 8, 13, False, 0),
        Target("jetson-xavier-nx", "Jetson Xavier NX", "7.2", 8, 17, True, 2),
        Target("jetson-agx-xavier", "Jetson AGX Xavier", "7.2", 32, 17, True, 2),
        Target("jetson-orin-nano-4gb", "Jetson Orin Nano 4GB", "8.7", 4, 17, True, 0),
        Target("jetson-orin-nano-8gb", "Jetson Orin Nano 8GB", "8.7", 8, 17, True, 0),
        Target("jetson-orin-nx-8gb", "Jetson Orin NX 8GB", "8.7", 8, 17, True, 1),
        Target("jetson-orin-nx-16gb", "Jetson Orin NX 16GB", "8.7", 16, 17, True, 2),
        Target("jetson-agx-orin-32gb", "Jetson AGX Orin 32GB", "8.7", 32, 17, True, 2),
        Target("jetson-agx-orin-64gb", "Jetson AGX Orin 64GB", "8.7", 64, 17, True, 2),
        Target("jetson-thor-t5000", "Jetson Thor T5000", "11.0", 128, 17, True, 0),
    )
}


FAMILIES = ("agx orin", "agx xavier", "orin nano", "orin nx", "xavier nx", "thor", "tx2", "nano")
"""Words of the modules' names, without the memory, which a board does not tell."""


def family_of(model: str) -> str:
    """Return the family of a module from a board's model or a title; empty if it names none, or several.

    >>> family_of("NVIDIA Jetson Orin Nano Developer Kit"), family_of("NVIDIA Orin")
    ('orin nano', '')
    """
    words = set(re.findall(r"[a-z0-9]+", model.lower()))
    found = [each for each in FAMILIES if words.issuperset(each.split())]
    whole = [each for each in found if not any(each in other for other in found if other != each)]
    return whole[0] if len(whole) == 1 else ""


def find_target(name: str) -> Target:
    """Find a module by name.

    Raises:
        ExportError: the name is unknown; the message gives similar names.
    """
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(name, TARGETS, n=3, cutoff=0.4) or list(TARGETS)
    raise ExportError(f"There is no target {name}.", f"Did you mean {', '.join(near)}?")


@dataclass(frozen=True)
class BundleInfo:
    """The facts of a written bundle.

    Attributes:
        path: The archive or the folder.
        size: Its size in bytes.
        target: The device that it is for.
        networks: Name of each network -> its precision.
    """

    path: Path
    size: int
    target: Target
    networks: Mapping[str, str]


def folder_of(path: Path) -> str:
    """The folder that a bundle of this name unpacks to.

    Raises:
        ExportError: the name is not NAME.tar.gz, or has other characters than letters, digits, dots and dashes.
    """
    folder = re.sub(r"\.(tar\.gz|tgz)$", "", path.name)
    if not path.name.endswith((".tar.gz", ".tgz")) or not PLAIN.fullmatch(folder):
        raise ExportError(
            f"Expected a bundle named NAME.tar.gz, of letters, digits, dots and dashes; got {path.name!r}."
        )
    return folder


def make_bundle(
    path: str | Path,
    networks: Sequence[str | Path],
    reference: Reference,
    *,
    target: str,
    facts: Mapping[str, Any] | None = None,
    dense: Reference | None = None,
    more: Mapping[str, bytes] | None = None,
    streams: int = 1,
) -> BundleInfo:
    """Write a network bundle as one archive; the same networks and reference give the same bytes.

    Args:
        path: The archive, such as `slim.tar.gz`; it unpacks to a folder of the same name.
        networks: ONNX files of one batch size; their precisions may differ. Names of dense ones begin with `DENSE`.
        reference: Inputs (N, C, H, W) and the FP32 network's outputs (N, ...), for a few batches.
        target: A key of `TARGETS`.
        facts: More entries for the manifest, such as the run's id.
        dense: The same inputs and the dense network's outputs, if it is in the bundle.
        more: Further files by name, such as the program that runs a network.
        streams: Copies of a network that run at the same time while it is measured.

    Raises:
        ExportError: the target is unknown or cannot run a network, a network is damaged or has another batch size or
            shape than the reference, or a name has other characters than letters, digits, dots and dashes.
    """
    goal, module = Path(path), find_target(target)
    folder = folder_of(goal)
    if not networks:
        raise ExportError("A bundle needs at least one network, got none.")
    contents = (
        (re.sub(r"\.onnx$", "", file.name), read_bytes(file, "ONNX file")) for file in map(Path, networks)
    )
    with tempfile.TemporaryDirectory(prefix="bundle.") as temporary:
        written = write_bundle(
            Path(temporary) / folder,
            contents,
            target=module,
            reference=reference,
            dense=dense,
            facts=lambda: facts or {},
            more=more,
            streams=streams,
        )
        size = pack_bundle(written.path, goal)
    return BundleInfo(goal, size, module, written.networks)


def pack_bundle(folder: Path, path: Path) -> int:
    """Pack the files of a bundle's folder into a `.tar.gz`; return its size in bytes.

    Raises:
        ExportError: a file is missing or cannot be read, or the archive cannot be written.
    """
    sums = read_bytes(folder / CHECKSUMS, "list of checksums")
    names = [CHECKSUMS, *(line.partition("  ")[2] for line in sums.decode().splitlines())]
    files = {name: read_bytes(folder / name, "file of the bundle") for name in names}
    packed = pack(files, folder.name, executable=frozenset(["run.sh"]))
    write_bytes(path, packed)
    return len(packed)


def write_bundle(
    folder: Path,
    networks: Iterable[tuple[str, bytes]],
    *,
    target: Target,
    order: Sequence[str] | None = None,
    reference: Reference | None = None,
    dense: Reference | None = None,
    facts: Callable[[], Mapping[str, Any]] = dict,
    profile: bool = True,
    more: Mapping[str, bytes] | None = None,
    streams: int = 1,
    energy: bool = False,
) -> BundleInfo:
    """Write a bundle to an empty or new folder; the networks are consumed one at a time.

    Args:
        folder: The folder; its name must be safe in a shell.
        networks: (name, ONNX file with a fixed batch size); names are unique.
        target: The device; it determines the opset, INT8 support and workspace.
        order: Names in the order of measurement; None is that of the networks. A repeated name is measured again in
            each turn: the same network first and last shows the drift of the device.
        reference: Inputs and outputs of a network bundle; None writes a timing bundle.
        dense: The same inputs and the dense network's outputs; None without it.
        facts: Returns more entries for the manifest; called after all networks are written.
        profile: Whether to measure the time of each layer as well.
        more: Further files by name.
        streams: Copies of a network that run at the same time while it is measured.
        energy: Whether to record the module's power while a network is measured; the device is then a Jetson.

    Raises:
        ExportError: a name or a network is not supported, or the folder cannot be written.
    """
    kind = "timing" if reference is None else "network"
    described: dict[str, dict[str, Any]] = {}
    hashes: dict[str, str] = {}
    lines: list[str] = []
    size, batch = 0, 1

    def put(name: str, content: bytes) -> None:
        nonlocal size
        write_bytes(folder / name, content)
        hashes[name] = sha256_bytes(content)
        size += len(content)

    for name, content in networks:
        header = parse_header(content, f"{name}.onnx")
        if name in described:
            raise ExportError(f"Two networks have the name {name}.")
        batch = _check(name, header, target, reference)
        put(f"models/{name}.onnx", content)
        described[name] = {
            "name": name, "precision": header.precision, "sha256": hashes[f"models/{name}.onnx"],
            "opset": header.opset, "limits": _limits(name, header, reference, dense, batch),
        }  # fmt: skip
    for name, entry in described.items():
        limits = entry.pop("limits")
        if reference is not None:
            entry["reference"] = DENSE_OUTPUT if name.startswith(DENSE) else OUTPUT
            entry["beside"] = _beside(name, described)
            limits += f" {entry['reference']} {entry['beside'] or '-'}"
        lines.append(f"{name} {entry['precision']}{limits}\n")
    turns = list(order or described)
    unknown = sorted(set(turns) ^ set(described))
    if unknown:
        raise ExportError(f"{unknown[0]} is only in one of the order and the networks.")
    manifest = {
        "format": FORMAT, "kind": kind, "target": target.name, "networks": list(described.values()), "order": turns,
        "profile": profile, "facts": dict(facts()),
    }  # fmt: skip
    if streams > 1:
        manifest["streams"] = streams
        put("streams.txt", f"{streams}\n".encode())
    if energy:
        manifest["energy"] = True
        put("energy.txt", b"yes\n")
    if reference is not None:
        for name, content in _reference_files(reference, dense, batch):
            put(name, content)
        manifest.update(samples=len(reference.inputs) // batch, output_shape=list(reference.outputs.shape[1:]))
        manifest.update({"batch": batch} if batch > 1 else {})
    put("kind.txt", f"{kind}\n".encode())
    put("networks.txt", "".join(lines).encode())
    put("order.txt", "".join(f"{name}\n" for name in turns).encode())
    put("workspace.txt", f"{target.workspace_mib}\n".encode())
    if profile:
        put("profile.txt", b"yes\n")
    for name, content in (more or {}).items():
        put(name, content)
    put("run.sh", device_script())
    precisions = {name: str(entry["precision"]) for name, entry in described.items()}
    if reference is None:
        text = timing_readme(folder.name, target.title, len(precisions))
    else:
        dense_names = [name for name in precisions if name.startswith(DENSE)]
        text = network_readme(folder.name, target.title, precisions, dense_names, PROGRAM[0].name in (more or {}))
    put("README.txt", text.encode())
    put(MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    write_bytes(folder / CHECKSUMS, "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode())
    try:
        (folder / "run.sh").chmod(0o755)
    except OSError as error:
        raise disk_error(folder, error) from error
    return BundleInfo(folder, size, target, {name: entry["precision"] for name, entry in described.items()})


def device_script() -> bytes:
    """The script that runs on a device: a single file that needs a POSIX shell, coreutils and trtexec."""
    return (Path(__file__).parent / "run_on_device.sh").read_bytes()


def _check(name: str, header: OnnxHeader, target: Target, reference: Reference | None) -> int:
    """Refuse a network that the script or the device cannot handle; return its batch."""
    batch = 1
    file = f"{name}.onnx"
    if not PLAIN.fullmatch(name):
        raise ExportError(f"{file!r} cannot go into a bundle: use letters, digits, dots and dashes in its name.")
    if header.external_data:
        raise ExportError(f"{file} has its weights in other files.", "Export it as one file.")
    if reference is not None:
        if len(header.inputs) != 1 or not PLAIN.fullmatch(header.inputs[0]):
            raise ExportError(
                f"{file} needs one input with a name of letters, digits, dots and dashes; got {list(header.inputs)}."
            )
        shape, count = header.shapes[header.inputs[0]], len(reference.inputs)
        batch = shape[0] if shape else 0
        if shape[1:] != reference.inputs.shape[1:] or batch < 1 or count % batch:
            wanted = ", ".join(map(str, reference.inputs.shape[1:]))
            raise ExportError(
                f"{file} takes {list(shape)}; a bundle needs [N, {wanted}], with a fixed batch N that divides the "
                f"{count} inputs of the reference.",
                "Export it with a batch of 1.",
            )
    if header.opset > target.opset:
        raise ExportError(
            f"{file} has ONNX opset {header.opset}; the {target.title} reads opsets up to {target.opset}.",
            f"Export it again with opset {target.opset}.",
        )
    if header.precision == "int8" and not target.int8:
        raise ExportError(f"The {target.title} has no INT8 units.", "Use FP16.")
    return batch


def _beside(name: str, networks: Iterable[str]) -> str | None:
    """Return the dense network that a slim one is compared with: of the same name but for its beginning."""
    if name.startswith(DENSE):
        return None
    wanted = f"{DENSE}{name[len(name.split('.')[0]):]}"
    return wanted if wanted in networks else None


def _limits(
    name: str, header: OnnxHeader, reference: Reference | None, dense: Reference | None, batch: int
) -> str:
    """For a network's line: input, allowed difference in millionths, number of samples that must agree.

    The dense network may be untrained; it is there to be timed, and the order of its outputs means nothing.
    """
    import numpy as np

    if reference is None:
        return ""
    is_dense = name.startswith(DENSE)
    if is_dense and dense is None:
        raise ExportError(f"{name}.onnx is a dense network, and the bundle has no outputs of it.")
    right = dense if is_dense and dense is not None else reference
    count = len(right.inputs) // batch
    allowed = DEVICE_TOLERANCES[header.precision] * max(1.0, float(np.abs(right.outputs).max()))
    least = 0 if is_dense else math.floor(min(AGREEMENTS[header.precision], 1 - 1 / count) * count)
    return f" {header.inputs[0]} {round(allowed * 1e6)} {least}"


def _reference_files(reference: Reference, dense: Reference | None, batch: int) -> Iterator[tuple[str, bytes]]:
    """Inputs of each batch in trtexec's format, and outputs in millionths, which a shell can compare."""
    import numpy as np

    starts = range(0, len(reference.inputs), batch)
    for index, start in enumerate(starts):
        given = reference.inputs[start : start + batch]
        yield f"reference/input-{index:02d}.bin", np.ascontiguousarray(given, dtype="<f4").tobytes()
    for name, each in ((OUTPUT, reference), (DENSE_OUTPUT, dense)):
        if each is None:
            continue
        if not np.isfinite(each.outputs).all() or float(np.abs(each.outputs).max()) >= 1e12:
            raise ExportError("The reference's outputs must be finite and below 10^12.")
        for index, start in enumerate(starts):
            right = each.outputs[start : start + batch]
            numbers = np.trunc(right.astype(np.float64).reshape(-1) * 1e6).astype(np.int64)
            yield REFERENCE.format(name, index), "".join(f"{number}\n" for number in numbers).encode()


@dataclass(frozen=True)
class Bundle:
    """A written bundle, as it is needed to read its results.

    Attributes:
        path: The archive or the folder.
        manifest: The content of its manifest.
        identity: Checksum of its list of checksums; results name their bundle by it.
        files: Its files, of a folder those without networks.
    """

    path: Path
    manifest: Mapping[str, Any]
    identity: str
    files: Mapping[str, bytes]


def open_bundle(path: str | Path, kind: str) -> Bundle:
    """Open a bundle and check its files against their checksums.

    Args:
        path: The archive, or a folder with at least the manifest, the list of checksums and the reference outputs.
        kind: A key of `KINDS`.

    Raises:
        ExportError: it is missing, damaged, unsafe, of another kind, or written by another version.
    """
    source = Path(path)
    if source.is_dir():
        sums = read_bytes(source / CHECKSUMS, "file of the bundle")
        listed = (line.partition("  ")[2] for line in sums.decode("utf-8", errors="replace").splitlines())
        wanted = [MANIFEST, *(name for name in listed if _REFERENCE.fullmatch(name))]
        files = {CHECKSUMS: sums, **{name: read_bytes(source / name, "file of the bundle") for name in wanted}}
    else:
        files = unpack(source)
    require_checksums(files, source, whole=not source.is_dir())
    manifest = json_object(files, MANIFEST, source)
    require_format(manifest, source)
    if manifest.get("kind") != kind:
        raise ExportError(f"{source} is not a {kind} bundle.", f"Give a bundle written by: {KINDS[kind]}")
    return Bundle(source, manifest, sha256_bytes(files[CHECKSUMS]), files)


def require_format(content: Mapping[str, Any], source: str | Path) -> None:
    """Refuse a bundle or results of another format.

    Raises:
        ExportError: the message says how to write the bundle again.
    """
    if content.get("format") != FORMAT:
        raise ExportError(
            f"{source} was written by another version of the program.",
            f"Write the bundle again ({' or '.join(KINDS.values())}), and run it on the device.",
        )
