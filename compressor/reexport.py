"""What `compress export` makes of a finished run: other precisions, a bundle for a board, and a board's answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressor.data import load_data
from compressor.errors import CompressorError
from compressor.onnx_files import MODEL, first_images
from compressor.precisions import write_precision
from compressor.recipe import Recipe, load_recipe
from compressor.run_dir import RECIPE, RunDir

if TYPE_CHECKING:
    from compressor.data import DataBundle

REFERENCE_IMAGES = 8


def export_precision(folder: Path, precision: str, max_drop_points: float) -> Iterator[str]:
    """Write a finished run's network in fp16 or int8 as well.

    Raises:
        CompressorError, ExportError: the run is not finished, or the precision cannot be had within the drop.
    """
    with closing(_finished(folder)) as run:
        yield from write_precision(run, _data(run), precision, max_drop_points)


def export_bundle(folder: Path, target: str, bundle: Path) -> Iterator[str]:
    """Write everything that a board needs to build, measure and verify a run's networks; over ssh, also do it.

    Args:
        folder: a finished run's.
        target: the name of a board, as `compress export --help` says.
        bundle: NAME.tar.gz.
    """
    from export.bundle import make_bundle
    from export.ort import open_session, run_session
    from export.reference import Reference

    if bundle.exists():
        raise CompressorError(f"{bundle} exists already.", "Choose another --bundle FILE, or delete it.")
    with closing(_finished(folder)) as run:
        images = first_images(_data(run).test, REFERENCE_IMAGES)
        session = open_session(run.file(MODEL), threads=1)
        name = session.get_inputs()[0].name
        outputs = np.concatenate([run_session(session, {name: image[None]})[0] for image in images])
        networks = [run.file(MODEL), *sorted(run.path.glob("model.*.onnx"))]
        info = make_bundle(
            bundle, networks, Reference(images, outputs), target=target, facts={"run": run.path.name}
        )
        yield f"Wrote {info.path} for {info.target.name}: {', '.join(info.networks)} ({info.size / 1e6:.1f} MB)."
        yield "On the board: unpack it, run run.sh in it, and bring results.tar.gz back."
        yield f"Then: compress export {folder} --bundle {bundle} --import results.tar.gz"


def export_over_ssh(folder: Path, address: str, board: str, bundle: Path) -> Iterator[str]:
    """Carry a bundle to a board over ssh, run it there, and take its results into the manifest."""
    from export.remote import run_remote

    results = bundle.with_name(bundle.name.replace(".tar.gz", "").replace(".tgz", "") + "-results.tar.gz")
    if not bundle.exists():
        yield from export_bundle(folder, board, bundle)
    from compressor.progress import say

    run_remote(address, bundle, results, say=say)
    yield from import_results(folder, results, bundle)


def import_results(folder: Path, results: Path, bundle: Path) -> Iterator[str]:
    """Take what a board measured into a run's manifest, once it is clear that it belongs to the bundle and the run."""
    from export.bundle_results import read_results

    with closing(_finished(folder)) as run:
        found = read_results(results, bundle)
        if found.facts.get("run") != run.path.name:
            raise CompressorError(
                f"{bundle} was made of the run {found.facts.get('run')!r}, not of {run.path.name!r}.",
                "Give the run's own bundle.",
            )
        entry = found.to_dict()
        others = [each for each in run.manifest.get("devices", []) if each != entry]
        run.save(devices=[*others, entry])
        yield f"{found.board.get('model') or found.target}, TensorRT {found.board.get('tensorrt')}:"
        for network in found.networks:
            yield f"  {network}"


def _finished(folder: Path) -> RunDir:
    run = RunDir.open(folder)
    if not run.finished("export") or not run.file(MODEL).exists():
        run.close()
        raise CompressorError(
            f"The run in {folder} has exported nothing yet.", f"Go on: compress --resume {folder}"
        )
    return run


def _data(run: RunDir) -> DataBundle:
    recipe: Recipe = load_recipe(run.file(RECIPE))
    return load_data(recipe.data, seed=recipe.seed, image_size=recipe.image_size)
