"""The closing table: what the terminal shows when a run ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.report.collect import Manifest
from compressor.report.comparison import comparison
from compressor.report.formats import ABSENT, MINUS

if TYPE_CHECKING:
    from rich.table import Table

# Rich draws its own frame in ASCII where a terminal knows no more; these are the other signs that we print.
_PLAIN = str.maketrans({ABSENT: "-", MINUS: "-"})


def closing_table(manifest: Manifest) -> Table:
    """Dense and slim side by side as a Rich table; print `verdict(manifest)` below it.

    Names from the manifest are put in as plain text, so that square brackets in them are no Rich markup.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for heading in ("dense", "slim", "of dense"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison(manifest):
        cells = (row.label, row.dense, row.slim, row.change)
        table.add_row(*(Text(cell.translate(_PLAIN)) for cell in cells))
    return table
