"""The commands for a device: `python -m export build | measure | verify FILE.onnx`.

They need TensorRT and numpy. Without a GPU, `measure` and `verify` use ONNX Runtime if it is installed.
Exit codes: 0 for success, 2 for an error that the user can fix, with a message, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.convert.batches import parse_batch
from export.convert.onnx_header import read_header
from export.device.here import board_lines, board_state, describe_board
from export.engine.bench import LatencyStats, percentile, summarise
from export.engine.cuda import find_device
from export.engine.engine import DEFAULT_WORKSPACE, BuildSettings, build_engine
from export.engine.engine_info import sidecar_path
from export.engine.trt import MODULES, available
from export.errors import ExportError
from export.files import sha256_file, write_json

if TYPE_CHECKING:
    import numpy.typing as npt

ORT = "onnxruntime"
STOPPED = 130  # the exit code of shells after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        result = options.command(options)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return STOPPED
    if options.json:
        write_json(Path(options.json), result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="name", required=True, metavar="build|measure|verify")
    made = {
        "build": (_build, "build an engine for this machine's GPU, or for RTX GPUs"),
        "measure": (_measure, "measure the latency of one run, and the throughput"),
        "verify": (_verify, "compare the outputs with the reference outputs"),
    }
    for name, (command, text) in made.items():
        own = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        own.set_defaults(command=command)
        own.add_argument("onnx", metavar="FILE.onnx", help="the network as an ONNX file")
        own.add_argument("--engine", metavar="FILE", help="the engine (default: FILE.engine)")
        own.add_argument("--json", metavar="FILE", help="write the results to FILE")
    build, measure, verify = (commands.choices[name] for name in made)
    build.add_argument("--module", choices=MODULES, help="the TensorRT module (default: the installed one)")
    build.add_argument(
        "--compute-capability", action="append", metavar="8.6", help="GPU to build for; may be repeated"
    )
    build.add_argument("--batch", metavar="1..8", help="range of a dynamic batch, such as 1..8 or 1..4..8")
    build.add_argument("--workspace", type=int, default=DEFAULT_WORKSPACE >> 20, metavar="MIB")
    build.add_argument("--optimisation-level", type=int, choices=range(6))
    build.add_argument("--dla", type=int, metavar="CORE", help="deep-learning accelerator to use")
    build.add_argument("--version-compatible", action="store_true")
    build.add_argument("--hardware-compatible", action="store_true")
    build.add_argument("--no-tf32", action="store_true", help="compute FP32 without TF32")
    build.add_argument("--timing-cache", metavar="FOLDER", help="folder of the kernel timing cache")
    for runs in (measure, verify):
        runs.add_argument("--runtime", choices=("engine", ORT), help="default: the engine if there is a GPU")
        runs.add_argument("--threads", type=_count, default=1, help="threads inside one operator for ONNX Runtime")
    measure.add_argument("--batch", type=_count, metavar="N", help="inputs of one run, of a file with an open batch")
    measure.add_argument(
        "--streams", type=_count, default=1, metavar="N", help="copies of the network that run at the same time"
    )
    measure.add_argument(
        "--percentile", type=_percentile, metavar="P", help="one more percentile of the runs to print, such as 95"
    )
    measure.add_argument("--warmup", type=float, default=2.0, metavar="SECONDS")
    measure.add_argument("--duration", type=float, default=15.0, metavar="SECONDS")
    measure.add_argument("--processes", type=_count, default=3, help="number of processes to measure in")
    verify.add_argument("--reference", metavar="FILE.npz", help="default: reference.npz beside the network")
    verify.add_argument("--tolerance", type=float, help="maximum difference for outputs of up to 1")
    return parser


def _count(text: str) -> int:
    """A whole number above zero; argparse reports anything else with the name of the option."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


_count.__name__ = "whole number"  # in argparse's messages


def _percentile(text: str) -> float:
    value = float(text)
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 100, got {text}")
    return value


_percentile.__name__ = "percentile"


def _engine_path(options: argparse.Namespace) -> Path:
    return Path(options.engine) if options.engine else Path(options.onnx).with_suffix(".engine")


def _build(options: argparse.Namespace) -> dict[str, Any]:
    engine = _engine_path(options)
    profile = parse_batch(options.batch).profile(read_header(options.onnx).shapes) if options.batch else {}
    info = build_engine(
        options.onnx,
        engine,
        module=options.module,
        compute_capability=options.compute_capability,
        settings=BuildSettings(
            workspace_bytes=options.workspace << 20,
            optimisation_level=options.optimisation_level,
            dla_core=options.dla,
            version_compatible=options.version_compatible,
            hardware_compatible=options.hardware_compatible,
            tf32=not options.no_tf32,
            profile=profile,
        ),
        timing_cache=options.timing_cache,
    )
    print(
        f"{engine}: {info.precision}, {info.size / 1e6:.2f} MB, for compute capability "
        f"{', '.join(info.compute_capabilities)}, {info.module} {info.version}, built in {info.seconds:.1f} s"
    )
    print(f"{sidecar_path(engine)}: its description")
    return info.to_dict()


