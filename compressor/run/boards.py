"""Run a finished run's networks on a board: write the bundle, transfer it over ssh, import the results.

Each function yields lines for the user.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.manifest import DeviceRecord
from compressor.core.progress import say
from compressor.latency.paired import Ratio
from compressor.run.device import device_precision
from compressor.run.exports import Finished, Request, check
from compressor.run.finish import exit_code, not_measured, write_page
from compressor.run.folder import RunFolder
from compressor.run.job import latency_budget
from compressor.run.onnx_files import MODEL
from export.device.bundle import find_target, make_bundle, open_bundle

if TYPE_CHECKING:
    from compressor.recipe import Recipe
    from export.device.results import DeviceResults

REFERENCE_IMAGES = 8


def export_bundle(folder: Path, target: str, bundle: Path, wanted: Request | None = None) -> Iterator[str]:
    """Write everything that a board needs to build, measure and verify a run's networks.

    The bundle has the FP32 network and every other precision of the run, in the opset that the board reads.

    Args:
        folder: Folder of a finished run.
        target: Name of a board, as listed by `compress export --help`.
        bundle: NAME.tar.gz.
        wanted: Request whose precision is exported first if the run lacks it.
    """
    from export.convert.ort import open_session, run_session
    from export.convert.parity import Reference

    board = find_target(target)
    if wanted is not None:
        check(replace(wanted, target=target))
    if bundle.exists():
        raise CompressorError(f"{bundle} exists already.", "Choose another --bundle FILE, or delete it.")
    with closing(Finished.open(folder, wanted.factory if wanted else None)) as finished:
        run = finished.run
        networks = []
        for precision in _precisions(run, wanted):
            if precision == "int8" and not board.int8:
                yield f"The {board.title} has no INT8 units: the int8 network is left out."
                continue
            request = Request(
                precision=precision,
                target=target,
                max_drop=wanted.max_drop if wanted else finished.recipe.export.max_drop,
                method=wanted.method if wanted else "minmax",
                rest=wanted.rest if wanted else None,
            )
            path = finished.path_of(request)
            rest_given = wanted is not None and wanted.precision == precision == "int8" and wanted.rest
            if not path.exists() or (rest_given and _rest_of(path) != request.rest):
                yield from finished.onnx(request)
            elif precision == "int8" and _rest_of(path) != (request.rest or "fp16"):
                yield (
                    f"{path.name} computes the rest in {_rest_of(path)}; export another one with: "
                    f"compress export {folder} --precision int8 --rest {request.rest or 'fp16'}"
                )
            networks.append(path)
        images = finished.images(REFERENCE_IMAGES)
        session = open_session(run.file(MODEL), threads=1)
        name = session.get_inputs()[0].name
        outputs = np.concatenate([run_session(session, {name: image[None]})[0] for image in images])
        info = make_bundle(
            bundle,
            networks,
            Reference(images, outputs),
            target=target,
            facts={"run": run.name, **finished.facts()},
        )
        yield f"Wrote {info.path} for {info.target.name}: {', '.join(info.networks)} ({info.size / 1e6:.1f} MB)."
        yield "On the board: unpack it, run run.sh in it, and bring results.tar.gz back."
        yield f"Then: compress export {folder} --bundle {bundle} --import results.tar.gz"


def export_over_ssh(
    folder: Path, address: str, board: str, bundle: Path | None, wanted: Request | None = None
) -> Iterator[str]:
    """Transfer a bundle to a board over ssh, run it there, and import its results into the manifest.

    An existing bundle continues where it was; without a path it is stored under `bundles/` of the run.

    Raises:
        CompressorError, ExportError: As for `export_bundle`; or the bundle is another run's, or ssh fails.
    """
    from export.device.connection import parse_destination
    from export.device.remote import run_remote

    parse_destination(address)
    find_target(board)
    path = bundle or folder / "bundles" / f"{board}.tar.gz"
    results = path.with_name(path.name.replace(".tar.gz", "").replace(".tgz", "") + "-results.tar.gz")
    if path.exists():
        with closing(Finished.open(folder)) as finished:
            _require_own(path, finished.run)
        yield f"Continuing with {path}."
    else:
        yield from export_bundle(folder, board, path, wanted)
    run_remote(address, path, results, say=say)
    yield from import_results(folder, results, path)


def import_results(folder: Path, results: Path, bundle: Path) -> Iterator[str]:
    """Import a board's measurements into a run's manifest, after checking that they belong to the bundle and the run.

    If the board is the run's device and its latency budget is in milliseconds, the budget is judged by them.

    Raises:
        CompressorError, ExportError: They do not, or a network failed on the board; the manifest then has the results
            of the other networks.
    """
    from export.device.results import read_results

    with closing(Finished.open(folder)) as finished:
        run = finished.run
        _require_own(bundle, run)
        found = read_results(results, bundle)
        entry = DeviceRecord.model_validate(found.to_dict())
        run.manifest.devices = [*(each for each in run.manifest.devices if each != entry), entry]
        run.save()
        yield f"{found.board.model or found.target}, TensorRT {found.board.tensorrt}:"
        for network in found.networks.values():
            yield f"  {network.describe()}"
        yield from _judge(run, finished.recipe, found)
        failed = [name for name, network in found.networks.items() if network.status != "ok"]
        if failed:
            raise CompressorError(
                f"{len(failed)} of {len(found.networks)} networks failed on the board: {', '.join(failed)}.",
                "The lines above say why. The results of the other networks are in the manifest.",
            )


def _judge(run: RunFolder, recipe: Recipe, found: DeviceResults) -> Iterator[str]:
    """Judge the run's latency budget by the times of the board that the budget is for, and write the report again.

    Only a budget in milliseconds can be judged: a bundle does not time the dense network.
    """
    budget, precision = latency_budget(recipe), device_precision(recipe)
    if budget is None or recipe.device != found.target:
        return
    network = next((each for each in found.networks.values() if each.precision == precision), None)
    if network is None or network.latency is None or network.status != "ok":
        yield f"The latency budget is for {precision}, which was not measured: its result stays predicted."
        return
    if budget.relative:
        yield (
            "The latency budget is a share of the dense network's time, which a bundle does not measure: its result "
            "stays predicted. A budget in milliseconds is judged by the board's times."
        )
        return
    medians = sorted(float(np.median(turn.times_ms)) for turn in network.turns)
    target, stats, manifest = budget.value, network.latency, run.manifest
    verdict = Ratio(stats.median_ms, medians[0], medians[-1], dense_ms=1.0).verdict(target)  # in milliseconds
    manifest.budgets = [
        each.judged(verdict, measured=stats.median_ms) if each.name == "latency" else each
        for each in manifest.budgets
    ]
    manifest.latency = manifest.latency.model_copy(
        update={
            "runtime": f"TensorRT {found.board.tensorrt}", "precision": precision, "measured_ms": stats.median_ms,
            "median_ms": stats.median_ms, "p90_ms": stats.p90_ms, "p99_ms": stats.p99_ms, "runs": stats.runs,
        }
    )  # fmt: skip
    manifest.notes = [note for note in manifest.notes if note != not_measured(recipe, manifest.latency.estimated)]
    manifest.exit_code = exit_code(manifest.budgets, recipe.contract.accept_predicted)
    write_page(run)
    yield (
        f"The slim network takes {stats.median_ms:.3f} ms on the board (medians of {len(medians)} turns: "
        f"{medians[0]:.3f}-{medians[-1]:.3f}), target {target:.3f} ms: {verdict}."
    )


def _precisions(run: RunFolder, wanted: Request | None) -> list[str]:
    """Return FP32, the precisions that the run has been exported in, and the requested one."""
    requested = wanted.precision if wanted else "fp32"
    others = [each for each in ("fp16", "int8") if each == requested or run.file(f"model.{each}.onnx").exists()]
    return ["fp32", *others]


def _rest_of(path: Path) -> str:
    """Return the precision of an INT8 file's other layers."""
    from export.convert.onnx_header import read_header

    return read_header(path).metadata.get("rest", "fp32")


def _require_own(bundle: Path, run: RunFolder) -> None:
    """Raise an error if a bundle belongs to another run."""
    try:
        name = open_bundle(bundle, "network").manifest["facts"]["run"]
    except (KeyError, TypeError):
        raise CompressorError(f"{bundle} does not name its run.", "Create it again.") from None
    if name != run.name:
        raise CompressorError(
            f"{bundle} belongs to the run {name!r}, not to {run.name!r}.", "Give this run's own bundle."
        )
