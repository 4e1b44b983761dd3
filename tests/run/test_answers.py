"""What both networks answer on the test split: from the passes that give the accuracies, with a few pictures."""

from __future__ import annotations

import base64
import json
import shutil
from contextlib import closing
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from compressor import load, run_recipe
from compressor.core.answers import Answers, read_answers
from compressor.core.files import sha256_file
from compressor.data import load_data
from compressor.models import create_model
from compressor.run.answers import MOST, MOST_CHANGED, SIDE, record_dense, record_slim, telling
from compressor.run.finish import report_again
from compressor.run.folder import RunFolder
from compressor.training import classification
from compressor.training.task import Examined
from tests.runs import IMAGE_SIZE, manifest_of, recipe


def shares(answers: Answers) -> dict[str, float]:
    """The accuracies that follow from the counts of the classes."""
    counts = list(answers.counts())
    images = sum(each.images for each in counts)
    return {side: sum(getattr(each, side) for each in counts) / images for side in ("dense", "slim")}


def test_the_classes_sum_to_the_reported_accuracies(finished: Path) -> None:
    answers, accuracy = read_answers(finished), manifest_of(finished)["accuracy"]
    assert [each.name for each in answers.counts()] == [str(digit) for digit in range(10)]
    assert len(answers.truth) == accuracy["images"]
    assert shares(answers) == {"dense": accuracy["dense"], "slim": accuracy["finetuned"]}  # to the digit
    assert manifest_of(finished)["files"]["answers.json"] == sha256_file(finished / "answers.json")


def test_the_answers_are_those_of_the_delivered_network(finished: Path) -> None:
    test = load_data("digits", seed=0, image_size=IMAGE_SIZE).test
    slim = load(finished, factory="tests.nets:tiny")
    with torch.no_grad():
        given = [slim(images).argmax(1) for images, _ in test.batches(256)]
    answers = read_answers(finished)
    assert answers.truth == test.labels.tolist()
    assert answers.slim == torch.cat(given).tolist()


def test_the_page_shows_the_classes_and_the_pictures(finished: Path, tmp_path: Path) -> None:
    answers, page = read_answers(finished), (finished / "report.html").read_text(encoding="utf-8")
    assert 0 < len(answers.pictures) <= MOST
    for each in answers.pictures:
        assert each.file is not None
        content = (finished / each.file).read_bytes()
        assert base64.b64encode(content).decode() in page
        with Image.open(finished / each.file) as picture:
            assert picture.size == (IMAGE_SIZE, IMAGE_SIZE)
    changed = [each.image for each in answers.pictures if answers.dense[each.image] != answers.slim[each.image]]
    assert len(changed) == min(MOST_CHANGED, sum(a != b for a, b in zip(answers.dense, answers.slim, strict=True)))
    assert section(page)
    shutil.copytree(finished, tmp_path / "copy")
    report_again(tmp_path / "copy")
    assert section((tmp_path / "copy/report.html").read_text(encoding="utf-8")) == section(page)


def section(page: str) -> str:
    """The part of a page about the classes."""
    return page[page.index('<section id="classes">') : page.index('<section id="next">')]


def test_without_training_each_network_is_tested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    real = classification.predictions

    def counted(model: Any, split: Any, **fields: Any) -> Any:
        passes.append(len(split))
        return real(model, split, **fields)

    monkeypatch.setattr(classification, "predictions", counted)
    torch.save(create_model("tests.nets:tiny", 10).state_dict(), tmp_path / "net.pt")
    wanted = recipe(
        weights=str(tmp_path / "net.pt"), accept_dense=True, agent="uniform", epochs=0, budgets={"params": "60%"}
    )
    result = run_recipe(wanted, tmp_path / "run")
    answers, accuracy = read_answers(tmp_path / "run"), result.manifest["accuracy"]
    assert accuracy["finetuned"] == accuracy["compensated"]
    assert shares(answers) == {"dense": accuracy["dense"], "slim": accuracy["finetuned"]}
    assert passes.count(len(answers.truth)) == 3  # dense, only cut, compensated


