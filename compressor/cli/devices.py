"""`compress devices`: list the devices with known latency."""

from __future__ import annotations

from compressor.cli.terminal import friendly, show


def devices() -> None:
    """List the devices with known latency, and how it is known."""
    with friendly():
        from rich.table import Table

        from compressor.latency.provider import known_devices

        table = Table(box=None, header_style="bold")
        for column in ("device", "runtime", "precision", "how known"):
            table.add_column(column, overflow="fold")
        for entry in known_devices():
            table.add_row(entry.name, entry.runtime, ", ".join(entry.precisions), entry.how)
        show([table])
