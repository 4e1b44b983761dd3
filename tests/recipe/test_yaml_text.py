"""YAML as recipes and `--set` are read: no surprises of its version 1.1, and nothing without bounds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.cli.flags import with_settings
from compressor.core.errors import CompressorError
from compressor.recipe import Recipe, load_recipe, parse_recipe
from compressor.recipe.yaml_text import read_yaml, write_yaml

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("Off", "Off"), ("yes", "yes"), ("2024-99-99", "2024-99-99"), ("1:30", "1:30"), ("010", 10),
        ("1_000", "1_000"), ("0x10", "0x10"), ("1e-4", 1e-4), ("1.5", 1.5), ("-3", -3), ("true", True), ("~", None),
        ("", None), ("'5'", "5"), ("{a: [1, b]}", {"a": [1, "b"]}), ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
    ],
)  # fmt: skip
def test_values(text: str, value: object) -> None:
    read = read_yaml(text, "It")
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9" * 5000, "an integer of 5,000 digits"),
        ("[" * 3000, "more than 32 levels"),
        ("- " * 3000, "more than 32 levels"),
        ("{a: " * 3000, "more than 32 levels"),
        ("[" + "a," * 20_000 + "]", "more than 10,000 values"),
        (BOMB, r"more than 10,000 values, counting aliases \(line 5"),
        ("&a [*a]", "an alias within what it names"),
        ("a: 1\n" * 100_000, "at most 262,144 are read"),
        ("{a: 1, a: 2}", "'a' is given twice"),
        ("!!timestamp 2024-99-99", "could not determine a constructor"),
        ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("!!int abc", "'abc' is no int"),
        ("!!bool maybe", "'maybe' is no bool"),
        ('"\\0"', "NUL"),
        ("a\0b", "special characters are not allowed"),
        ("[a", r"expected ',' or ']'.*line 1.* quotes"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    begun = time.process_time()
    with pytest.raises(CompressorError, match=f"It cannot be read as YAML: .*{message}|It has .*{message}"):
        read_yaml(text, "It")
    assert time.process_time() - begun < 20  # most take a millisecond


def test_what_is_written_is_read_back_by_any_reader() -> None:
    fields: dict[str, Any] = {
        "a": "no", "b": "1e-4", "c": "2024-01-01", "d": 1e-5, "e": 1, "f": None, "g": True, "h": "true", "i": "",
        "j": "0x10", "k": "1_000", "l": [1, "é"], "m": "<<", "n": float("inf"), "o": "12:30", "p": 1e22,
        "q": "010", "r": "off",
    }  # fmt: skip
    text = write_yaml(fields)
    assert read_yaml(text, "It") == yaml.safe_load(text) == fields


def test_settings_are_what_they_seem() -> None:
    given = with_settings(
        {}, ["training.mixed_precision=no", "seed=7", "training.learning_rate=1e-4", "export.engine=no"]
    )
    recipe = parse_recipe({"model": "resnet50", **given}, "here")
    assert (recipe.training.mixed_precision, recipe.training.learning_rate) == ("no", 1e-4)
    assert (recipe.seed, recipe.export.engine) == (7, False)
    for wrong in (
        "seed=2024-99-99",
        "seed=" + "9" * 5000,
        "epochs=0x10",
        "seed=" + "[" * 3000,
        "budgets.latency=5",
    ):
        with pytest.raises(CompressorError) as caught:
            parse_recipe({"model": "resnet50", **with_settings({}, [wrong])}, "here")
        assert len(str(caught.value)) < 2000
    for wrong in ("=1", "a..b=1", ".a=1", "a" + ".a" * 3000 + "=1", "a"):
        with pytest.raises(CompressorError, match="expected FIELD=VALUE"):
            with_settings({}, [wrong])


def test_recipes_of_former_versions(tmp_path: Path) -> None:
    recipe = Recipe(
        model="resnet50", budgets={"latency": "50%"}, training={"mixed_precision": "no"}
    ).resolved()
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    assert load_recipe(file) == recipe
