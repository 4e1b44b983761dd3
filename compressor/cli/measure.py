"""`compress measure`: time a finished run's networks again, and explain the times operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli.terminal import friendly, show
from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from rich.table import Table

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
        show(part if isinstance(part, str) else _table(part) for part in lines)


def _table(lines: Sequence[Line]) -> Table:
    """Return the table of the first operators."""
    from rich.table import Table

    from compressor.report.formats import ABSENT, count, percent, significant
    from compressor.run.explain import SHOWN_LINES

    known = any(line.predicted_slim_ms is not None for line in lines)
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("operator", overflow="fold")
    before, after = ("MACs", "of dense", "dense ms", "slim ms"), ("share", "bound by", "of peak", "padding", "gap ms")
    for name in (*before, *(["predicted"] if known else []), *after):
        table.add_column(name, justify="left" if name == "bound by" else "right")
    total = sum(line.slim_ms or 0.0 for line in lines)
    guessed = sum(line.predicted_slim_ms or 0.0 for line in lines)

    def ms(value: float | None) -> str:
        return ABSENT if value is None else significant(value)

    for line in lines[:SHOWN_LINES]:
        guess = line.predicted_slim_ms
        table.add_row(
            line.name,
            count(line.slim_macs) if line.slim_macs else ABSENT,
            percent(line.slim_macs / line.dense_macs, 0) if line.dense_macs else ABSENT,
            ms(line.dense_ms),
            ms(line.slim_ms),
            *([ABSENT if guess is None else f"{ms(guess)} ({percent(guess / guessed, 0)})"] if known else []),
            percent((line.slim_ms or 0.0) / total, 0) if total else ABSENT,
            line.bound or ABSENT,
            percent(line.peak_share, 0),
            percent(line.padding, 0) if line.padding else ABSENT,
            f"{line.gap_ms:+.4f}",
        )
    return table
