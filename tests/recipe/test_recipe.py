"""The recipe: what it fills in, what it refuses and how it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compressor.core.errors import CompressorError
from compressor.recipe import Recipe, find_recipe, load_recipe, parse_recipe, shipped_recipes


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = Recipe(model="resnet50", budgets={"latency": "50%"}).resolved()
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe
    assert recipe.resolved() == recipe
    assert (recipe.weights, recipe.image_size, recipe.precision, recipe.epochs) == ("none", 32, "fp32", 20)
    sources = {"digits": 2, "shapes": 3, "cifar10": 10}
    for source, batches in sources.items():
        task = "segmentation" if source == "shapes" else None
        resolved = Recipe(model="resnet18", data=source, task=task).resolved()
        assert resolved.search.batch_norm_batches == batches


def test_pretrained_weights_shorten_training() -> None:
    recipe = Recipe(model="resnet50", data="imagenet:somewhere").resolved()
    assert recipe.pretrained
    assert recipe.image_size is None  # that of the weights, which the network's library knows
    assert recipe.epochs == 30


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512_bf16 amx_bf16 avx512_fp16 amx_tile amx_int8", "bf16"),
        ("fpu avx512f avx512_bf16", "no"),
        ("fpu avx2", "no"),
        (None, "no"),
    ],
)
def test_training_is_in_bf16_where_the_cpu_has_matrix_units_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, expected: str
) -> None:
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(
            f"processor\t: 0\nmodel name\t: a CPU with amx_bf16 in its name\nflags\t\t: {flags}\n\n" * 2
        )
    monkeypatch.setattr("compressor.recipe.schema.CPU_INFO", info)
    assert Recipe(model="resnet50").resolved().training.mixed_precision == expected
    asked = Recipe(model="resnet50", training={"mixed_precision": "bf16"}).resolved()
    assert asked.training.mixed_precision == "bf16"


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe(model="resnet50")
    with pytest.raises(ValidationError):
        recipe.model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modl: resnet50", ["unknown field 'modl'", "did you mean model?", "'model' is missing"]),
        ("model: resnet50\nepochs: many", ["'epochs' is 'many'", "integer"]),
        ("model: resnet50\nbudgets: {latncy: 5ms}", ["'budgets.latncy'", "latency"]),
        ("model: resnet50\nagent: smart:Agent", ["'agent' is 'smart:Agent'", "expected what decides the widths"]),
        ("- a\n- b", ["holds a list, expected fields"]),
        ("# nothing", ["is empty, expected fields"]),
        ("model: resnet50\nimage_size: 32x", ["'image_size' is '32x': expected height and width", "224 or 96x128"]),
        ("model: resnet50\ndata: {std: 0}", ["wrong.yaml: data.std is (0.0,), expected above 0."]),
        ("model: resnet50\ndata: 3", ["'data' is 3: expected a source such as digits"]),
        ("model: resnet50\nsearch: {workers: x}", ["'search.workers' is 'x': expected processes that score", "ray://host"]),
        ("model: [", ["cannot be read as YAML"]),
        ("!!python/object/apply:os.system ['true']", ["cannot be read as YAML"]),
    ],
)
def test_a_wrong_recipe_names_file_and_field(tmp_path: Path, text: str, expected: list[str]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(CompressorError) as caught:
        load_recipe(file)
    assert "wrong.yaml" in caught.value.message
    for part in expected:
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("optimizer", "lamb", "'sgd' or 'adamw'"),
        ("accumulation", 0, "greater than 0"),
        ("grad_clip", -1, "greater than or equal to 0"),
        ("mixup", float("inf"), "finite"),
        ("cutmix", -0.1, "greater than or equal to 0"),
        ("rand_augment", 31, "less than or equal to 30"),
        ("random_erasing", 1.5, "less than or equal to 1"),
        ("label_smoothing", 1, "less than 1"),
        ("warmup_share", 1, "less than 1"),
    ],
)
def test_training_settings_that_are_refused(field: str, value: Any, said: str) -> None:
    with pytest.raises(CompressorError, match=f"'training.{field}' is {value!r}.*{said}"):
        parse_recipe({"model": "resnet50", "training": {field: value}}, "here")


def test_parts_of_a_batch_have_two_images() -> None:
    fields = {"batch_size": 4, "accumulation": 3}
    with pytest.raises(CompressorError, match=r"training\.accumulation is 3 and training\.batch_size 4"):
        parse_recipe({"model": "resnet50", "training": fields}, "here")


def test_the_optimizer_has_its_own_rates() -> None:
    sgd, adamw = (
        Recipe(model="resnet50", weights="none", training={"optimizer": name}).resolved().training
        for name in ("sgd", "adamw")
    )
    assert (sgd.learning_rate, sgd.finetune_learning_rate, sgd.weight_decay) == (0.05, 0.02, 1e-4)
    assert (adamw.learning_rate, adamw.finetune_learning_rate, adamw.weight_decay) == (0.001, 0.0001, 0.05)


@pytest.mark.parametrize("name", ["imagenet/resnet50", "imagenet/efficientnet_lite0"])
def test_the_recipes_for_imagenet_train_from_scratch(name: str) -> None:
    recipe = load_recipe(shipped_recipes()[name]).resolved()
    assert (recipe.weights, recipe.data_kind, recipe.image_size) == ("none", "imagenet", 224)
    training = recipe.training
    assert training.label_smoothing == 0.1
    assert training.rand_augment == 9
    assert training.ema_decay == 0.9999
    assert training.batch_size == 1024

@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"image_size": "96x"}, "image_size"),
        ({"pruning": {"granularity": "some"}}, "pruning.granularity"),
        ({"search": {"workers": "x"}}, "search.workers"),
    ],
)
def test_a_field_of_several_types_is_named_as_the_user_wrote_it(fields: dict[str, Any], place: str) -> None:
    """Pydantic adds the name of each type that it tried, and reports each."""
    with pytest.raises(CompressorError) as caught:
        parse_recipe({"model": "resnet18", **fields}, "here")
    assert caught.value.message.count("field ") == 1
    assert f"field {place!r} is " in caught.value.message


def test_overrides_are_merged_field_by_field() -> None:
    recipe = parse_recipe({"model": "resnet50", "training": {"batch_size": 32}}, "here")
    changed = recipe.changed({"training": {"learning_rate": 0.5}, "seed": 3})
    assert (changed.training.batch_size, changed.training.learning_rate, changed.seed) == (32, 0.5, 3)
    assert recipe.seed == 0


def test_every_field_is_described() -> None:
    schema = Recipe.model_json_schema()
    parts = schema["$defs"]
    undescribed = [
        f"{where}.{name}"
        for where, part in {"Recipe": schema, **parts}.items()
        for name, field in part["properties"].items()
        # a part whose own description says the same is described there
        if not field.get("description")
        and not parts.get(field.get("$ref", "").rpartition("/")[2], {}).get("description")
    ]
    assert undescribed == []


def test_shipped_recipes_resolve() -> None:
    recipes = shipped_recipes()
    for model in ("resnet50", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"):
        local, jetson = (
            load_recipe(recipes[model]).resolved(),
            load_recipe(recipes[f"{model}_jetson"]).resolved(),
        )
        assert (local.device, local.precision) == ("local", "fp32")
        assert (jetson.device, jetson.precision) == ("jetson-orin-nano-8gb", "fp16")
        assert local.budgets.latency


def test_the_nearest_recipes_are_named() -> None:
    assert find_recipe("resnet50").name == "resnet50.yaml"
    assert find_recipe("recipes/resnet50.yaml").name == "resnet50.yaml"
    with pytest.raises(CompressorError, match="resnet50"):
        find_recipe("resnt50")
