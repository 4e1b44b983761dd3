"""Comparison of found boxes: as sets, within the tolerance, with one picture that may differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from export.convert.detections import compare_found
from export.errors import ExportError


def found(*rows: tuple[float, float, float, float, float, int]) -> dict[str, Any]:
    table = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return {"boxes": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].astype(np.int64)}


ONE, OTHER = (0, 0, 10, 20, 0.9, 1), (5, 5, 30, 40, 0.9, 2)


def test_the_order_does_not_count() -> None:
    parity = compare_found([found(ONE, OTHER)], [found(OTHER, ONE)], "a.onnx", side=100)
    assert (parity.max_abs, parity.mean_abs, parity.top1_agreement, parity.samples) == (0.0, 0.0, 1.0, 1)


def test_boxes_differ_as_shares_of_the_picture() -> None:
    moved = (0, 0, 10, 20.5, 0.9, 1)
    parity = compare_found([found(ONE)], [found(moved)], "a.onnx", side=100, tolerance=0.01)
    assert parity.max_abs == pytest.approx(0.005)
    assert parity.mean_abs == pytest.approx(0.005)
    less_sure = (0, 0, 10, 20, 0.897, 1)
    parity = compare_found([found(ONE)], [found(less_sure)], "a.onnx", side=100, tolerance=0.01)
    assert parity.max_abs == pytest.approx(0.003, rel=1e-4)


@pytest.mark.parametrize(
    "judged",
    [found(), found(ONE, ONE), found((0, 0, 10, 20, 0.9, 2)), found((0, 0, 10, 22, 0.9, 1)), found(ONE, OTHER)],
    ids=["none", "twice", "another label", "another box", "one more"],
)
def test_one_picture_may_differ_and_two_may_not(judged: dict[str, Any]) -> None:
    right = [found(ONE)] * 4
    assert compare_found(right, [*right[:3], judged], "a.onnx", side=100).top1_agreement == 0.75
    message = "a.onnx finds the same boxes as the network in 2 of 4 pictures; in the first other one"
    with pytest.raises(ExportError, match=message):
        compare_found(right, [*right[:2], judged, judged], "a.onnx", side=100)


def test_a_set_is_compared_both_ways() -> None:
    # each box of the file is one of the network's, but not the other way around
    with pytest.raises(ExportError, match="in 0 of 2 pictures"):
        compare_found([found(ONE, OTHER)] * 2, [found(ONE, ONE)] * 2, "a.onnx", side=100)


def test_pictures_without_boxes_agree_and_a_network_without_any_is_refused() -> None:
    assert compare_found([found(ONE), found()], [found(ONE), found()], "a.onnx", side=100).top1_agreement == 1.0
    with pytest.raises(ExportError, match="The network finds no box in 2 pictures"):
        compare_found([found()] * 2, [found()] * 2, "a.onnx", side=100)