def test_pictures_tell_what_has_changed() -> None:
    truth = [0] * 20
    dense, slim = [0] * 20, [0] * 20
    slim[3] = slim[7] = 1  # lost
    dense[5] = 2  # won
    dense[9], slim[9] = 1, 2  # both wrong
    assert telling(truth, dense, slim) == [3, 7, 5, 9, 0, 6, 12, 16]
    assert telling(truth, dense, dense) == [0, 2, 5, 7, 10, 12, 15, 17]
    everything = telling(truth, dense, [1] * 20)
    assert everything == [0, 2, 6, 10, 12, 15, 18, 9]  # spread, and the only one that is alike
    assert telling([], [], []) == []
    assert telling([0], [1], [0]) == [0]


@pytest.mark.parametrize("changes", range(0, 13, 3))
def test_some_pictures_agree_where_any_do(changes: int) -> None:
    slim = [1] * changes + [0] * (12 - changes)
    found = telling([0] * 12, [0] * 12, slim)
    assert len(found) == len(set(found)) == MOST
    different = sum(slim[place] != 0 for place in found)
    assert different == (MOST if changes == 12 else min(changes, MOST_CHANGED))


@cache
def large_pictures() -> Any:
    return load_data("digits", seed=0, image_size=200).test


class Pictures:
    """A task with a test split and the names of its classes."""

    def __init__(self, images: int) -> None:
        self.test = large_pictures().chosen(torch.arange(images))

    def facts(self) -> dict[str, Any]:
        return {"classes": ["a", "b"]}


def answered(*given: int, truth: tuple[int, ...] = (0, 1, 0)) -> Examined:
    return Examined(0.0, (torch.tensor(given), torch.tensor(truth)))


def test_a_new_dense_network_takes_the_place_of_the_old_answers(tmp_path: Path) -> None:
    task: Any = Pictures(3)
    with closing(RunFolder.create(tmp_path / "run", "model: x\n")) as run:
        record_dense(run, task, answered(0, 1, 1))
        record_slim(run, task, answered(0, 0, 1))
        assert sorted(path.name for path in (run.path / "pictures").iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]
        with Image.open(run.path / "pictures/1.jpg") as picture:
            assert picture.size == (SIDE, SIDE)
        assert read_answers(run.path).slim == [0, 0, 1]
        record_dense(run, task, answered(1, 1, 1))
        found = read_answers(run.path)
        assert (found.dense, found.slim, found.pictures) == ([1, 1, 1], [], [])
        assert list((run.path / "pictures").iterdir()) == []


def test_without_the_dense_answers_those_of_the_slim_network_stand_alone(tmp_path: Path) -> None:
    task: Any = Pictures(3)
    with closing(RunFolder.create(tmp_path / "run", "model: x\n")) as run:  # begun by an earlier version
        record_slim(run, task, answered(0, 0, 1))
    found = read_answers(tmp_path / "run")
    assert (found.dense, found.slim, found.pictures) == ([], [0, 0, 1], [])
    assert [(each.name, each.images, each.dense, each.slim) for each in found.counts()] == [
        ("a", 2, None, 1), ("b", 1, None, 0)
    ]  # fmt: skip


def test_a_task_without_classes_writes_no_file(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(path=tmp_path, file=lambda name: tmp_path / name)
    task: Any = Pictures(3)
    record_dense(run, task, Examined(0.5, None))
    record_slim(run, task, Examined(0.5, None))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[1]",
        json.dumps({"classes": ["a"], "truth": [0, 0], "dense": [0], "slim": [0, 0]}),
        json.dumps({"classes": ["a"], "truth": [0, -1], "dense": [0, 0], "slim": [0, 0]}),
        json.dumps({"classes": ["a"], "truth": [], "dense": [], "slim": []}),
    ],
)
def test_damaged_answers_count_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "answers.json").write_text(content)
    assert read_answers(tmp_path) == Answers()


def test_a_picture_is_a_file_of_its_folder(tmp_path: Path) -> None:
    places = ["pictures/1.jpg", "../1.jpg", "pictures/../../1.jpg", "/etc/1.jpg", "pictures/1.html", "pictures/1.jpg\n"]
    found = Answers.tolerant({"pictures": [{"image": 0, "file": place} for place in places]})
    assert [each.file for each in found.pictures] == ["pictures/1.jpg", None, None, None, None, None]
