"""What a resumed run reads from its folder, and which fields of its recipe may have changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.core.errors import CompressorError
from compressor.core.files import write_atomic
from compressor.core.front import FRONT, Front
from compressor.core.manifest import MANIFEST
from compressor.core.progress import say
from compressor.core.records import RECIPE
from compressor.recipe import Recipe, load_recipe
from compressor.recipe.validation import dotted, validated
from compressor.run.device import provider_of, request_of
from compressor.run.measure import stored_table

if TYPE_CHECKING:
    from compressor.latency.table import LatencyTable
    from compressor.run.folder import RunFolder


_MAX_DROP = "export.max_drop"

_FREE = (
    "accept_dense",
    _MAX_DROP,
    "track",
    "training.learning_rate",
    "training.finetune_learning_rate",
    "search.workers",
    "search.evaluation_seconds",
    "contract.accept_predicted",
)
"""Fields that may change when a run is resumed: `_MAX_DROP` until it has finished, as files are then written again."""


def changed_since(run: RunFolder, recipe: Recipe) -> list[str]:
    """Describe the fields in which a recipe differs from the one that the run was started with.

    Raises:
        CompressorError: A field differs that may not.
    """
    if run.manifest.recipe:
        begun = validated(Recipe, run.manifest.recipe, f"the recipe in {run.file(MANIFEST)}")
    else:  # killed before its first stage, or started by an earlier version
        begun = load_recipe(run.file(RECIPE))
    begun = begun.placed(Path.cwd())  # runs of earlier versions hold relative paths
    before, now = (dict(dotted(each.model_dump(mode="json"))) for each in (begun, recipe))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    fixed = [name for name in names if name not in _FREE or (name == _MAX_DROP and _ended(run))]
    if refused := [f"{name} is {before.get(name)}, not {now.get(name)}" for name in fixed]:
        raise CompressorError(
            f"The run in {run.path} was started with another recipe: {'; '.join(refused)}.",
            f"Resume it without these options and with its original {RECIPE}, or start a new run with --out DIR.",
        )
    return [f"{name} was {before.get(name)} and is {now.get(name)} now" for name in names]


def _ended(run: RunFolder) -> bool:
    """Return whether a run, or the front of several, has finished."""
    front = run.file(FRONT)
    return (Front.read(front) if front.is_file() else run.manifest).status == "finished"


def rewrite(run: RunFolder, recipe: Recipe, changed: Sequence[str]) -> None:
    """Write a run's recipe again where fields have changed since its start (see `changed_since`), with a note.

    Files that were written with another allowed drop are written and measured again.
    """
    if not changed:
        return
    note = f"Resumed with other settings: {'; '.join(changed)}."
    write_atomic(run.file(RECIPE), recipe.to_yaml())
    if run.manifest.stages:
        again = any(each.startswith(f"{_MAX_DROP} was ") for each in changed)
        run.manifest.recipe = recipe.model_dump(mode="json")
        run.manifest.notes = [*run.manifest.notes, note]
        run.reopen(*(("export", "measure") if again else ()))
    say(note)


def table_of(run: RunFolder, recipe: Recipe) -> LatencyTable | None:
    """Return the latency table of the running search, corrected by the measurements since.

    Raises:
        CompressorError: The table is damaged, or more must be measured and it belongs to another device.
    """
    table = stored_table(run)
    if table is None:
        return None
    if not run.finished("measure"):
        provider_of(recipe).require_same(table, request_of(recipe))
    for predicted, measured in run.manifest.corrections:
        table = table.refit([(predicted, measured)], lower=True)
    return table


def function_values(run: RunFolder) -> dict[str, dict[tuple[int, ...], float]]:
    """Return the values of the user's functions in the search so far, by budget and widths."""
    from compressor.search.records import FORMAT

    state = run.checkpoint("search").load()
    if state is None or state.get("format") != FORMAT:  # the search reports another format, with a hint
        return {}
    known = state["env"]["functions"]
    return {name: {tuple(widths): float(value) for widths, value in known[name]} for name in known}
