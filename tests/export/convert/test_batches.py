"""Batches as they are asked for, and the builder's profile that follows."""

from __future__ import annotations

import pytest

from export.convert.batches import ONE, Batch, parse_batch
from export.errors import ExportError


@pytest.mark.parametrize(
    ("text", "batch", "label"),
    [("1", ONE, ""), ("4", Batch(4, 4, 4), "batch4"), ("1..8", Batch(1, 8, 8), "batch1-8"),
     ("2..4..16", Batch(2, 4, 16), "batch2-16"), ("3..3", Batch(3, 3, 3), "batch3")],
)  # fmt: skip
def test_what_is_asked_for(text: str, batch: Batch, label: str) -> None:
    assert parse_batch(text) == batch
    assert batch.label == label


@pytest.mark.parametrize(
    "text", ["", "0", "8..1", "1..", "a", "1..9..4", "-1", "1...8", "4097", "1..2..3..4"]
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ExportError, match=r"Write 8, 1\.\.8 or 1\.\.4\.\.8"):
        parse_batch(text)


def test_profiles() -> None:
    batch = parse_batch("1..4..8")
    assert batch.profile({"x": (-1, 3, 32, 32), "y": (1, 3)}) == {
        "x": ((1, 3, 32, 32), (4, 3, 32, 32), (8, 3, 32, 32))
    }
    with pytest.raises(ExportError, match="only its first dimension"):
        batch.profile({"x": (-1, 3, -1, 32)})