def _runtime(options: argparse.Namespace) -> str:
    if options.runtime:
        return str(options.runtime)
    return "engine" if available() and find_device() is not None else ORT


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    header = read_header(options.onnx)
    before = board_state()
    if options.processes > 1:
        times, stats = _in_processes(options)
    else:
        times, stats = _times(options)
    found = {
        "onnx": Path(options.onnx).name,
        "onnx_sha256": sha256_file(Path(options.onnx)),
        "precision": header.precision,
        "board": describe_board(),
        "state_before": before,
        "state_after": board_state(),
        "processes": options.processes,
        "latency": stats.to_dict(),
        "times_ms": times,
    }
    shown = [("median", stats.median_ms), ("p90", stats.p90_ms), ("p99", stats.p99_ms)]
    if options.percentile is not None:
        found["percentile"] = options.percentile
        found["percentile_ms"] = percentile(times, options.percentile / 100)
        shown.append((f"p{options.percentile:g}", found["percentile_ms"]))
    print(
        f"{options.onnx}: {', '.join(f'{name} {value:.3f} ms' for name, value in shown)} "
        f"({stats.runs} runs, {stats.runtime} {stats.version}"
        + ("" if stats.steady else f", drift {stats.drift:+.0%}")
        + ")"
    )
    print(
        f"  batch {stats.batch}, {stats.streams} stream{'s' if stats.streams > 1 else ''}"
        + (f", {stats.threads} thread{'s' if stats.threads > 1 else ''}" if stats.threads else "")
        + f": {stats.inputs_per_s:.1f} inputs a second"
    )
    for line in board_lines(found["board"], before, found["state_after"]):
        print(line)
    return found


def _times(options: argparse.Namespace) -> tuple[list[float], LatencyStats]:
    if _runtime(options) == ORT:
        from export.engine.bench import OnnxRunner, merged, run_for, together

        runners = [
            OnnxRunner(options.onnx, threads=options.threads, batch=options.batch or 1)
            for _ in range(options.streams)
        ]
        if options.batch not in (None, runners[0].batch):
            raise ExportError(
                f"{options.onnx} takes batches of {runners[0].batch}, not of {options.batch}.",
                "Leave --batch out, or export the network with that batch.",
            )
        together(runners, lambda runner: runner.warm_up(options.warmup))
        times = merged(together(runners, lambda runner: run_for(runner, options.duration)))
        return times, runners[0].summarise(times, options.streams)
    from export.engine.runner import EngineRunner

    with EngineRunner(_engine_path(options), streams=options.streams, batch=options.batch) as engine:
        times = engine.times_ms(warmup_s=options.warmup, duration_s=options.duration)
        return times, engine.summarise(times)


def _in_processes(options: argparse.Namespace) -> tuple[list[float], LatencyStats]:
    """Measure in several processes and pool the runs: the memory layout differs, and latency with it."""
    import tempfile

    times: list[float] = []
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        command = [sys.executable, "-m", "export", "measure", str(options.onnx), "--processes", "1"]
        command += ["--json", str(part), "--threads", str(options.threads)]
        command += ["--warmup", str(options.warmup), "--duration", str(options.duration)]
        command += ["--streams", str(options.streams)]
        command += ["--batch", str(options.batch)] if options.batch is not None else []
        command += ["--engine", str(_engine_path(options)), "--runtime", _runtime(options)]
        for _ in range(options.processes):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                raise ExportError((lines[-1] if lines else "The measurement failed.").replace("error: ", "", 1))
            facts = json.loads(part.read_text(encoding="utf-8"))
            times += facts["times_ms"]
    last = facts["latency"]
    same = {name: last[name] for name in ("runtime", "version", "threads", "batch", "streams")}
    return times, summarise(times, **same)


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    from export.convert.parity import DEVICE_TOLERANCES, TOLERANCES, read_reference, verify

    precision = read_header(options.onnx).precision
    reference = read_reference(options.reference or Path(options.onnx).with_name("reference.npz"))
    on_cpu = _runtime(options) == ORT
    what = str(options.onnx if on_cpu else _engine_path(options))
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = (TOLERANCES if on_cpu else DEVICE_TOLERANCES)[precision]
    outputs = (_ort_outputs if on_cpu else _engine_outputs)(options, reference.inputs)
    parity = verify(outputs, reference, what, precision=precision, tolerance=tolerance)
    print(
        f"{what}: largest difference {parity.max_abs:.3g} (allowed {parity.allowed:.3g}), mean "
        f"{parity.mean_abs:.3g}, same first class for {parity.top1_agreement:.1%} of {parity.samples} inputs"
    )
    return {"onnx": Path(options.onnx).name, "precision": precision, "parity": parity.to_dict()}


def _ort_outputs(options: argparse.Namespace, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    from export.convert.ort import check_threads, onnx_outputs

    check_threads(options.threads)
    return onnx_outputs(options.onnx, inputs, threads=options.threads)[0]


def _engine_outputs(options: argparse.Namespace, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    from export.engine.runner import EngineRunner

    with EngineRunner(_engine_path(options)) as engine:
        if engine.info.onnx_sha256 != sha256_file(Path(options.onnx)):
            raise ExportError(f"{_engine_path(options)} was not built from {options.onnx}.", "Build it again.")
        return engine.run_batches(inputs)


if __name__ == "__main__":
    sys.exit(main())
