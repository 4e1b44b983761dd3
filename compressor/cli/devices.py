"""`compress devices`: list the devices with known latency."""

from __future__ import annotations

from compressor.cli.flags import JsonOption
from compressor.cli.terminal import friendly, show, show_json


def devices(json: JsonOption = False) -> None:
    """List the devices with known latency, and how it is known."""
    with friendly():
        from compressor.core.tables import Cell, Table
        from compressor.latency.provider import known_devices

        table = Table("device", "runtime", "precision", "how known")
        for entry in known_devices():
            precisions = Cell(list(entry.precisions), ", ".join(entry.precisions))
            table.add(entry.name, entry.runtime, precisions, entry.how)
        if json:
            show_json(table.records())
        else:
            show([table])
