"""Every shipped recipe runs, shortened, on a small folder of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compressor import compress
from compressor.recipe import load_recipe, shipped_recipes
from compressor.run.job import Job

CLASSES = ("cat", "dog")
SHORT = {
    "weights": "none",  # published weights cannot be fetched everywhere
    "image_size": 64,
    "epochs": 1,
    "training": {"batch_size": 8, "mixed_precision": "no"},
    "search": {"max_evaluations": 3, "batch_norm_batches": 1},
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


@pytest.mark.parametrize("name", sorted(name for name in shipped_recipes() if name.endswith("_jetson")))
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


@pytest.mark.parametrize("name", sorted(name for name in shipped_recipes() if "/" not in name))
def test_a_shipped_recipe_runs(name: str, images: Path, tmp_path: Path) -> None:
    shipped = load_recipe(shipped_recipes()[name])
    recipe = shipped.changed({**SHORT, "data": f"folder:{images}"})
    if recipe.device == "local":
        # The latency of ten networks takes minutes to measure; the same road is walked with a count.
        recipe = recipe.changed({"budgets": {"latency": None, "flops": "60%"}})
    else:
        # Small images are bound by launches: little of their latency can be saved.
        recipe = recipe.changed({"budgets": {"latency": "99%"}})
    result = compress(recipe, out=tmp_path / "run")
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
    slim = result.load()
    dense_params = result.manifest["cost"]["dense"]["params"]
    assert sum(parameter.numel() for parameter in slim.parameters()) < dense_params
