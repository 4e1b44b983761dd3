"""What joint training and pruning brings on CIFAR-10: results, ablations, and the page that shows them.

    python -m benchmarks.results_joint --data folder:/data/cifar10-jpeg --weights20 resnet20.pt --weights56 resnet56.pt

Runs every recipe of recipes/joint once for each seed, each cell in a folder of its own. Finished cells are skipped and
stopped ones continue; the page `docs/results/joint.md` is written again after each. The recipes have the lengths of
the papers (200 epochs from scratch, 100 from given weights). `--epochs 20` gives all of them a tenth of their length,
and `--train-images 10000` a fixed part of the training images; the page says so.
"""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.joint_page import Row, Setting, page, row_of
from compressor.cli.display import RichDisplay
from compressor.core.errors import CompressorError
from compressor.core.files import read_json, write_atomic
from compressor.core.manifest import MANIFEST
from compressor.core.progress import shown_on
from compressor.core.records import RECIPE
from compressor.recipe import Recipe, load_recipe, shipped
from compressor.run.pipeline import resume, run_recipe

WHOLE = 200
"""Epochs of the longest recipes, to which `--epochs` is relative."""


@dataclass(frozen=True)
class Cell:
    """One run: a recipe with a seed.

    Attributes:
        name: stem of the recipe's file.
        seed: of everything random.
        recipe: with data, weights, seed and epochs filled in; None where weights were not given for it.
        folder: of the run.
    """

    name: str
    seed: int
    recipe: Recipe | None
    folder: Path

    @property
    def finished(self) -> bool:
        manifest = self.folder / MANIFEST
        return manifest.exists() and read_json(manifest).get("status") == "finished"


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    console = Console()
    try:
        setting, cells = planned(options)
    except CompressorError as error:
        raise SystemExit(f"{error.message} {error.hint}") from None
    wanted = [cell for cell in cells if not options.only or cell.name in options.only]
    for number, cell in enumerate(wanted, start=1):
        if cell.recipe is None or cell.finished or options.page_only:
            continue
        console.rule(f"{cell.name}, seed {cell.seed} ({number} of {len(wanted)})")
        with shown_on(RichDisplay(console)):
            try:
                run(cell)
            except CompressorError as error:  # the other cells can still be had
                console.print(f"[red]Not finished:[/] {error.message} {error.hint}", highlight=False)
        write(options, setting, cells)
    write(options, setting, cells)
    console.print(f"Wrote {options.page}", highlight=False)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="cifar10[:PATH], or folder:PATH with train/ and test/")
    parser.add_argument("--weights20", help="state dict of a trained ResNet-20")
    parser.add_argument("--weights56", help="state dict of a trained ResNet-56")
    parser.add_argument(
        "--epochs", type=int, default=WHOLE, help="of the longest recipes; others in proportion"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="recipes of recipes/joint")
    parser.add_argument(
        "--train-images", type=int, help="train on so many images, the same for all; of a folder"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/joint"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/joint.md"))
    parser.add_argument("--page-only", action="store_true", help="write the page from what is there")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], help="as for compress, for all recipes"
    )
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs {options.epochs}: expected 1 or more")
    if options.train_images is not None and options.train_images < 100:
        parser.error(f"--train-images {options.train_images}: expected 100 or more")
    return options


