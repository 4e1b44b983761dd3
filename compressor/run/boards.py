"""Run a finished run's networks on a board: write the bundle, transfer it over ssh, import the results.

Each function yields lines for the user.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.manifest import DeviceRecord, Export
from compressor.core.progress import say
from compressor.latency.assemble import with_batch
from compressor.latency.networks import with_distinct_weights
from compressor.latency.paired import Ratio
from compressor.latency.stored import require_module
from compressor.run.deployable import LABELS, PREPROCESS
from compressor.run.device import device_precision
from compressor.run.exports import Finished, Request, check
from compressor.run.finish import exit_code, not_measured, write_page
from compressor.run.folder import RunFolder
from compressor.run.job import latency_budget
from compressor.run.onnx_files import DENSE as DENSE_FILE
from compressor.run.onnx_files import MODEL
from export.device.bundle import (
    DENSE,
    PROGRAM,
    TARGETS,
    family_of,
    find_target,
    folder_of,
    make_bundle,
    open_bundle,
)
from export.errors import ExportError
from export.files import read_bytes

if TYPE_CHECKING:
    from compressor.recipe import Recipe
    from export.device.results import DeviceResults, NetworkResult

REFERENCE_IMAGES = 8
LEAST_BATCHES = 2
"""Number of images with which a board verifies its engines, and the fewest batches."""

USUAL_BOARD = "jetson-orin-nano-8gb"
"""The board at an ssh address, where neither the command nor the run's device names one."""

_UNCHECKED = "The board does not name its module"


