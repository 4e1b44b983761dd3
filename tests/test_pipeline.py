"""Whole runs on small networks: what they leave, how they resume, and how the contract closes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor import Recipe, compress, load
from compressor.errors import CompressorError
from compressor.latency.local import local_table
from compressor.latency.ort_profile import tag
from compressor.pipeline import resume
from compressor.run_dir import sha256_file
from export.stats import LatencyStats, summarise
from tests.latency.conftest import MadeUpDevice

FAST = {"max_evaluations": 6, "batch_norm_batches": 2}


def recipe(**fields: Any) -> Recipe:
    base = {"model": "tests.nets:tiny", "epochs": 3, "search": FAST, "contract": {"repeats": 1}}
    return Recipe.model_validate({**base, **fields})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run within two counted budgets."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = compress(recipe(budgets={"flops": "60%", "params": "70%"}), out=folder)
    assert result.exit_code == 0
    return folder


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def test_a_run_leaves_what_the_readme_lists(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    expected = {
        "recipe.yaml",
        "manifest.json",
        "channels.json",
        "model.safetensors",
        "model.onnx",
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
    manifest, slim = manifest_of(finished), load(finished)
    budgets = {entry["name"]: entry for entry in manifest["budgets"]}
    params = sum(parameter.numel() for parameter in slim.parameters())
    assert budgets["params"]["measured"] == params <= 0.7 * budgets["params"]["dense"]
    assert budgets["macs"]["measured"] <= 0.6 * budgets["macs"]["dense"]
    assert all(entry["kept"] for entry in manifest["budgets"])


def test_the_onnx_file_computes_what_the_slim_network_does(finished: Path) -> None:
    import onnxruntime

    manifest, slim = manifest_of(finished), load(finished)
    images = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    session = onnxruntime.InferenceSession(finished / "model.onnx", providers=["CPUExecutionProvider"])
    outputs = np.concatenate([session.run(None, {"input": image[None]})[0] for image in images])
    with torch.no_grad():
        expected = slim(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(outputs, expected, atol=1e-4)
    assert manifest["parity"]["max_abs"] <= 1e-4
    accuracy = manifest["accuracy"]
    assert accuracy["exported"] == pytest.approx(accuracy["finetuned"], abs=0.003)


def test_episodes_are_logged_with_costs_within_the_budgets(finished: Path) -> None:
    manifest = manifest_of(finished)
    targets = {entry["name"]: entry["target"] for entry in manifest["budgets"]}
    episodes = [json.loads(line) for line in (finished / "search/episodes.jsonl").read_text().splitlines()]
    assert len(episodes) == manifest["search"]["episodes"]
    assert 0 < manifest["search"]["evaluations"] <= FAST["max_evaluations"]
    for episode in episodes:
        assert all(episode["costs"][name] <= target for name, target in targets.items())


def test_a_finished_run_resumes_to_itself(finished: Path) -> None:
    before = manifest_of(finished)
    again = resume(finished)
    assert again.exit_code == 0
    assert again.manifest["groups"] == before["groups"]
    assert again.manifest["accuracy"] == before["accuracy"]


@pytest.mark.parametrize("agent", ["uniform", "random"])
def test_other_agents_run_the_same_road(tmp_path: Path, agent: str) -> None:
    result = compress(
        recipe(agent=agent, budgets={"flops": "60%"}, export={"engine": False}), out=tmp_path / "run"
    )
    assert result.exit_code == 0
    assert result.manifest["budgets"][0]["kept"]
    assert result.manifest["engine_note"] == "The recipe asks for none."


def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", "from compressor.cli import main; main()"]
    start = [
        *command, "--model", "tests.nets:tiny", "--epochs", "3", "--flops", "60%", "--params", "70%",
        "--out", str(folder),
        "--set", "search.max_evaluations=6", "--set", "search.batch_norm_batches=2", "--set", "contract.repeats=1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    # Each kill waits for another stage to leave its mark, so that all stages are met whatever the machine's speed.
    marks = ["checkpoints/search.pt", "search/plan.json", "checkpoints/finetune.pt", "model.onnx"]
    for turn, mark in enumerate(marks):
        arguments = start if turn == 0 else [*command, "--resume", str(folder)]
        process = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while not (folder / mark).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        gently = turn == 1  # once as with Ctrl-C, which must end with a message
        process.send_signal(signal.SIGINT if gently else signal.SIGKILL)
        _, errors = process.communicate()
        assert (folder / "recipe.yaml").exists()
        if gently and process.returncode != 0:  # it may have been too fast for us
            assert process.returncode == 2
            assert "Go on with: compress --resume" in errors
            assert "Traceback" not in errors
    last = subprocess.run(
        [*command, "--resume", str(folder)], env=environment, capture_output=True, text=True
    )
    assert last.returncode == 0, last.stderr
    disturbed, undisturbed = manifest_of(folder), manifest_of(finished)
    assert disturbed["groups"] == undisturbed["groups"]
    assert disturbed["accuracy"] == undisturbed["accuracy"]
    for name in ("model.safetensors", "channels.json"):
        assert sha256_file(folder / name) == sha256_file(finished / name)


class Proportional(MadeUpDevice):
    """Time grows with the weights, channel by channel, so that a small network has something to choose from."""

    def rule(self, shape: tuple[int, ...]) -> float:
        return float(0.002 + 1e-5 * np.prod(shape))


@dataclass
class OtherDevice:
    """Takes the place of this machine: the table is made on a made-up device, the contract measured on a slower one."""

    factor: float
    noise: float = 0.0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "compressor.latency.local.local_table", partial(local_table, device=Proportional())
        )
        monkeypatch.setattr("compressor.timing.measured", self.measured)

    def measured(
        self, dense: Path, slim: Path, threads: int, repeats: int
    ) -> tuple[LatencyStats, LatencyStats]:
        device = Proportional(factor=self.factor, noise=self.noise)
        times = [device.measure(tag(path), 1.0).whole_ms.tolist() for path in (dense, slim)]
        first, second = (summarise(each, runtime="made up", version="1", threads=threads) for each in times)
        return first, second


FINE = {"granularity": 4, "min_share": 0.1}


@pytest.fixture(scope="module")
def by_table(finished: Path) -> float:
    """What the made-up device's table says that the dense network takes, in milliseconds."""
    return Proportional().measure(tag(finished / "checkpoints/dense.onnx"), 1.0).median_ms


