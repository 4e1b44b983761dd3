"""A finished run's networks on a board: a bundle to carry there, the way over ssh, and the board's answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.progress import say
from compressor.run.exports import Finished, Request, check, export_format
from compressor.run.folder import RunDir
from compressor.run.onnx_files import MODEL, drawn
from export.device.targets import find_target

REFERENCE_IMAGES = 8


def export_precision(folder: Path, precision: str, max_drop_points: float) -> Iterator[str]:
    """Write a finished run's network in fp16 or int8 as well.

    Raises:
        CompressorError, ExportError: the run is not finished, or the precision cannot be had within the drop.
    """
    return export_format(folder, Request(precision=precision, max_drop=max_drop_points))


def export_bundle(folder: Path, target: str, bundle: Path, wanted: Request | None = None) -> Iterator[str]:
    """Write everything that a board needs to build, measure and verify a run's networks.

    The networks are the FP32 one and every precision that the run has, in the opset that the board reads.

    Args:
        folder: a finished run's.
        target: the name of a board, as `compress export --help` says.
        bundle: NAME.tar.gz.
        wanted: its precision is made where the run lacks it.
    """
    from export.convert.ort import open_session, run_session
    from export.device.bundle import make_bundle
    from export.engine.reference import Reference

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
            asked_anew = wanted is not None and wanted.precision == precision == "int8" and wanted.rest
            if not path.exists() or (asked_anew and _rest_of(path) != request.rest):
                yield from finished.onnx(request)
            elif precision == "int8" and _rest_of(path) != (request.rest or "fp16"):
                yield (
                    f"{path.name} computes its rest in {_rest_of(path)}; another one is made by: "
                    f"compress export {folder} --precision int8 --rest {request.rest or 'fp16'}"
                )
            networks.append(path)
        images, _ = drawn(finished.data.test, REFERENCE_IMAGES, finished.recipe.seed)
        session = open_session(run.file(MODEL), threads=1)
        name = session.get_inputs()[0].name
        outputs = np.concatenate([run_session(session, {name: image[None]})[0] for image in images])
        info = make_bundle(
            bundle,
            networks,
            Reference(images, outputs),
            target=target,
            facts={"run": run.name, **finished.data.facts()},
        )
        yield f"Wrote {info.path} for {info.target.name}: {', '.join(info.networks)} ({info.size / 1e6:.1f} MB)."
        yield "On the board: unpack it, run run.sh in it, and bring results.tar.gz back."
        yield f"Then: compress export {folder} --bundle {bundle} --import results.tar.gz"


def export_over_ssh(
    folder: Path, address: str, board: str, bundle: Path | None, wanted: Request | None = None
) -> Iterator[str]:
    """Carry a bundle to a board over ssh, run it there, and take its results into the manifest.

    A bundle that is there already goes on where it was; left out, it lies under `bundles/` of the run.

    Raises:
        CompressorError, ExportError: as `export_bundle`, the bundle is another run's, or ssh does not get there.
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
        yield f"Going on with {path}."
    else:
        yield from export_bundle(folder, board, path, wanted)
    run_remote(address, path, results, say=say)
    yield from import_results(folder, results, path)


def import_results(folder: Path, results: Path, bundle: Path) -> Iterator[str]:
    """Take what a board measured into a run's manifest, once it is clear that it belongs to the bundle and the run.

    Raises:
        CompressorError, ExportError: it does not belong there, or a network failed on the board; what came of the
            others is in the manifest then.
    """
    from export.device.bundle_results import read_results

    with closing(Finished.open(folder)) as finished:
        run = finished.run
        _require_own(bundle, run)
        found = read_results(results, bundle)
        entry = found.to_dict()
        others = [each for each in run.manifest.get("devices", []) if each != entry]
        run.save(devices=[*others, entry])
        yield f"{found.board.get('model') or found.target}, TensorRT {found.board.get('tensorrt')}:"
        for network in found.networks:
            yield f"  {network.describe()}"
        failed = [network.name for network in found.networks if network.status != "ok"]
        if failed:
            raise CompressorError(
                f"{len(failed)} of {len(found.networks)} networks failed on the board: {', '.join(failed)}.",
                "The lines above say why. What the board measured of the others is in the manifest.",
            )


def _precisions(run: RunDir, wanted: Request | None) -> list[str]:
    """FP32, what the run has been exported in, and what is wanted."""
    asked = wanted.precision if wanted else "fp32"
    return [
        "fp32",
        *(each for each in ("fp16", "int8") if each == asked or run.file(f"model.{each}.onnx").exists()),
    ]


def _rest_of(path: Path) -> str:
    """What an INT8 file computes in outside of INT8."""
    from export.convert.onnx_header import read_header

    return read_header(path).metadata.get("rest", "fp32")


def _require_own(bundle: Path, run: RunDir) -> None:
    """Refuse a bundle that was made of another run."""
    from export.device.archive import require_checksums, unpack

    files = unpack(bundle)
    require_checksums(files, bundle)
    try:
        described: Any = json.loads(files["bundle.json"])
        name = described["facts"]["run"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise CompressorError(f"{bundle} does not say which run it is of.", "Make it again.") from None
    if name != run.name:
        raise CompressorError(
            f"{bundle} was made of the run {name!r}, not of {run.name!r}.", "Give the run's own bundle."
        )