def export_bundle(
    folder: Path, target: str, bundle: Path, wanted: Request | None = None, *, again: bool = False
) -> Iterator[str]:
    """Write everything that a board needs to build, measure and verify a run's networks, and to use them.

    The bundle has the dense and the slim network side by side in every precision that the board and the run allow, in
    the opset that the board reads.

    Mixed precision is added if it is wanted, of the slim network alone.

    Args:
        folder: Folder of a finished run.
        target: Name of a board, as listed by `compress export --help`.
        bundle: NAME.tar.gz.
        wanted: Request whose precision must be possible; the others are left out where they are not.
        again: Whether to replace an existing bundle.
    """
    from export.convert.parity import Reference

    board = find_target(target)
    folder_of(bundle)  # refuses a name that no board can handle
    if wanted is not None:
        check(replace(wanted, target=target))
    if bundle.exists() and not again:
        raise CompressorError(f"{bundle} exists already.", "Choose another --bundle FILE, or delete it.")
    with (
        closing(Finished.open(folder, wanted.factory if wanted else None)) as finished,
        tempfile.TemporaryDirectory(prefix="compressor-bundle-") as scratch,
    ):
        run = finished.run
        recipe = finished.recipe
        number = recipe.batch * max(LEAST_BATCHES, -(-REFERENCE_IMAGES // recipe.batch))  # of whole batches
        images = finished.images(number)
        if len(images) % recipe.batch:
            raise CompressorError(
                f"A bundle for batches of {recipe.batch} needs {number} test images, and there are {len(images)}."
            )
        networks: list[Path] = []
        dense: dict[str, Path] = {}
        mixed = ("mixed",) if wanted is not None and wanted.precision == "mixed" else ()
        for precision in ("fp32", "fp16", "int8", *mixed):
            if precision == "int8" and not board.int8:
                yield f"The {board.title} has no INT8 units: the int8 network is left out."
                continue
            request = Request(
                precision=precision,
                target=target,
                max_drop=wanted.max_drop if wanted else finished.recipe.export.max_drop,
                method=wanted.method if wanted else "minmax",
                rounding=wanted.rounding if wanted else finished.recipe.export.rounding,
                rest=wanted.rest if wanted else None,
                address=wanted.address if wanted and precision == "mixed" else None,
            )
            must = precision == "fp32" or (wanted is not None and wanted.precision == precision)
            try:
                path = yield from _slim(finished, request, wanted)
                if precision == "mixed":
                    networks.append(path)
                    continue  # the dense network is compared in the other precisions
                dense[precision] = _dense(finished, request, dense, Path(scratch), images)
            except (CompressorError, ExportError) as error:
                if must:
                    raise
                yield f"{precision} is left out: {error.message}"
                continue
            networks += [dense[precision], path]
        info = make_bundle(
            bundle,
            networks,
            Reference(images, _outputs(run.file(MODEL), images)),
            target=target,
            facts={"run": run.name, **finished.facts(), "options": _options(wanted)},
            dense=Reference(images, _outputs(dense["fp32"], images)),
            more=_for_use(run),
            streams=recipe.streams,
        )
        yield f"Wrote {info.path} for {info.target.name}: {', '.join(info.networks)} ({info.size / 1e6:.1f} MB)."
        yield "On the board: unpack it, run run.sh in it, and bring results.tar.gz back. Its README.txt has each step."
        yield f"Then: compress export {folder} --bundle {bundle} --import results.tar.gz"


def _options(wanted: Request | None) -> dict[str, Any]:
    """Return the options of a command that decide which files its bundle has."""
    request = wanted or Request()
    return {
        "precision": request.precision, "max-drop": request.max_drop, "calibration": request.method,
        "rounding": request.rounding, "rest": request.rest, "target": request.address,
    }  # fmt: skip


def _slim(finished: Finished, request: Request, wanted: Request | None) -> Generator[str, None, Path]:
    """Return the slim network's file of a request; it is written if the run has none as is asked for.

    Args:
        finished: The run.
        request: Precision and board.
        wanted: What the command asks for.
    """
    path = finished.path_of(request)
    written = request.precision != "mixed" and _for_boards(path)  # mixed precision is measured for each bundle
    if not written or _asks_for_another(finished, request, wanted):
        yield from finished.onnx(request)
    elif request.precision == "int8" and _rest_of(path) != (request.rest or "fp16"):
        yield (
            f"{path.name} computes the rest in {_rest_of(path)}; export another one with: "
            f"compress export {finished.run.path} --precision int8 --rest {request.rest or 'fp16'}"
        )
    return path


def _asks_for_another(finished: Finished, request: Request, wanted: Request | None) -> bool:
    """Return whether a command asks for another FP16 or INT8 file than the run has.

    The defaults of its options count for the precision that it names only: other files are the run's.
    """
    if wanted is None or request.precision == "fp32":
        return False
    path, manifest, default = finished.path_of(request), finished.run.manifest, Request()
    entry = manifest.exports.get(path.name.removeprefix("model.").removesuffix(".onnx"), Export())

    def asked(name: str) -> bool:
        return request.precision == wanted.precision or getattr(request, name) != getattr(default, name)

    exact, score = manifest.accuracy.exported, entry.accuracy
    loses = exact is not None and score is not None and score < exact
    if asked("max_drop") and (loses or entry.kept_float):  # else the file is the same for every drop
        return True
    return request.precision == "int8" and (
        (asked("method") and entry.calibration != request.method)
        or (asked("rounding") and entry.rounding != request.rounding)
        or request.rest not in (None, _rest_of(path))
    )


def _dense(finished: Finished, request: Request, known: Mapping[str, Path], scratch: Path, images: Any) -> Path:
    """Write the dense network in the precision and opset of a slim one; its weights do not matter for its time.

    Args:
        finished, request: The run, and the slim network's request.
        known: Files of the dense network by precision.
        scratch: Folder for the file.
        images: Inputs on which overflows are found and ranges calibrated.
    """
    from export.convert.half import convert_half
    from export.convert.onnx_header import read_header
    from export.convert.quantize import quantize_onnx
    from export.convert.to_onnx import export_onnx

    path = scratch / finished.path_of(request).name.replace("model", DENSE, 1)
    if request.precision == "fp16":
        convert_half(known["fp32"], path, inputs=images)
        return path
    if request.precision == "int8":
        quantize_onnx(known["fp32"], path, images, method=request.method, rest=request.rest or "fp16")
        return path
    own, opset = finished.run.file(DENSE_FILE), finished.opset(request)
    if own.is_file() and read_header(own).opset == opset:
        shutil.copyfile(own, path)
    else:
        example = with_batch(finished.example, finished.recipe.batch)
        export_onnx(with_distinct_weights(finished.dense("none")), example, path, opset=opset)
    return path


def _outputs(path: Path, images: Any) -> Any:
    from export.convert.ort import onnx_outputs

    return onnx_outputs(path, images)[0]


def _for_use(run: RunFolder) -> dict[str, bytes]:
    """Return the files with which a network is used, as far as the run has them."""
    found = {name: read_bytes(run.file(name), "file") for name in (LABELS, PREPROCESS) if run.file(name).is_file()}
    if run.file(PROGRAM[0].name).is_file():  # of a classifier
        found |= {path.name: path.read_bytes() for path in PROGRAM}
    return found


def export_over_ssh(
    folder: Path, address: str, board: str | None, bundle: Path | None, wanted: Request | None = None
) -> Iterator[str]:
    """Transfer a bundle to a board over ssh, run it there, and import its results into the manifest.

    An existing bundle of these options continues where it was. Without a path it is stored under `bundles/` of the run,
    and written again for other options. Without a board it is the run's device, if that is one.

    Raises:
        CompressorError, ExportError: As for `export_bundle`; or the given bundle is of another run, board or options,
            the board is another module, or ssh fails.
    """
    from export.device.connection import parse_destination
    from export.device.remote import identify, run_remote

    parse_destination(address)
    if board is None:
        with closing(Finished.open(folder)) as finished:
            board = finished.recipe.device if finished.recipe.device in TARGETS else USUAL_BOARD
    find_target(board)
    path = bundle or folder / "bundles" / f"{board}.tar.gz"
    results = path.with_name(path.name.replace(".tar.gz", "").replace(".tgz", "") + "-results.tar.gz")
    other = ""
    if path.exists():
        with closing(Finished.open(folder)) as finished:
            other = _other_bundle(path, finished.run, board, wanted)
        if other and bundle is not None:
            raise CompressorError(
                f"{path} is not the bundle that is asked for: {other}.", "Choose another --bundle FILE, or delete it."
            )
        yield f"{path} is written again: {other}." if other else f"Continuing with {path}."
    if other or not path.exists():
        yield from export_bundle(folder, board, path, wanted, again=True)
    _require_board(folder, board, identify(address)["model"])
    run_remote(address, path, results, say=say)
    yield from import_results(folder, results, path)


def import_results(folder: Path, results: Path, bundle: Path) -> Iterator[str]:
    """Import a board's measurements into a run's manifest, after checking that they belong to the bundle and the run.

    If the board is the run's device, its latency budget is judged by them.

    Raises:
        CompressorError, ExportError: They do not, the board is another module than the bundle is for, or a network
            failed on the board; the manifest then has the results of the other networks.
    """
    from export.device.results import read_results

    with closing(Finished.open(folder)) as finished:
        run = finished.run
        replaced = _require_own(bundle, run)
        found = read_results(results, bundle)
        _require_board(folder, found.target, found.board.model, found.board.compute_capability)
        entry = DeviceRecord.model_validate(found.to_dict())
        run.manifest.devices = [*(each for each in run.manifest.devices if each != entry), entry]
        run.save()
        yield f"{found.board.model or found.target}, TensorRT {found.board.tensorrt}:"
        for network in found.networks.values():
            yield f"  {network.describe()}"
            if network.name in replaced:
                yield f"  The run has another {network.name}.onnx now: this is the time of the earlier one."
        yield from _judge(run, finished.recipe, found, replaced)
        failed = [name for name, network in found.networks.items() if network.status != "ok"]
        if failed:
            raise CompressorError(
                f"{len(failed)} of {len(found.networks)} networks failed on the board: {', '.join(failed)}.",
                "The lines above say why. The results of the other networks are in the manifest.",
            )


def _judge(run: RunFolder, recipe: Recipe, found: DeviceResults, replaced: Sequence[str]) -> Iterator[str]:
    """Judge the run's latency budget by the times of the board that the budget is for, and write the report again.

    A share is one of the dense network's time in the same precision; the turns show how far it varies. A network whose
    file was replaced in the run decides nothing.
    """
    budget, precision = latency_budget(recipe), device_precision(recipe)
    if budget is None:
        return
    if recipe.device != found.target:
        yield f"The latency budget is for {recipe.device}, not for {found.target}: its result stays as it is."
        return
    slim, dense = _measured(found, precision, dense=False), _measured(found, precision, dense=True)
    if slim is None or slim.latency is None:
        yield f"The latency budget is for {precision}, which was not measured: its result stays predicted."
        return
    if slim.name in replaced:
        yield (
            f"The latency budget is for the run's {slim.name}.onnx, and another one was measured: its result stays "
            "predicted. Write the bundle again, and run it on the board."
        )
        return
    if budget.relative and (dense is None or dense.latency is None):
        yield (
            "The latency budget is a share of the dense network's time, which the board did not measure: its result "
            "stays predicted."
        )
        return
    stats, manifest, share = slim.latency, run.manifest, recipe.percentile / 100
    turns, slim_ms = _by_turns(slim, share), float(np.quantile(slim.times_ms, share))
    dense_ms = None if dense is None or dense.latency is None else float(np.quantile(dense.times_ms, share))
    if budget.relative and dense is not None and dense_ms is not None:
        shares = sorted(mine / theirs for mine, theirs in zip(turns, _by_turns(dense, share), strict=True))
        ratio, target = Ratio(float(np.median(shares)), shares[0], shares[-1], dense_ms), budget.value
        words = (
            f"{ratio.value:.1%} of the dense network's time on the board ({recipe.conditions.title}; {len(shares)} "
            f"turns: {shares[0]:.1%}-{shares[-1]:.1%}), target {target:.1%}"
        )
        target_ms = target * dense_ms
    else:
        low, high = min(turns), max(turns)
        ratio, target = Ratio(slim_ms, low, high, dense_ms=1.0), budget.value  # in milliseconds
        words = (
            f"{slim_ms:.3f} ms on the board ({recipe.conditions.title}; {len(turns)} turns: {low:.3f}-{high:.3f}), "
            f"target {target:.3f} ms"
        )
        target_ms = target
    verdict = ratio.verdict(target)
    costs = {"measured": slim_ms, "target": target_ms, **({"dense": dense_ms} if dense_ms is not None else {})}
    manifest.budgets = [
        each.judged(verdict, **costs) if each.name == "latency" else each for each in manifest.budgets
    ]
    manifest.latency = manifest.latency.model_copy(
        update={
            "runtime": f"TensorRT {found.board.tensorrt}", "precision": precision, "measured_ms": slim_ms,
            "median_ms": stats.median_ms, "p90_ms": stats.p90_ms, "p99_ms": stats.p99_ms, "runs": stats.runs,
            "inputs_per_s": stats.inputs_per_s, **({"dense_ms": dense_ms} if dense_ms is not None else {}),
        }
    )  # fmt: skip
    old, capability = not_measured(recipe, manifest.latency.estimated), found.board.compute_capability
    manifest.notes = [note for note in manifest.notes if note != old and not note.startswith(_UNCHECKED)]
    if not family_of(found.board.model):
        checked = f" by more than its compute capability {capability}" if capability else ""
        note = f"{_UNCHECKED}: that it is a {find_target(found.target).title} was not checked{checked}."
        manifest.notes.append(note)
        yield note
    manifest.exit_code = exit_code(manifest.budgets, recipe.contract.accept_predicted)
    write_page(run)
    yield f"The slim network takes {words}: {verdict}."


def _measured(found: DeviceResults, precision: str, *, dense: bool) -> NetworkResult | None:
    """Return the result of the dense or the slim network in a precision, if it was measured and verified."""
    for each in found.networks.values():
        if each.name.startswith(DENSE) == dense and each.precision == precision and each.status == "ok":
            return each
    return None


def _by_turns(network: NetworkResult, share: float) -> list[float]:
    """Return a quantile of the runs of each turn in milliseconds."""
    return [float(np.quantile(turn.times_ms, share)) for turn in network.turns]


def _for_boards(path: Path) -> bool:
    """Whether there is such a file, and not in the form of another runtime than TensorRT."""
    from export.convert.onnx_header import read_header

    return path.exists() and "runtime" not in read_header(path).metadata


def _rest_of(path: Path) -> str:
    """Return the precision of an INT8 file's other layers."""
    from export.convert.onnx_header import read_header

    return read_header(path).metadata.get("rest", "fp32")


def _require_board(folder: Path, target: str, model: str, compute_capability: str = "") -> None:
    """Raise an error if a board is another module than its bundle is for; what it does not say is not checked."""
    fitting = [
        name
        for name, each in TARGETS.items()
        if family_of(model) in ("", family_of(each.title)) and compute_capability in ("", each.compute_capability)
    ]
    hint = (
        f"Write a bundle for that board (compress export {folder} --target BOARD --bundle FILE), or over ssh add "
        f"--board BOARD. It may be {', '.join(fitting)}."
    )
    require_module(target, model, compute_capability, hint if fitting else "It is none of the boards of this program.")


def _require_own(bundle: Path, run: RunFolder) -> tuple[str, ...]:
    """Raise an error if a bundle was written from another run; its FP32 file decides, not the folder's name.

    Returns:
        Names of the bundle's other slim networks that the run has in another file now, or no longer.
    """
    given, known = open_bundle(bundle, "network").manifest, run.manifest.files
    slim = {f"{each['name']}.onnx": each for each in given["networks"] if not each["name"].startswith(DENSE)}
    other = [file for file, each in slim.items() if known.get(file) != each["sha256"]]
    for file in (file for file in other if slim[file]["precision"] == "fp32"):
        expected = f"expected {known[file][:12]}" if file in known else "and this run has no such file"
        raise CompressorError(
            f"{bundle} belongs to another run than {run.path}: its {file} has the checksum "
            f"{slim[file]['sha256'][:12]} (of the run {given['facts'].get('run', 'without a name')!r}), {expected}.",
            "Give the folder of that run; or write this run's bundle, and run it on the board: "
            f"compress export {run.path} --target {given['target']} --bundle FILE",
        )
    return tuple(slim[file]["name"] for file in other)


def _other_bundle(bundle: Path, run: RunFolder, board: str, wanted: Request | None) -> str:
    """Return why a run's bundle is not the one that is asked for; empty if it is.

    Raises:
        CompressorError: It belongs to another run.
    """
    replaced, given = _require_own(bundle, run), open_bundle(bundle, "network").manifest
    if given["target"] != board:
        return f"it is for {given['target']}, not for {board}"
    before, now = given["facts"].get("options", {}), _options(wanted)
    for name, value in now.items():
        if before.get(name) != value:
            return f"it was written with --{name} {before.get(name) or 'by default'}, not {value or 'by default'}"
    return f"the run has another {replaced[0]}.onnx now" if replaced else ""