def planned(options: argparse.Namespace) -> tuple[Setting, list[Cell]]:
    """What all cells have in common, and every cell there is to run.

    Raises:
        CompressorError: a name of `--only` is no recipe, or the data cannot be made smaller.
    """
    from compressor.cli.flags import with_settings

    files = {path.stem: path for path in sorted((shipped("recipes") / "joint").glob("*.yaml"))}
    if unknown := sorted(set(options.only or ()) - set(files)):
        raise CompressorError(
            f"There is no recipe {unknown[0]!r} in recipes/joint.", f"Known: {', '.join(files)}."
        )
    parts = [f"{options.epochs}epochs", *([f"{options.train_images}images"] if options.train_images else [])]
    place = options.out / "-".join([*parts, *(text.replace("/", "_") for text in options.settings)])
    data = options.data
    if options.train_images:
        data = f"folder:{fewer_images(data, options.train_images, options.out)}"
    weights = {"cifar_resnet20": options.weights20, "cifar_resnet56": options.weights56}
    common = with_settings({"data": data}, options.settings)
    cells = []
    for name, path in files.items():
        shared = load_recipe(path)
        given = shared.weights if shared.weights == "none" else weights.get(shared.model)
        epochs = max(1, round(int(shared.epochs or WHOLE) * options.epochs / WHOLE))
        for seed in options.seeds:
            recipe = None
            if given is not None:
                recipe = shared.changed({**common, "weights": str(given), "epochs": epochs, "seed": seed})
            cells.append(Cell(name, seed, recipe, place / f"{name}-seed{seed}"))
    setting = Setting(
        options.epochs, WHOLE, tuple(options.seeds), options.train_images, tuple(options.settings)
    )
    return setting, cells


def fewer_images(data: str, count: int, out: Path) -> Path:
    """A folder with links to `count` of the training images, the same number of each class, and to the test images.

    Raises:
        CompressorError: the data is no folder with train/ and test/.
    """
    kind, _, where = data.partition(":")
    source = Path(where).expanduser().resolve()
    if kind != "folder" or not (source / "train").is_dir() or not (source / "test").is_dir():
        raise CompressorError(f"--train-images needs folder:PATH with train/ and test/, got {data}.")
    folder = (out / f"data-{count}").resolve()
    if (folder / "test").exists():
        return folder
    classes = sorted(entry for entry in (source / "train").iterdir() if entry.is_dir())
    for index, entry in enumerate(classes):
        images = sorted(entry.iterdir())
        chosen = np.random.default_rng([0, index]).permutation(len(images))[: count // len(classes)]
        (folder / "train" / entry.name).mkdir(parents=True, exist_ok=True)
        for number in chosen.tolist():
            link = folder / "train" / entry.name / images[number].name
            if not link.is_symlink():
                os.symlink(images[number], link)
    os.symlink(source / "test", folder / "test")  # last: with it, the folder is whole
    return folder


def run(cell: Cell) -> None:
    """Run a cell, or go on with it where it was stopped."""
    assert cell.recipe is not None
    if (cell.folder / RECIPE).exists():
        # Only what this command sets: a learning rate that was lowered on the way stays.
        expected = cell.recipe.model_dump(mode="json", include={"model", "weights", "epochs", "seed"})
        resume(cell.folder, {**expected, "data": cell.recipe.data.source})
    else:
        run_recipe(cell.recipe, out=cell.folder)


def write(options: argparse.Namespace, setting: Setting, cells: list[Cell]) -> None:
    """Write the page from all finished cells."""
    rows: list[Row] = []
    for cell in cells:
        if cell.finished:
            rows.append(row_of(cell.name, cell.seed, cell.folder))
    missing = [cell.name for cell in cells if not cell.finished]
    write_atomic(options.page, page(setting, rows, missing, command(options, missing)))


def command(options: argparse.Namespace, missing: list[str]) -> str:
    """The command that fills the missing cells, with the caller's own paths left out."""
    parts = ["python", "-m", "benchmarks.results_joint", "--data", f"{options.data.partition(':')[0]}:PATH"]
    parts += ["--weights20", "FILE", "--weights56", "FILE", "--epochs", str(options.epochs)]
    parts += ["--seeds", *map(str, options.seeds)]
    if options.train_images:
        parts += ["--train-images", str(options.train_images)]
    for setting in options.settings:
        parts += ["--set", setting]
    names = list(dict.fromkeys(missing))
    if len(names) <= 6:
        parts += ["--only", *names]
    return shlex.join(parts)


if __name__ == "__main__":
    main()
