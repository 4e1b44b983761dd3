"""A stand-in for `trtexec` in one of its versions: takes the flags that the version has, writes files of its formats.

As a module it makes the program (`make_trtexec`); as a program it is that. What a version accepts follows NVIDIA's
documentation; the formats of the times and output files are those of its open-source samples. The "engine" is the
ONNX file with a header, and is run by ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import struct
import sys
from pathlib import Path

VERSIONS = ("8.2.1", "8.5.2", "8.6.2", "10.3.0", "10.13.2", "11.4.1")

_ALWAYS = {
    "onnx", "saveEngine", "loadEngine", "loadInputs", "exportTimes", "exportOutput", "exportProfile", "exportLayerInfo",
    "warmUp", "duration", "iterations", "timingCacheFile", "useDLACore", "allowGPUFallback", "dumpProfile",
    "separateProfileRun", "useCudaGraph", "useSpinWait", "noDataTransfers", "help",
}  # fmt: skip


def release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def flags_of(version: str) -> set[str]:
    """The flags that a version takes."""
    number, flags = release(version), set(_ALWAYS)
    if number < (10, 0):
        flags |= {"workspace", "explicitBatch", "buildOnly"}
    if number >= (8, 4):
        flags |= {"memPoolSize", "profilingVerbosity"}
    if number >= (8, 6):
        flags |= {"skipInference"}
    flags |= {"infStreams"} if number >= (10, 0) else {"streams"}
    if number < (11, 0):
        flags |= {"fp16", "int8", "best", "calib", "layerPrecisions"}
    if number >= (10, 0):
        flags |= {"stronglyTyped"}
    return flags


def newest_opset(version: str) -> int:
    return 20 if release(version) >= (10, 0) else 17 if release(version) >= (8, 4) else 13


def tag(version: str) -> str:
    """8.5.2 -> v8502; 10.3.0 -> v100300."""
    major, minor, patch = (int(part) for part in version.split("."))
    return (
        f"v{major * 1000 + minor * 100 + patch}" if major < 10 else f"v{major * 10000 + minor * 100 + patch}"
    )


def make_trtexec(folder: Path, version: str, **behaviour: object) -> Path:
    """Write the program.

    Args:
        folder: Where `trtexec` goes.
        version: One of `VERSIONS`.
        behaviour: `fail`: "build", "measure" or "verify"; `shift`: added to every output; `calls`: a file that
            gets each call's arguments; `rule`: "named", "nameless" or "precisions", see `layers`; `factor`: on the
            times of a rule; `die_after`: how many calls until the script that calls is killed; `memory`: a folder for
            what was worked out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "trtexec"
    # the folder of the test session: what one program worked out, the next one need not
    settings = json.dumps({"version": version, "memory": str(folder.parent.parent / "outputs"), **behaviour})
    root = str(Path(__file__).parents[3])
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {root!r})\n"
        f"from tests.export.device.fake_trtexec import main\nsys.exit(main({settings!r}))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def main(settings: str) -> int:
    behaviour = json.loads(settings)
    version = behaviour["version"]
    arguments = sys.argv[1:]
    print(f"&&&& RUNNING TensorRT.trtexec [TensorRT {tag(version)}] # trtexec {' '.join(arguments)}")
    options = {}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name not in flags_of(version) or not argument.startswith("--"):
            return error(f"Unknown option: {argument}")
        options[name] = value
    if "help" in options or not options:
        print("=== Model Options ===")
        return 0
    if "calls" in behaviour:
        with open(behaviour["calls"], "a") as file:
            file.write(" ".join(arguments) + "\n")
    print(
        "[11/20/2026-12:00:00] [I] Selected Device: Orin\n[11/20/2026-12:00:00] [I] Compute Capability: 8.7"
    )
    print("[11/20/2026-12:00:00] [I] Compute Clock Rate: 0.624 GHz")
    if "die_after" in behaviour and count_call(Path(sys.argv[0] + ".calls")) > behaviour["die_after"]:
        os.kill(os.getppid(), signal.SIGKILL)
        return 1
    if "onnx" in options:
        return build(options, behaviour)
    return run(options, behaviour)


