"""With `train` alone, training does not see the inputs that choose and judge networks, or the run says that it does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor.recipe import Recipe
from compressor.recipe.validation import validated
from compressor.run.own import _fields
from compressor.run.own_checks import Checked, Objects
from compressor.training.own_task import OwnTask

FAST: dict[str, Any] = {
    "flops": "60%", "agent": "uniform", "search": {"max_evaluations": 2}, "export": {"engine": False},
    "contract": {"repeats": 1, "seconds": 5.0},
}  # fmt: skip
X = torch.arange(200.0)[:, None, None, None].expand(200, 1, 8, 8) / 200 + torch.rand(1, 1, 8, 8)
Y = torch.arange(200) % 3
BATCHES = list(zip(X.split(20), Y.split(20), strict=True))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


class Loader:
    """Batches that are neither a list nor a DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        return iter(BATCHES)


def checked(epochs: int = 2, **given: Any) -> tuple[OwnTask, list[str]]:
    names = ("train", "evaluate", "test", "loss", "calibration")
    objects = Objects(network(), X[:1], **{name: given.get(name) for name in names})
    recipe = validated(Recipe, _fields(objects, {"budgets": {"flops": "60%"}, "epochs": epochs}, {}), "compress")
    return Checked(objects, network().eval(), (X[:1],), None, recipe).task()


def numbers(*inputs: Tensor) -> set[int]:
    """The places of inputs in X."""
    return {round(float(each)) for part in inputs for each in (part[:, 0, 0, 0] - X[0, 0, 0, 0]) * 200}


def of(memory: Any) -> set[int]:
    return set() if memory is None else numbers(*(x for (x,) in memory.batches(64)))


@pytest.mark.parametrize(
    ("train", "sizes"),
    [
        (DataLoader(TensorDataset(X, Y), batch_size=20, shuffle=True), (120, 40, 40)),
        (BATCHES, (120, 40, 40)),
        (DataLoader(TensorDataset(X[:20], Y[:20]), batch_size=4), (12, 4, 4)),
    ],
)
def test_training_does_not_see_what_judges(train: Any, sizes: tuple[int, int, int]) -> None:
    task, notes = checked(train=train)
    trained = numbers(*(x for x, _ in task.train.batches(20)))
    parts = (trained, of(task.search), of(task.test))
    assert tuple(map(len, parts)) == sizes
    assert len(set.union(*parts)) == sum(sizes)
    assert of(task.calibration) == trained
    assert task.train.steps(20) == len(list(task.train.batches(20)))
    assert task.split == "test"
    assert any(f"{sizes[1]} choose the network, {sizes[2]} judge it" in note for note in notes)
    again, _ = checked(train=train)
    assert (of(again.search), of(again.test)) == parts[1:]


def test_a_test_function_leaves_more_to_train_on() -> None:
    task, notes = checked(train=BATCHES, test=lambda model: 0.5)
    assert len(numbers(*(x for x, _ in task.train.batches(20)))) == 160
    assert (len(of(task.search)), task.test) == (40, None)
    assert any(note.endswith("40 choose the network.") for note in notes)


@pytest.mark.parametrize("given", [{"evaluate": lambda model: 0.5}, {"calibration": [X[:50]]}])
def test_all_is_trained_on_where_something_else_chooses(given: dict[str, Any]) -> None:
    task, notes = checked(train=BATCHES, **given)
    assert len(numbers(*(x for x, _ in task.train.batches(20)))) == 200
    assert task.split == "test"
    assert not any("train" in note for note in notes)


@pytest.mark.parametrize(
    ("given", "epochs", "split", "noted"),
    [
        ({"train": Loader()}, 2, "training", True),
        ({"train": Loader()}, 0, "test", False),
        ({"train": Loader(), "test": lambda model: 0.5}, 2, "test", True),
        ({"train": BATCHES[:1]}, 2, "training", True),
        ({"train": [(X[:12], Y[:12])]}, 2, "training", False),
        ({"train": [(X[:12], Y[:12])]}, 0, "search", False),
        ({"train": BATCHES, "calibration": [X[:12]]}, 2, "search", False),
        ({"calibration": [X[:12]]}, 2, "training", False),
        ({"calibration": [X[:12]]}, 0, "search", False),
        ({"calibration": [X]}, 2, "test", False),
    ],
)
def test_the_split_says_who_has_seen_it(given: dict[str, Any], epochs: int, split: str, noted: bool) -> None:
    task, notes = checked(epochs, **given)
    assert task.split == split
    assert any("train cannot be divided" in note for note in notes) == noted


@pytest.mark.parametrize(
    ("train", "split"), [(partial(DataLoader, TensorDataset(X, Y), 20), "test"), (Loader, "training")]
)
def test_manifest_and_page_name_the_split(tmp_path: Path, train: Any, split: str) -> None:
    result = compressor.compress(network(), X[:1], train=train(), epochs=1, out=tmp_path / "run", **FAST)
    found = result.manifest["accuracy"]
    assert (found["split"], found["images"]) == (split, 40)
    page = (result.directory / "report.html").read_text(encoding="utf-8")
    assert f"Agreement with the dense network, {split} split" in page
    assert ("test split" in page) == (split == "test")
    assert ("train cannot be divided" in page) == (split == "training")
