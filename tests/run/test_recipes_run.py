"""Every shipped recipe is searched, shortened, on a small folder of images; two take the whole road."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compressor import Recipe, run_recipe
from compressor.recipe import load_recipe, shipped_recipes
from compressor.run.contract import Contract
from compressor.run.folder import RunFolder
from compressor.run.job import DenseFile, Job, budget_specs
from compressor.run.stages import begin, search

CLASSES = ("cat", "dog")
PLAIN = tuple(sorted(name for name in shipped_recipes() if "/" not in name and not name.endswith("_shapes")))
WHOLE = ("mobilenet_v1", "mobilenet_v1_jetson")
"""Recipes that are also fine-tuned, exported, measured and reported: one for each kind of device."""
EVALUATIONS = 3
SHORT = {
    "weights": "none",  # published weights cannot be fetched everywhere
    "image_size": 48,
    "epochs": 1,
    "training": {"batch_size": 8, "mixed_precision": "no"},
    "search": {"max_evaluations": EVALUATIONS, "batch_norm_batches": 1},
    "contract": {"repeats": 1, "seconds": 5.0, "max_rounds": 2},
    "export": {"engine": False},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in colour, 24 images in all."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for index, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (72, 80, 3), dtype=np.uint8)
                pixels[..., index] += 120
                Image.fromarray(pixels).save(folder / split / name / f"{number}.jpg")
    return folder


@pytest.fixture
def not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense network's file is left out: exporting it takes most of the time, and the whole road below has it."""
    monkeypatch.setattr(DenseFile, "_write", lambda *_: None)


@pytest.mark.usefixtures("not_exported")
@pytest.mark.parametrize("name", [name for name in PLAIN if name.endswith("_jetson")])
def test_the_budget_of_a_shipped_recipe_can_be_reached_at_its_own_size(name: str, images: Path) -> None:
    recipe = (
        load_recipe(shipped_recipes()[name])
        .changed({"data": f"folder:{images}", "weights": "none"})
        .resolved()
    )
    assert recipe.image_size == 224
    job = Job.prepare(recipe)
    (budget,) = job.budgets()
    least = float(budget.predict(job.space.min_widths[None])[0])
    assert least <= budget.target < budget.dense


def shortened(name: str, images: Path) -> Recipe:
    """A shipped recipe on few small images, within a budget that these can keep."""
    recipe = load_recipe(shipped_recipes()[name]).changed({**SHORT, "data": f"folder:{images}"})
    if recipe.device == "local":
        # The latency of ten networks takes minutes to measure; the same road is walked with a count.
        return recipe.changed({"budgets": {"latency": None, "flops": "60%"}})
    # Small images are bound by launches: little of their latency can be saved.
    return recipe.changed({"budgets": {"latency": "99%"}})


@pytest.mark.parametrize("name", PLAIN)
def test_a_shipped_recipe_asks_for_a_share_of_the_latency_of_its_device(name: str) -> None:
    recipe = load_recipe(shipped_recipes()[name]).resolved()
    device = ("jetson-orin-nano-8gb", "fp16") if name.endswith("_jetson") else ("local", "fp32")
    assert (recipe.device, recipe.precision) == device
    (budget,) = budget_specs(recipe)
    assert budget.name == "latency"
    assert budget.relative
    assert 0.5 <= budget.value < 1


@pytest.mark.usefixtures("not_exported")
@pytest.mark.parametrize("name", [name for name in PLAIN if name not in WHOLE])
def test_a_shipped_recipe_is_searched(name: str, images: Path, tmp_path: Path) -> None:
    # Compensating these networks takes most of the time; the whole road below and the tests of it do so.
    recipe = shortened(name, images).changed({"pruning": {"compensate": "off"}})
    job = Job.prepare(recipe.resolved())
    with RunFolder.create(tmp_path / "run", job.recipe.to_yaml()) as run:
        begin(run, job)
        plan = search(run, job, Contract(run, job))
        assert run.manifest.search is not None
        assert 1 < run.manifest.search.evaluations <= EVALUATIONS
    widths = job.space.widths(plan.widths)
    for budget in job.budgets():
        assert float(budget.predict(widths[None])[0]) <= budget.target < budget.dense
    assert job.space.params(widths) < job.space.params(job.space.dense_widths)


@pytest.mark.parametrize("name", WHOLE)
def test_a_shipped_recipe_runs(name: str, images: Path, tmp_path: Path) -> None:
    recipe = shortened(name, images)
    result = run_recipe(recipe, out=tmp_path / "run")
    assert result.exit_code == (0 if recipe.device == "local" else 4)  # there it is only predicted
    budget = result.manifest["budgets"][0]
    assert budget["predicted"] <= budget["target"]
    if recipe.device == "local":
        assert budget["measured"] <= budget["target"]
    else:
        assert result.manifest["latency"]["estimated"]
        assert budget["measured"] is None
        assert 'class="banner predicted"' in (tmp_path / "run/report.html").read_text(encoding="utf-8")
        assert "model.fp16.onnx" in result.manifest["files"]
        assert any("not measured" in note for note in result.manifest["notes"])
    slim = result.model
    dense_params = result.manifest["cost"]["dense"]["params"]
    assert sum(parameter.numel() for parameter in slim.parameters()) < dense_params
