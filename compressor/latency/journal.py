"""Journal of an unfinished table: each measurement is written at once, so that an interrupted run can resume.

The file has one JSON document per line: a heading that identifies what is measured, then one line per measurement. A
last line that was cut off by a kill is dropped on reading.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from compressor.core.files import disk_error, write_atomic
from compressor.latency.assemble import Sample
from compressor.latency.ort_profile import NetworkTimes, TaggedNetwork
from compressor.latency.signature import network_signature

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

Role = Literal["dense", "fit", "held"]


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        role: Dense network, network to fit to, or held-out network.
        widths: Width of each group.
        sample: The measured sample.
        at_s: Measurement time so far, in seconds.
    """

    role: Role
    widths: tuple[int, ...]
    sample: Sample
    at_s: float


def heading_of(space: PruningSpace, seed: int, **device: str) -> dict[str, Any]:
    """Return the heading: signature of the space, seed of the sub-networks, and a description of the device."""
    return {
        "journal": 2,
        "network": network_signature(space),
        "least": [int(width) for width in space.min_widths],
        "steps": [int(group.granularity) for group in space.groups],
        "seed": seed,
        **device,
    }


class Journal:
    """The measurements of one unfinished table.

    Args:
        path: The file; None writes nothing.
        heading: Identifies what is measured. A file with another heading is discarded.
    """

    def __init__(self, path: Path | None, heading: Mapping[str, Any]) -> None:
        self.path = path
        self._heading = json.loads(json.dumps(dict(heading)))
        self.records = self._read()

    def add(self, record: Record) -> None:
        """Append one measurement.

        Raises:
            CompressorError: The disk is full or the folder cannot be written.
        """
        self.records.append(record)
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_to_line(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(self.path, error) from error

    def restart(self) -> None:
        """Discard all measurements."""
        self.records = []
        if self.path is not None:
            write_atomic(self.path, json.dumps(self._heading) + "\n")

    def close(self) -> None:
        """Delete the file once the table is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self) -> list[Record]:
        if self.path is None:
            return []
        try:
            lines = self.path.read_bytes().decode("utf-8").splitlines(keepends=True)
            heading, *rest = [json.loads(line) for line in lines if line.endswith("\n")]
            records = [_from_json(fields) for fields in rest]
            whole = all(line.endswith("\n") for line in lines)
        except (OSError, ValueError, KeyError, TypeError):
            heading, records, whole = None, [], True
        if heading != self._heading:
            self.restart()
            return []
        if not whole:  # a kill cut off the last line: the next record must start on a new line
            write_atomic(self.path, "".join([json.dumps(heading) + "\n", *map(_to_line, records)]))
        return records


def _to_line(record: Record) -> str:
    sample = record.sample
    fields = {
        "role": record.role,
        "widths": list(record.widths),
        "c_in": sample.c_in.tolist(),
        "c_out": sample.c_out.tolist(),
        "epilogues": list(sample.network.epilogues),
        "whole_ms": np.round(sample.times.whole_ms, 6).tolist(),
        "operators_ms": np.round(sample.times.operators_ms, 6).tolist(),
        "slowdown": round(sample.times.slowdown, 4),
        "at_s": round(record.at_s, 3),
    }
    return json.dumps(fields) + "\n"


def _from_json(fields: Mapping[str, Any]) -> Record:
    whole, operators = (np.asarray(fields[name], dtype=np.float64) for name in ("whole_ms", "operators_ms"))
    if not len(operators):  # the device does not time operators one by one
        operators = np.zeros((0, len(fields["epilogues"])))
    if fields["role"] not in ("dense", "fit", "held") or not len(whole) or operators.ndim != 2:
        raise ValueError("no measurement")
    c_in, c_out = (np.asarray(fields[name], dtype=np.int64) for name in ("c_in", "c_out"))
    network = TaggedNetwork(b"", (), tuple(str(each) for each in fields["epilogues"]))
    sample = Sample(c_in, c_out, network, NetworkTimes(whole, operators, float(fields["slowdown"])))
    return Record(
        fields["role"], tuple(int(width) for width in fields["widths"]), sample, float(fields["at_s"])
    )
