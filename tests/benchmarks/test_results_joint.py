"""The command of the joint agent's experiments: it skips what is finished, goes on, and writes its page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import results_joint
from benchmarks.joint_page import ABLATIONS, RESULTS, Row, Setting, page
from compressor.recipe import load_recipe, shipped_recipes

SETTING = Setting(20, 200, (0, 1), 10_000, ("search.max_evaluations=60",))
ROW = Row("resnet20-pretrained", 0, 10, 0.86, 10_000, 0.497, 0.6, 96, 0.04, 3.0)


def test_every_recipe_has_its_place_on_the_page() -> None:
    names = {name.removeprefix("joint/") for name in shipped_recipes() if name.startswith("joint/")}
    assert names == set(RESULTS) | set(ABLATIONS)
    assert {baseline for _, _, baseline in RESULTS.values() if baseline} <= set(RESULTS)
    for name, (_, _, baseline) in RESULTS.items():
        if baseline:
            ours, theirs = (load_recipe(shipped_recipes()[f"joint/{each}"]) for each in (name, baseline))
            assert (ours.model, ours.weights, ours.epochs) == (theirs.model, theirs.weights, theirs.epochs)


def test_an_ablation_changes_one_thing() -> None:
    base = load_recipe(shipped_recipes()["joint/resnet20-pretrained"]).model_dump()
    for name in ABLATIONS:
        other = load_recipe(shipped_recipes()[f"joint/{name}"]).model_dump()
        assert len([field for field in base if base[field] != other[field]]) == 1, name


def test_differences_within_the_noise_say_nothing() -> None:
    rows = [
        ROW,
        replace(ROW, name="resnet20-pretrained-dense", accuracy=0.862, macs=1.0),
        replace(ROW, name="ablation-importance-taylor", accuracy=0.82),
        replace(ROW, name="ablation-ema", accuracy=0.863),
    ]
    text = page(SETTING, rows, ["paper"], "python -m benchmarks.results_joint")
    assert "not distinguishable from its baseline (-0.20 points, noise 0.98)" in text
    assert "| Taylor saliency instead of L1 norms | 82.00 | -4.00 | worse |" in text
    assert "| with an average of the weights | 86.30 | +0.30 | nothing |" in text
    assert "**Shortened**: 20 epochs where the recipes ask for 200" in text
    assert "10,000 training images only" in text
    assert "1 cell: `paper`" in text
    assert "at most 4.0%" in text


def test_seeds_widen_the_noise_where_they_differ() -> None:
    def table(*base: float) -> str:
        rows = [replace(ROW, seed=seed, accuracy=accuracy) for seed, accuracy in enumerate(base)]
        dense = [replace(row, name="resnet20-pretrained-dense", accuracy=0.88) for row in rows]
        return page(SETTING, [*rows, *dense], [], "")

    assert "86.00 ± 0.00" in table(0.86, 0.86)
    assert "worse than its baseline (-2.00 points" in table(0.86, 0.86)
    assert "not distinguishable from its baseline (-2.00 points" in table(0.84, 0.88)


def test_a_part_of_the_images(tmp_path: Path) -> None:
    for part, count in (("train", 80), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / "data" / part / name / f"{number}.jpg").write_text("")
    data, out = f"folder:{tmp_path / 'data'}", tmp_path / "out"
    folder = results_joint.fewer_images(data, 100, out)
    assert [len(list((folder / "train" / name).iterdir())) for name in ("cat", "dog")] == [50, 50]
    assert len(list((folder / "test").rglob("*.jpg"))) == 4
    again = {path.name for path in (results_joint.fewer_images(data, 100, out) / "train" / "cat").iterdir()}
    assert again == {path.name for path in (folder / "train" / "cat").iterdir()}
    with pytest.raises(SystemExit, match="needs folder:PATH with train/ and test/, got digits"):
        results_joint.main(["--data", "digits", "--train-images", "100", "--out", str(out)])


RECIPE = """
model: {model}
weights: {weights}
epochs: 200
budgets: {{flops: 60%}}
search: {{max_evaluations: 4, batch_norm_batches: 1}}
training: {{batch_size: 64}}
contract: {{repeats: 1}}
export: {{engine: false}}
"""


def test_cells_run_are_skipped_and_are_named_where_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes/joint").mkdir(parents=True)
    for name in ("resnet20-scratch", "resnet20-dense"):
        text = RECIPE.format(model="tests.nets:tiny", weights="none")
        (tmp_path / f"recipes/joint/{name}.yaml").write_text(text)
    given = RECIPE.format(model="cifar_resnet56", weights="resnet56.pt")
    (tmp_path / "recipes/joint/paper.yaml").write_text(given)
    monkeypatch.setattr(results_joint, "shipped", lambda name: tmp_path / name)
    written = tmp_path / "page.md"
    arguments = ["--data", "digits", "--epochs", "1", "--seeds", "3", "--out", str(tmp_path / "runs")]
    arguments += ["--page", str(written)]
    results_joint.main([*arguments, "--only", "resnet20-scratch"])
    text = written.read_text()
    assert "| ResNet-20 | joint, from scratch, 50 % of MACs | 1 |" in text
    assert "2 cells: `paper`, `resnet20-dense`." in text
    assert "--epochs 1 --seeds 3 --only paper resnet20-dense" in text
    assert str(tmp_path) not in text
    folder = tmp_path / "runs/1epochs/resnet20-scratch-seed3"
    before = (folder / "manifest.json").stat().st_mtime_ns
    results_joint.main(arguments)  # the weights of the third are not given: it stays missing
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    text = written.read_text()
    assert "1 cell: `paper`." in text
    assert "its baseline (" in text
    with pytest.raises(SystemExit, match="no recipe 'resnet20-scrtch'"):
        results_joint.main([*arguments, "--only", "resnet20-scrtch"])
