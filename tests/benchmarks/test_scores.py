"""The page of the study of candidates' scores, from outputs that are made up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import scores


def plans(number: int) -> list[dict[str, object]]:
    """Return plans that are further from the dense network, and less accurate, one after the other."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(600, 10, generator=generator).log_softmax(dim=1)
    change = torch.randn(600, 10, generator=generator)
    labels = dense.argmax(dim=1)
    return [
        {
            "quick": (dense + (number - place) * change).log_softmax(dim=1),  # the wrong order
            "layers": (dense + place * change).log_softmax(dim=1),
            "test": 0.9 - 0.1 * place,
            "dense": dense,
            "labels": labels,
        }
        for place in range(number)
    ]


def test_scores_are_ranked_by_the_accuracy() -> None:
    table, spread = scores.section(plans(5), 5)
    head, _, *rows = table.splitlines()
    assert head == "| score | as candidates, 500 | as candidates, 600 | as delivered, 500 | as delivered, 600 |"
    assert {row.partition(" | ")[2] for row in rows} == {"-1.00 | -1.00 | 1.00 | 1.00 |"}
    assert spread == "5 plans; test accuracies from 50.0 to 90.0 %, with a standard deviation of 15.81 points."


def test_missing_plans_are_said() -> None:
    assert scores.section(plans(5), 32)[-1].startswith("27 of 32 plans are missing")
    assert scores.section(plans(3), 32) == ["29 of 32 plans are missing; the same command builds them."]


@pytest.mark.parametrize("option", ["--only=*", "--list", "--results=lines.jsonl", "--epochs=2"])
def test_options_without_effect_are_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights.pt"
    weights.touch()
    with pytest.raises(SystemExit):
        scores.parsed(["--data", "digits", "--weights", f"cifar_resnet20={weights}", option])
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err
