"""`compress list`, `compress compare` and `compress clean`: the runs in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.flags import JsonOption
from compressor.cli.terminal import friendly, show, show_json

Runs = Annotated[
    list[Path] | None, typer.Argument(help="Folders of runs, or folders that hold some; by default runs/.")
]


def list_runs(folders: Runs = None, json: JsonOption = False) -> None:
    """List runs: how each ended, and its slim network beside the dense one."""
    with friendly():
        from compressor.run.runs import find_runs, listed

        table = listed(find_runs(folders or []))
        if json:
            show_json(table.records())
        else:
            show([table])


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of two or more runs.", metavar="RUN RUN...")],
    json: JsonOption = False,
) -> None:
    """Compare runs: their results, and the fields in which their recipes differ."""
    with friendly():
        from compressor.run.runs import compared, find_runs

        table = compared(find_runs(folders))
        if json:
            show_json(table.records())
        else:
            show([table])


def clean(
    folders: Runs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    decoded_images: Annotated[
        bool,
        typer.Option("--decoded-images", help="Remove the decoded images in the cache, and of runs only those given."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Remove the checkpoints of finished runs, which only a resume needs; results and unfinished runs stay."""
    with friendly():
        from compressor.core.tables import Table
        from compressor.report.formats import size
        from compressor.run.runs import clean as cleaned
        from compressor.run.runs import clean_decoded, find_runs

        runs = find_runs(folders or []) if folders or not decoded_images else []
        found = [*([clean_decoded(remove=not dry_run)] if decoded_images else []), *cleaned(runs, remove=not dry_run)]
        if json:
            show_json(
                [
                    {
                        "run": str(each.run),
                        "decision": each.decision,
                        "reason": each.reason,
                        "freed": each.freed_bytes,
                        "files": each.files,
                    }
                    for each in found
                ]
            )
            return
        table = Table("run", "freed", "files", right=("freed",))
        for each in found:
            table.add(str(each.run), size(each.freed_bytes), ", ".join(each.files) or each.reason)
        total = sum(each.freed_bytes for each in found)
        show([table, f"{'Would free' if dry_run else 'Freed'} {size(total)}."])