def error(text: str) -> int:
    print(f"[11/20/2026-12:00:00] [E] {text}\n&&&& FAILED TensorRT.trtexec")
    return 1


def build(options: dict[str, str], behaviour: dict[str, object]) -> int:
    from export.convert.onnx_header import read_header

    version, header = str(behaviour["version"]), read_header(options["onnx"])
    number, content = release(version), Path(options["onnx"]).read_bytes()
    if header.opset > newest_opset(version):
        return error(f"opset {header.opset} is newer than {newest_opset(version)}")
    if number < (10, 0):
        wanted = {"fp32": set(), "fp16": {"fp16"}, "int8": {"fp16", "int8"}}[header.precision]
        if {"fp16", "int8"} & set(options) != wanted:
            return error(f"{header.precision} was built with {sorted(options)}")
    elif number < (11, 0) and ("stronglyTyped" not in options or {"fp16", "int8"} & set(options)):
        return error("the network must be strongly typed")
    if number >= (8, 6) and "skipInference" not in options:
        return error("the engine would be run as well")
    if behaviour.get("fail") == "build":
        return error("Error Code 10: Could not find any implementation for node /conv1/Conv.")
    if "rule" in behaviour:
        content = json.dumps(
            known_layers(content, str(behaviour["rule"]), Path(str(behaviour["memory"])))
        ).encode()
    Path(options["saveEngine"]).write_bytes(f"engine {version}\n".encode() + content)
    Path(options["timingCacheFile"]).write_bytes(b"timings")
    return 0


def run(options: dict[str, str], behaviour: dict[str, object]) -> int:
    version = str(behaviour["version"])
    header, _, content = Path(options["loadEngine"]).read_bytes().partition(b"\n")
    if header.decode() != f"engine {version}":
        return error("Serialization Error: the engine was built by another version")
    if "exportTimes" in options:
        if release(version) < (11, 0) and not {"useCudaGraph", "useSpinWait", "noDataTransfers"} <= set(
            options
        ):
            return error("measured otherwise than TensorRT 11 measures by default")
        if behaviour.get("fail") == "measure":
            return error("Cuda failure: out of memory")
        middle = 1.6
        if "rule" in behaviour:
            middle = float(behaviour.get("factor", 1)) * (
                0.05 + 0.9 * sum(time for _, time in json.loads(content))
            )
        streams = int(options.get("infStreams") or options.get("streams") or 1)
        write_times(Path(options["exportTimes"]), streams * middle)
    if "exportOutput" in options:
        if behaviour.get("fail") == "verify":
            return error("Cuda failure: an illegal memory access was encountered")
        name, _, file = options["loadInputs"].partition(":")
        found = remembered(Path(str(behaviour["memory"])), content, name, Path(file))
        write_outputs(Path(options["exportOutput"]), found, float(str(behaviour.get("shift", 0))))
    for kind in ("exportProfile", "exportLayerInfo"):
        if kind in options:
            known = kind == "exportProfile" and "rule" in behaviour
            write_profile(Path(options[kind]), json.loads(content) if known else [])
    return 0


def count_call(path: Path) -> int:
    """How many calls there were, this one among them."""
    with path.open("a") as file:
        file.write(".")
    return path.stat().st_size


def known_layers(content: bytes, rule: str, memory: Path) -> list[tuple[str, float]]:
    """`layers`, kept in a folder: importing what reads the network is most of the tests' time."""
    kept = memory / f"{hashlib.sha256(content).hexdigest()}.{rule}.json"
    if not kept.is_file():
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(layers(content, rule)))
    found: list[tuple[str, float]] = json.loads(kept.read_text())
    return found


