"""A half-made table: every measurement is written down as it comes, so that a killed measuring goes on where it stood.

One JSON document a line: a heading that says what is measured, then one line for each measurement. A line that was
cut off by a kill is dropped when the file is read.
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
        role: The dense network, one that the table is fitted to, or one that is held out.
        widths: Of every group.
        sample: What was measured.
        at_s: When, in seconds of measuring.
    """

    role: Role
    widths: tuple[int, ...]
    sample: Sample
    at_s: float


def heading_of(space: PruningSpace, seed: int, **device: str) -> dict[str, Any]:
    """What is measured: the sub-networks of a space, drawn by a seed, on a device that is described in words."""
    return {
        "journal": 2,
        "network": network_signature(space),
        "least": [int(width) for width in space.min_widths],
        "steps": [int(group.granularity) for group in space.groups],
        "seed": seed,
        **device,
    }


class Journal:
    """The measurements of one table in the making.

    Args:
        path: The file; None keeps nothing.
        heading: What is measured. A file with another heading is of no use and is begun anew.
    """

    def __init__(self, path: Path | None, heading: Mapping[str, Any]) -> None:
        self.path = path
        self._heading = json.loads(json.dumps(dict(heading)))
        self.records = self._read()

    def add(self, record: Record) -> None:
        """Write one measurement down.

        Raises:
            CompressorError: the disk is full or the folder cannot be written.
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

    def begin_anew(self) -> None:
        """Forget everything that was measured."""
        self.records = []
        if self.path is not None:
            write_atomic(self.path, json.dumps(self._heading) + "\n")

    def close(self) -> None:
        """The table is made: the file goes."""
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
            self.begin_anew()
            return []
        if not whole:  # a kill cut the last line off; what comes next must not be glued to it
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
    if not len(operators):  # the device does not tell them apart
        operators = np.zeros((0, len(fields["epilogues"])))
    if fields["role"] not in ("dense", "fit", "held") or not len(whole) or operators.ndim != 2:
        raise ValueError("no measurement")
    c_in, c_out = (np.asarray(fields[name], dtype=np.int64) for name in ("c_in", "c_out"))
    network = TaggedNetwork(b"", (), tuple(str(each) for each in fields["epilogues"]))
    sample = Sample(c_in, c_out, network, NetworkTimes(whole, operators, float(fields["slowdown"])))
    return Record(
        fields["role"], tuple(int(width) for width in fields["widths"]), sample, float(fields["at_s"])
    )