@pytest.mark.parametrize(("factor", "noise"), [(1.5, 0.0), (1.0, 0.2)])
def test_a_slower_or_noisy_device_tightens_the_search_until_it_measures_the_target(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, noise: float
) -> None:
    OtherDevice(factor, noise).install(monkeypatch)
    wanted = recipe(budgets={"latency": f"{0.8 * by_table}ms"}, pruning=FINE)
    result = compress(wanted, out=tmp_path / "run")
    rounds = result.manifest["rounds"]
    assert rounds[-1]["kept"]
    assert result.exit_code == 0
    budget = result.manifest["budgets"][0]
    assert budget["measured"] <= budget["target"]
    if not noise:
        assert not rounds[0]["kept"]
        assert rounds[0]["measured_ms"] > 1.05 * rounds[0]["predicted_ms"]
        assert rounds[-1]["measured_ms"] == pytest.approx(rounds[-1]["predicted_ms"], rel=0.1)
        assert rounds[-1]["measured_ms"] < rounds[0]["measured_ms"]


def test_a_share_is_of_the_dense_network_at_the_same_time(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that others slow down, or no longer do, since its table was made; milliseconds stay what they are."""
    OtherDevice(1.5).install(monkeypatch)
    manifest = compress(recipe(budgets={"latency": "60%"}, pruning=FINE), out=tmp_path / "run").manifest
    (budget,) = manifest["budgets"]
    assert manifest["exit_code"] == 0
    assert budget["dense"] == manifest["latency"]["dense_ms"] == pytest.approx(1.5 * by_table, rel=0.01)
    assert budget["target"] == pytest.approx(0.6 * budget["dense"])
    assert 0.9 * budget["target"] < budget["measured"] <= budget["target"]
    assert budget["measured"] == manifest["latency"]["measured_ms"]
    assert budget["predicted"] == pytest.approx(budget["measured"], rel=0.1)
    assert manifest["latency"]["predicted_ms"] == pytest.approx(budget["predicted"])
    assert all(
        row["kept"] and row["target_ms"] == pytest.approx(budget["target"]) for row in manifest["rounds"]
    )


def test_a_correction_survives_a_stop_once(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OtherDevice(1.5).install(monkeypatch)
    wanted = recipe(budgets={"latency": f"{0.8 * by_table}ms"}, pruning=FINE)
    undisturbed = compress(wanted, out=tmp_path / "one").manifest
    said = []

    def stop_after_the_refit(text: str) -> None:
        said.append(text)
        if "refitted" in text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("compressor.stages.say", stop_after_the_refit)
        with pytest.raises(KeyboardInterrupt):
            compress(wanted, out=tmp_path / "two")
    disturbed = resume(tmp_path / "two").manifest
    assert said
    for name in ("rounds", "corrections", "groups", "accuracy"):
        assert disturbed[name] == undisturbed[name]


def test_a_device_that_cannot_reach_the_target_ends_with_3_and_everything_written(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OtherDevice(50.0).install(monkeypatch)
    result = compress(
        recipe(budgets={"latency": f"{0.8 * by_table}ms"}, agent="uniform", pruning=FINE),
        out=tmp_path / "run",
    )
    assert result.exit_code == 3
    budget = result.manifest["budgets"][0]
    assert budget["kept"] is False
    assert budget["measured"] > budget["target"]
    for name in ("model.onnx", "model.safetensors", "report.html"):
        assert (tmp_path / "run" / name).exists()


def test_a_budget_that_is_met_already_prunes_nothing(tmp_path: Path) -> None:
    result = compress(recipe(budgets={"latency": "10s"}), out=tmp_path / "run")
    assert result.exit_code == 0
    assert all(group["kept"] == group["width"] for group in result.manifest["groups"])
    assert any("nothing was pruned" in note for note in result.manifest["notes"])


def test_latency_that_is_left_unused_sends_the_search_on_twice_at_most(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OtherDevice(0.85).install(monkeypatch)  # faster than its table
    result = compress(recipe(budgets={"latency": f"{0.6 * by_table}ms"}, pruning=FINE), out=tmp_path / "run")
    first, *after, probed, last = result.manifest["rounds"]
    assert first["kept"]
    assert first["measured_ms"] < 0.92 * first["target_ms"]
    assert len(after) <= 1
    assert all(later["measured_ms"] > 1.05 * first["measured_ms"] for later in (*after, probed))
    assert last["kept"]
    assert result.exit_code == 0
    assert 0.92 * last["target_ms"] < last["measured_ms"] <= last["target_ms"]
    kept = [group["kept"] for group in result.manifest["groups"]]
    assert kept == list(probed["widths"])


def test_a_plan_that_keeps_the_target_is_not_lost_to_a_later_one_that_misses_it(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = OtherDevice(0.85)
    device.install(monkeypatch)
    first_ms: list[float] = []

    def moody(dense: Path, slim: Path, threads: int, repeats: int) -> tuple[LatencyStats, LatencyStats]:
        """Twice the time for every plan that is larger than the first."""
        whole, small = device.measured(dense, slim, threads, repeats)
        first_ms.append(small.median_ms)
        if small.median_ms > 1.03 * first_ms[0]:
            small = summarise([2 * small.median_ms] * 9, runtime="made up", version="1", threads=threads)
        return whole, small

    monkeypatch.setattr("compressor.timing.measured", moody)
    contract = {"repeats": 1, "max_rounds": 3}
    result = compress(
        recipe(budgets={"latency": f"{0.6 * by_table}ms"}, pruning=FINE, contract=contract),
        out=tmp_path / "run",
    )
    rounds = result.manifest["rounds"]
    assert rounds[0]["kept"]
    assert not rounds[1]["kept"]
    assert rounds[-1]["kept"]
    assert result.exit_code == 0
    assert [group["kept"] for group in result.manifest["groups"]] == rounds[-1]["widths"]


def test_a_finished_run_is_not_searched_again(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OtherDevice(1.0).install(monkeypatch)
    folder = compress(
        recipe(budgets={"latency": f"{0.8 * by_table}ms"}, pruning=FINE), out=tmp_path / "run"
    ).directory
    manifest = manifest_of(folder)
    last = manifest["rounds"][-1]
    last |= {"kept": True, "measured_ms": 0.9 * last["target_ms"], "predicted_ms": 0.97 * last["target_ms"]}
    manifest |= {"rounds": [last], "corrections": []}  # as if the last measurement had left latency unused
    (folder / "manifest.json").write_text(json.dumps(manifest))
    again = resume(folder).manifest
    assert again["rounds"] == [last]
    assert again["corrections"] == []
    assert again["stages"]["search"] == manifest["stages"]["search"]


def test_a_run_goes_on_only_with_the_runtime_of_its_table(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OtherDevice(1.0).install(monkeypatch)
    folder = compress(
        recipe(budgets={"latency": f"{0.8 * by_table}ms"}, pruning=FINE), out=tmp_path / "run"
    ).directory
    manifest = manifest_of(folder)
    monkeypatch.setattr("onnxruntime.__version__", "0.0.1")
    assert resume(folder).exit_code == 0  # nothing is left to measure
    manifest["stages"]["measure"]["finished"] = None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CompressorError, match=r"measured elsewhere: onnxruntime-cpu .*this is .* 0\.0\.1"):
        resume(folder)