def layers(content: bytes, rule: str) -> list[tuple[str, float]]:
    """(name, milliseconds) of the layers: a change of layout, then for each product a launch and blocks of 8 channels.

    Where `rule` is "named", a layer is called after its nodes, where it is "nameless" after nothing that the network
    knows. With "precisions" it is that of `tests.latency.made_up_engines`, which reads Q/DQ pairs.
    """
    if rule == "precisions":
        from tests.latency.made_up_engines import engine_layers

        return engine_layers(content)
    import math

    import onnx

    graph = onnx.load_model_from_string(content).graph
    shapes = {item.name: tuple(item.dims) for item in graph.initializer}
    found = [("Reformatting CopyNode for Input Tensor 0 to " + graph.node[0].name, 0.001)]
    for place, node in enumerate(graph.node):
        shape = next((shapes[name] for name in node.input if len(shapes.get(name, ())) >= 2), None)
        if node.op_type in ("Conv", "Gemm") and shape is not None:
            blocks = math.ceil(shape[0] / 8) * math.ceil(shape[1] / 8)
            behind = graph.node[place + 1] if place + 1 < len(graph.node) else node
            name = f"{node.name} + {behind.name}" if behind.op_type == "Relu" else node.name
            found.append((name, 0.02 + 0.0008 * blocks * math.prod(shape[2:])))
    return (
        found if rule == "named" else [(f"__myl_Fc_{place}", time) for place, (_, time) in enumerate(found)]
    )


def write_profile(path: Path, found: list[tuple[str, float]]) -> None:
    """In the format of `exportJSONProfile`."""
    lines = ["[", '  { "count" : 100 }']
    for name, time in found:
        lines.append(
            f', {{ "name" : "{name}", "timeMs" : {time * 100:g}, "averageMs" : {time:g}, "percentage" : 1 }}'
        )
    path.write_text("\n".join([*lines, "]", ""]) if found else "[]\n")


def write_times(path: Path, middle: float) -> None:
    """Twenty-one runs around `middle` ms, a hundredth apart, in the format of `exportJSONTrace`."""
    lines, separator = ["["], "  "
    for index in range(21):
        compute = middle + (index - 10) * min(0.01, middle / 100)
        lines.append(
            f'{separator}{{ "startInMs" : {index * 2}, "endInMs" : {index * 2}, "startComputeMs" : {index * 2}, '
            f'"endComputeMs" : {index * 2 + compute:g}, "startOutMs" : {index * 2 + 1.9:g}, "endOutMs" : '
            f'{index * 2 + 1.9:g}, "inMs" : 0, "computeMs" : {compute:g}, "outMs" : 0, "latencyMs" : {compute:g} }}'
        )
        separator = ", "
    path.write_text("\n".join([*lines, "]", ""]))


def remembered(memory: Path, content: bytes, name: str, given: Path) -> tuple[str, str, list[float]]:
    """`outputs`, kept in a folder: importing what computes them is most of the tests' time."""
    kept = memory / f"{hashlib.sha256(content + given.read_bytes()).hexdigest()}.json"
    if not kept.is_file():
        kept.parent.mkdir(exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(outputs(content, name, given)))
        part.replace(kept)
    title, shape, numbers = json.loads(kept.read_text())
    return title, shape, numbers


def outputs(content: bytes, name: str, given: Path) -> tuple[str, str, list[float]]:
    """Name, shape and values of the first output."""
    import numpy as np

    from export.convert.onnx_header import parse_header
    from export.convert.ort import onnx_outputs

    header = parse_header(content)
    numbers = given.read_bytes()
    array = np.array(struct.unpack(f"<{len(numbers) // 4}f", numbers), np.float32).reshape(
        header.shapes[name]
    )
    output = onnx_outputs(content, array)[0]
    shape = "x".join(str(size) for size in output.shape)
    return header.outputs[0], shape, [float(value) for value in output.reshape(-1)]


def write_outputs(path: Path, found: tuple[str, str, list[float]], shift: float) -> None:
    """The first output in the format of `exportJSONOutput`: six significant digits, as C++ streams write floats."""
    title, shape, numbers = found
    values = ", ".join(f"{value + shift:g}" for value in numbers)
    path.write_text(
        f'[\n  {{ "name" : "{title}"\n  , "dimensions" : "{shape}"\n  , "values" : [ {values} ]\n  }}\n]\n'
    )
