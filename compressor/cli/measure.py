"""`compress measure`: time a finished run's networks again, and explain the times operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli.flags import JsonOption
from compressor.cli.terminal import friendly, show, show_json
from compressor.core.errors import CompressorError
from compressor.core.tables import Cell, Table

if TYPE_CHECKING:
    from compressor.latency.explain import Line


def measure(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    explain: Annotated[
        bool, typer.Option("--explain", help="Say operator by operator why the slim network is not faster.")
    ] = False,
    dense_profile: Annotated[
        Path | None,
        typer.Option(help="With --explain: the dense engine's profile from trtexec --exportProfile."),
    ] = None,
    slim_profile: Annotated[
        Path | None,
        typer.Option(help="With --explain: the slim engine's profile from trtexec --exportProfile."),
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option(help="With --explain: module:factory of the network, if it was not run from here."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure a run's dense and slim networks again: on its device, or on this machine's CPU if it is not reached."""
    with friendly():
        from compressor.run.explain import explain_again
        from compressor.run.measure import measure_again

        if (dense_profile is None) != (slim_profile is None) or (dense_profile is not None and not explain):
            raise CompressorError(
                "Layer profiles explain two networks together.",
                "Give --explain, --dense-profile FILE and --slim-profile FILE.",
            )
        profiles = (dense_profile, slim_profile) if dense_profile and slim_profile else None
        lines = explain_again(run, profiles, factory) if explain else measure_again(run)
        parts = (part if isinstance(part, str) else _table(part) for part in lines)
        if not json:
            show(parts)
            return
        found = list(parts)
        operators = [row for part in found if isinstance(part, Table) for row in part.records()]
        show_json({"lines": [part for part in found if isinstance(part, str)], "operators": operators})


def _table(lines: Sequence[Line]) -> Table:
    """Return the table of the first operators."""
    from compressor.report.formats import ABSENT, count, percent, significant
    from compressor.run.explain import SHOWN_LINES

    known = any(line.predicted_slim_ms is not None for line in lines)
    before, after = ("MACs", "of dense", "dense ms", "slim ms"), ("share", "bound by", "of peak", "padding", "gap ms")
    numbers = (*before, *(["predicted"] if known else []), *after)
    table = Table("operator", *numbers, right=tuple(name for name in numbers if name != "bound by"))
    total = sum(line.slim_ms or 0.0 for line in lines)
    guessed = sum(line.predicted_slim_ms or 0.0 for line in lines)

    def ms(value: float | None) -> Cell:
        return Cell(value, ABSENT if value is None else significant(value))

    def share(value: float | None) -> Cell:
        return Cell(value, percent(value, 0))

    for line in lines[:SHOWN_LINES]:
        guess = line.predicted_slim_ms
        of_all = "" if guess is None or not guessed else f" ({percent(guess / guessed, 0)})"
        table.add(
            line.name,
            Cell(line.slim_macs, count(line.slim_macs) if line.slim_macs else ABSENT),
            share(line.slim_macs / line.dense_macs if line.dense_macs else None),
            ms(line.dense_ms),
            ms(line.slim_ms),
            *([Cell(guess, f"{ms(guess).text}{of_all}")] if known else []),
            share((line.slim_ms or 0.0) / total if total else None),
            Cell(line.bound, line.bound or ABSENT),
            share(line.peak_share),
            Cell(line.padding, percent(line.padding, 0) if line.padding else ABSENT),
            Cell(line.gap_ms, f"{line.gap_ms:+.4f}"),
        )
    return table
