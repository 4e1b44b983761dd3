"""What a latency is of, in words, and as a manifest records it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from compressor.core.conditions import UNLOADED, Conditions
from compressor.core.manifest import Manifest
from compressor.recipe import Recipe


@pytest.mark.parametrize(
    ("conditions", "title"),
    [
        (UNLOADED, "latency"),
        (Conditions(8), "latency of a batch of 8"),
        (Conditions(percentile=99), "latency (p99 of single runs)"),
        (Conditions(8, 97.5, 2), "latency of a batch of 8 (p97.5 of single runs, 2 networks at once)"),
    ],
)
def test_a_latency_says_what_it_is_of(conditions: Conditions, title: str) -> None:
    assert conditions.title == title


def test_a_manifest_has_the_conditions_of_its_measurement_or_of_its_recipe() -> None:
    assert Manifest.tolerant({}).conditions == UNLOADED
    asked = {"batch": 8, "percentile": 99.0, "streams": 2}
    assert Manifest.tolerant({"recipe": asked}).conditions == Conditions(8, 99, 2)
    measured = {"batch": 4, "percentile": 50}  # of a version without streams
    assert Manifest.tolerant({"recipe": {"batch": 8}, "latency": measured}).conditions == Conditions(4)
    assert Manifest.tolerant({"recipe": {"batch": "many", "streams": -1}}).conditions == UNLOADED


@pytest.mark.parametrize(("field", "value"), [("batch", 0), ("streams", 0), ("percentile", 100), ("percentile", 10)])
def test_impossible_conditions_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValidationError, match=field):
        Recipe.model_validate({"model": "resnet18", field: value})
