"""Runs whose network is compensated: what is recorded, delivered and said; and runs that train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import CompressorError, run_recipe
from compressor.data import load_data
from compressor.pruning.space import PruningSpace
from compressor.run.job import Job
from compressor.run.pipeline import resume
from compressor.search.networks import methods
from compressor.training.scoring import accuracy
from tests.nets import Tiny, trained_tiny
from tests.runs import manifest_of, recipe


class Noisy(Tiny):
    """Its outputs change from call to call, so that no replay repeats them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(x)
        return out + torch.rand_like(out)


class Mixing(Tiny):
    """Its outputs depend on the other images of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(x)
        return out + out[:1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained weights of the tiny network, as a file."""
    model = trained_tiny()
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(model.state_dict(), path)
    return path


def test_without_training_the_compensated_network_is_delivered(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.search.finalists.EVALUATIONS_EACH", 6)  # the network has few plans
    fields = {
        "agent": "knapsack", "epochs": 0, "weights": str(weights), "budgets": {"params": "50%"}, "image_size": 32,
        "search": {"max_evaluations": 12}, "pruning": {"compensation_images": 256},
    }  # fmt: skip
    result = run_recipe(recipe(**fields), out=tmp_path / "run")
    assert result.exit_code == 0
    manifest = manifest_of(tmp_path / "run")
    found, scores = manifest["compensation"], manifest["accuracy"]
    assert (found["method"], found["images"]) == ("layers", 256)
    assert found["error"] < found["error_cut"]
    assert set(found["refitted"]) | set(found["left"]) <= {layer["name"] for layer in manifest["layers"]}
    assert manifest["training"] == []
    assert scores["pruned"] + 0.02 < scores["compensated"] == scores["finetuned"] == scores["exported"]
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "refitted to the dense network&#39;s outputs layer by layer, on 256 images" in page
    assert "Accuracy, compensated" in page
    data = load_data("digits", seed=0)
    assert accuracy(result.model, data.test) == pytest.approx(scores["compensated"])
    finalists = manifest["search"]["finalists"]
    assert len(finalists) == 2
    chosen = next(each for each in finalists if each["chosen"])
    assert chosen["score"] == max(each["score"] for each in finalists)
    assert chosen["score"] == pytest.approx(accuracy(result.model, data.search))  # what was judged is delivered
    assert "The best 2 candidates were scored again, compensated as thoroughly as the delivered network" in page


def test_a_run_that_is_resumed_before_fine_tuning_delivers_the_same(weights: Path, tmp_path: Path) -> None:
    fields = {
        "agent": "uniform", "epochs": 1, "weights": str(weights), "budgets": {"params": "50%"}, "image_size": 32,
        "pruning": {"compensation_images": 64},
    }  # fmt: skip
    whole = run_recipe(recipe(**fields), out=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.run.finetuning._trained", _stop)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(**fields), out=tmp_path / "stopped")
    assert manifest_of(tmp_path / "stopped")["compensation"]["refitted"]
    again = resume(tmp_path / "stopped")
    ours, theirs = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("network", [Noisy, Mixing])
def test_a_network_that_cannot_be_replayed(network: type[Tiny]) -> None:
    space = PruningSpace(network(), torch.zeros(1, 3, 32, 32))
    found = methods(recipe(), space)
    assert (found.scored, found.delivered) == ("off", "off")
    assert found.note.startswith("Networks are not compensated. The network cannot be compensated: replaying")
    with pytest.raises(CompressorError, match="replaying") as refused:
        methods(recipe(pruning={"compensate": "layers"}), space)
    assert refused.value.hint == "Omit pruning.compensate, or set it to off."


@pytest.mark.parametrize(
    ("fields", "scored", "importance"),
    [({"epochs": 0}, "quick", "reconstruction"), ({"epochs": 2}, "off", "l1")],
    ids=["not trained", "from scratch"],
)
def test_candidates_are_compensated_and_ranked_for_it(fields: dict[str, Any], scored: str, importance: str) -> None:
    job = Job.prepare(recipe(**fields, budgets={"params": "50%"}).resolved())
    assert (job.compensation.scored, job.compensation.delivered) == (scored, "layers")
    assert job.recipe.pruning.importance == importance


def test_nothing_is_trained_only_with_weights() -> None:
    with pytest.raises(CompressorError, match=r"With 0 epochs nothing is trained, and cifar_resnet20 has no weights"):
        Job.prepare(recipe(model="cifar_resnet20", epochs=0).resolved())
