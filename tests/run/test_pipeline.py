"""Whole runs on small networks: what they leave, and how they resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from compressor import load, run_recipe
from compressor.core.files import sha256_file
from compressor.run.pipeline import resume
from tests.forked import command, forked
from tests.runs import FAST, IMAGE_SIZE, manifest_of, recipe


def test_a_run_leaves_what_the_readme_lists(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    expected = {
        "recipe.yaml",
        "manifest.json",
        "channels.json",
        "model.safetensors",
        "model.onnx",
        "answers.json",
        "report.html",
    }
    assert expected <= names
    manifest = manifest_of(finished)
    for name, checksum in manifest["files"].items():
        assert sha256_file(finished / name) == checksum
    assert set(manifest["files"]) >= expected - {"manifest.json"}
    assert all(stage["finished"] for stage in manifest["stages"].values())
    assert manifest["status"] == "finished"


def test_every_budget_is_kept_as_counted_on_the_slim_network(finished: Path) -> None:
    manifest = manifest_of(finished)
    slim = load(finished, factory=manifest["model"])
    budgets = {entry["name"]: entry for entry in manifest["budgets"]}
    params = sum(parameter.numel() for parameter in slim.parameters())
    assert budgets["params"]["measured"] == params <= 0.7 * budgets["params"]["dense"]
    assert budgets["macs"]["measured"] <= 0.6 * budgets["macs"]["dense"]
    assert all(entry["kept"] for entry in manifest["budgets"])


def test_the_onnx_file_computes_what_the_slim_network_does(finished: Path) -> None:
    import onnxruntime

    manifest = manifest_of(finished)
    slim = load(finished, factory=manifest["model"])
    images = np.random.default_rng(0).normal(size=(4, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    session = onnxruntime.InferenceSession(finished / "model.onnx", providers=["CPUExecutionProvider"])
    outputs = np.concatenate([session.run(None, {"input": image[None]})[0] for image in images])
    with torch.no_grad():
        expected = slim(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(outputs, expected, atol=1e-4)
    assert manifest["parity"]["max_abs"] <= 1e-4
    accuracy = manifest["accuracy"]
    assert accuracy["exported"] == pytest.approx(accuracy["finetuned"], abs=0.003)


def test_the_slim_network_is_checked_by_torch_pruning_and_fvcore(finished: Path) -> None:
    from compressor.report import checks

    manifest = manifest_of(finished)
    macs = manifest["cost"]["slim"]["macs"]
    assert manifest["checks"]["torch_pruning"]["confirmed"] is True
    assert manifest["checks"]["torch_pruning"]["words"].startswith("confirmed by torch-pruning: ")
    assert manifest["checks"]["fvcore"]["confirmed"] is True
    assert manifest["checks"]["fvcore"]["words"].startswith(f"confirmed by fvcore: {macs:,} multiply-adds")
    page = (finished / "report.html").read_text()
    assert all(line in page for line in checks(manifest))
    for of in ("dense", "slim"):
        listed = sum(row[f"{of}_macs"] for row in [*manifest["layers"], *manifest["other_macs"]])
        assert listed == manifest["cost"][of]["macs"]


def test_nothing_is_exported_where_a_check_contradicts_the_network(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor.pruning import checks

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "model.onnx").unlink()
    manifest = manifest_of(run)
    for stage in ("export", "measure", "report"):
        del manifest["stages"][stage]
    (run / "manifest.json").write_text(json.dumps(manifest))
    right = checks.count_macs
    monkeypatch.setattr(checks, "count_macs", lambda *given: (right(*given)[0] + 1, *right(*given)[1:]))
    with pytest.raises(
        checks.Disagreement, match=r"fvcore counts [\d,]+ multiply-adds of the slim network"
    ) as caught:
        resume(run)
    assert caught.value.exit_code == 1
    assert not (run / "model.onnx").exists()
    assert (run / "model.safetensors").exists()


def test_episodes_are_logged_with_costs_within_the_budgets(finished: Path) -> None:
    manifest = manifest_of(finished)
    targets = {entry["name"]: entry["target"] for entry in manifest["budgets"]}
    episodes = [json.loads(line) for line in (finished / "search/episodes.jsonl").read_text().splitlines()]
    assert len(episodes) == manifest["search"]["episodes"]
    assert 0 < manifest["search"]["evaluations"] <= FAST["max_evaluations"]
    for episode in episodes:
        assert all(episode["costs"][name] <= target for name, target in targets.items())


def test_the_candidate_that_is_delivered_is_marked(finished: Path) -> None:
    manifest = manifest_of(finished)
    log = [json.loads(line) for line in (finished / "search/episodes.jsonl").read_text().splitlines()]
    places = [place for place, each in enumerate(manifest["search"]["candidates"]) if each.get("chosen")]
    assert len(places) == 1
    delivered = [group["kept"] for group in manifest["groups"]]
    assert log[places[0]]["widths"] == delivered
    assert delivered not in [each["widths"] for each in log[places[0] + 1 :]]


def test_a_finished_run_resumes_to_itself(finished: Path) -> None:
    before = manifest_of(finished)
    again = resume(finished)
    assert again.exit_code == 0
    assert again.manifest["groups"] == before["groups"]
    assert again.manifest["accuracy"] == before["accuracy"]


@pytest.mark.parametrize("agent", ["uniform", "random"])
def test_other_agents_run_the_same_road(tmp_path: Path, agent: str) -> None:
    result = run_recipe(
        recipe(agent=agent, budgets={"flops": "60%"}), out=tmp_path / "run"
    )
    assert result.exit_code == 0
    assert result.manifest["budgets"][0]["kept"]
    assert result.manifest["engine_note"] == "The recipe asks for none."
    assert "uniform" in {each["source"] for each in result.manifest["search"]["candidates"]}
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert ("of uniform pruning within the same budgets" in page) == (agent == "random")


def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(finished: Path, tmp_path: Path) -> None:
    folder, errors = tmp_path / "run", tmp_path / "errors"
    start = [
        "--model", "tests.nets:tiny", "--epochs", "3", "--flops", "60%", "--params", "70%", "--out", str(folder),
        "--set", f"image_size={IMAGE_SIZE}", "--set", "search.max_evaluations=6",
        "--set", "search.batch_norm_batches=2", "--set", "contract.repeats=1", "--set", "training.batch_size=64",
        "--set", "search.settings.updates_per_episode=1", "--set", "pruning.compensation_images=64",
    ]  # fmt: skip
    # Each kill waits for another stage to leave its mark, so that all stages are met whatever the machine's speed.
    marks = ["checkpoints/search.pt", "search/plan.json", "checkpoints/finetune.pt", "model.onnx"]
    for turn, mark in enumerate(marks):
        process = forked(command, start if turn == 0 else ["--resume", str(folder)], errors, {})
        process.start()
        deadline = time.monotonic() + 120
        while not (folder / mark).exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        gently = {1: signal.SIGINT, 2: signal.SIGTERM}.get(turn)  # these must end with a message
        with suppress(ProcessLookupError):
            os.kill(cast(int, process.pid), gently or signal.SIGKILL)
        process.join()
        assert (folder / "recipe.yaml").exists()
        if gently and process.exitcode != 0:  # it may have been too fast for us
            said = errors.read_text()
            assert process.exitcode == 128 + gently
            assert f"continue with: compress --resume {folder}" in said
            assert "Traceback" not in said
    last = forked(command, ["--resume", str(folder)], errors, {})
    last.start()
    last.join()
    assert last.exitcode == 0, errors.read_text()
    disturbed, undisturbed = manifest_of(folder), manifest_of(finished)
    assert disturbed["groups"] == undisturbed["groups"]
    assert disturbed["accuracy"] == undisturbed["accuracy"]
    for name in ("model.safetensors", "channels.json", "answers.json"):
        assert sha256_file(folder / name) == sha256_file(finished / name)
