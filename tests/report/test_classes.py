"""The page class by class: the numbers, their order, the pictures, and files that cannot be trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_report_page import page_of

from compressor.core.answers import Answers
from compressor.report.classes import WORST, by_class, shown_pictures
from compressor.report.formats import ABSENT, MINUS

JPEG = b"\xff\xd8\xff made up"


def answers(**fields: Any) -> Answers:
    """Four images of a, two of b; the dense network has five right, the slim one four."""
    given = {"dense": [0, 0, 0, 1, 1, 1], "slim": [0, 0, 1, 0, 0, 1]}
    return Answers.tolerant({"classes": ["a", "b"], "truth": [0, 0, 0, 0, 1, 1], **given, **fields})


def test_each_class_and_all_together() -> None:
    found = by_class(answers()) or {}
    assert [tuple(row.values()) for row in (found["total"], *found["rows"])] == [
        ("all classes", "6", "83.33%", "66.67%", f"{MINUS}16.67"),
        ("a", "4", "75.00%", "75.00%", "0.00"),
        ("b", "2", "100.00%", "50.00%", f"{MINUS}50.00"),
    ]
    assert found["changes"] == (
        "The networks answer 3 of 6 test images differently: only the dense one is right on 2, only the slim one on 1, "
        "neither on 0."
    )
    assert not found["many"]
    same = by_class(answers(slim=[0, 0, 0, 1, 1, 1])) or {}
    assert same["changes"] == "Both networks give the same answer to all 6 test images."


def test_what_is_not_known_is_a_dash() -> None:
    found = by_class(answers(slim=[])) or {}
    assert found["total"]["slim"] == found["total"]["change"] == ABSENT
    assert found["changes"] == ""
    assert by_class(answers(slim=[], dense=[])) is None
    assert by_class(Answers()) is None
    assert shown_pictures(answers(dense=[]), {0: JPEG}) == []


def test_of_many_classes_the_worst_come_first() -> None:
    truth = [label for label in range(30) for _ in range(2)]
    slim = [label if place % 2 or label % 3 else label + 1 for place, label in enumerate(truth)]
    dense = [99 if label == 27 else label for label in truth]
    found = by_class(Answers(classes=[f"c{label}" for label in range(30)], truth=truth, dense=dense, slim=slim)) or {}
    assert found["many"]
    assert [row["name"] for row in found["rows"][:4]] == ["c0", "c3", "c6", "c9"]  # of half right, those that lost most
    assert [row["name"] for row in found["rows"][9:11]] == ["c27", "c1"]
    assert (len(found["rows"]), len(found["all"])) == (WORST, 30)


def test_a_network_may_answer_a_class_without_a_name() -> None:
    (picture,) = shown_pictures(answers(slim=[7, 0, 0, 0, 1, 1]), {0: JPEG})
    assert picture["answers"] == [("dense", "a", True), ("slim", "class 7", False)]
    assert picture["source"] == "data:image/jpeg;base64,/9j/IG1hZGUgdXA="


@pytest.mark.usefixtures("undrawn")
def test_the_page_embeds_small_pictures_only_and_escapes_names(run_folder: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    kept = [{"image": place, "file": f"pictures/{place}.jpg"} for place in (0, 1, 2, 5, 6)]
    content = answers(classes=["a", evil], pictures=kept).plain()
    (run_folder / "answers.json").write_text(json.dumps(content))
    (run_folder / "pictures").mkdir()
    for place, data in {0: JPEG, 1: b"<svg onload=alert(1)>", 2: JPEG + b"0" * 60_000, 5: JPEG, 6: JPEG}.items():
        (run_folder / f"pictures/{place}.jpg").write_bytes(data)
    page = page_of(run_folder)
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert [each["alt"] for each in images] == ["Test image 0: a", f"Test image 5: {evil}"]
    assert all((each["src"] or "").startswith("data:image/jpeg;base64,") for each in images)
    assert page.text.count(evil) >= 2
    assert "classes" in page.sections
    assert f"compress predict {run_folder} {run_folder}/pictures/0.jpg" in page.text


@pytest.mark.usefixtures("undrawn")
def test_damaged_answers_leave_the_section_out(run_folder: Path) -> None:
    (run_folder / "answers.json").write_text("[]")
    assert "classes" not in page_of(run_folder).sections


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_page_says_that_the_answers_are_in_fp32(run_folder: Path, precision: str) -> None:
    (run_folder / "answers.json").write_text(json.dumps(answers().plain()))
    manifest = json.loads((run_folder / "manifest.json").read_text())
    manifest["latency"]["precision"] = precision
    manifest["exports"] = {"int8": {"file": "model.int8.onnx"}}
    (run_folder / "manifest.json").write_text(json.dumps(manifest))
    told = "answers are those of model.onnx, in FP32, not of model.int8.onnx." in page_of(run_folder).text
    assert told == (precision == "int8")
