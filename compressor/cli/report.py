"""`compress report`: write a run's report again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.terminal import friendly, show


def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report.html again from its manifest."""
    with friendly():
        from compressor.run.finish import report_again

        page, verdict = report_again(run)
        show([f"Wrote {page}", verdict])
