"""`compress doctor`: what this machine can do, and how long a recipe takes here."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compressor.cli import completion
from compressor.cli.flags import JsonOption, recipe_of
from compressor.cli.terminal import friendly, show, show_json
from compressor.core.tables import Table


def doctor(
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe whose time is estimated: YAML file or shipped name.", autocompletion=completion.recipes
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Examine this machine: GPU, runtimes, what can be measured, noise, disk; and estimate the time of a recipe."""
    with friendly():
        from compressor.run.doctor import examine

        findings = list(examine())
        found: dict[str, Any] = {"machine": findings}
        if not json:
            table = Table("state", "part", "found")
            for each in findings:
                table.add(each.state, each.part, each.found)
            wide = len("missing") + 2
            for line, advice in zip(table.lines(), ["", *(each.advice for each in findings)], strict=True):
                show([line, *([f"{'':{wide}}{advice}"] if advice else [])])
        if recipe is not None:
            for name, part in _times(recipe):
                if json:
                    found[name] = part.records() if isinstance(part, Table) else part
                else:
                    show(["", part] if isinstance(part, Table) else [part])
        if json:
            show_json(found)


def _times(recipe: str) -> Any:
    from functools import partial
    from pathlib import Path

    from compressor.cli.dry_run import times
    from compressor.run.device import resolved
    from compressor.run.job import Job
    from compressor.run.load import load

    wanted = resolved(recipe_of(recipe, {})).placed(Path.cwd())
    return times(Job.prepare(wanted, loader=partial(load, decode_files=False)))
