"""`compress card` and `compress push`: a run's network for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.flags import JsonOption
from compressor.cli.terminal import friendly, show, show_json

RunArgument = Annotated[Path, typer.Argument(help="A finished run's folder.")]


def card(run: RunArgument) -> None:
    """Print a model card of a run, with its numbers, in Markdown: compress card RUN > README.md."""
    with friendly():
        from compressor.run.share import card_of

        show(card_of(run).splitlines())


def push(
    run: RunArgument,
    repository: Annotated[str, typer.Argument(help="Where to: user/name.")],
    public: Annotated[
        bool, typer.Option("--public", help="Everyone may see it; by default a new repository is private.")
    ] = False,
    own_card: Annotated[
        Path | None, typer.Option("--card", help="Your own model card, instead of that of: compress card RUN.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files.")] = False,
    json: JsonOption = False,
) -> None:
    """Upload a run's network and its model card to the Hugging Face hub, as one commit."""
    with friendly():
        from compressor.core.tables import Cell, Table
        from compressor.report.formats import size
        from compressor.run.share import check_hub, shared_files, sizes
        from compressor.run.share import push as pushed

        check_hub(repository)
        files = shared_files(run, own_card)
        table = Table("file", "size", right=("size",))
        for name, count in sorted(sizes(files).items()):
            table.add(name, Cell(count, size(count)))
        where = None if dry_run else pushed(files, repository, public=public)
        if json:
            show_json({"repository": repository, "commit": where, "files": table.records()})
        else:
            total = size(sum(sizes(files).values()))
            show([table, f"Would push {total} to {repository}." if where is None else f"Pushed {total}: {where}"])
