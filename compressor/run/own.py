"""The whole job with a user's own network, data and metric."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.core.metrics import PYTHON
from compressor.core.records import RECIPE
from compressor.recipe import Recipe
from compressor.recipe.validation import merged, validated
from compressor.run.load import BY_CLASS, Loaded
from compressor.run.own_checks import Checked, Objects, one_input
from compressor.run.pipeline import continued, started
from compressor.run.result import RunResult

if TYPE_CHECKING:
    from torch import Tensor, nn

_OWN_FIELDS = ("model", "data", "image_size")


def compress(
    model: nn.Module,
    example_input: Any,
    *,
    train: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    test: Callable[[nn.Module], float] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    calibration: Iterable[Any] | None = None,
    latency: str | Sequence[str] | None = None,
    flops: str | Sequence[str] | None = None,
    params: str | Sequence[str] | None = None,
    memory: str | Sequence[str] | None = None,
    max_drop: float | None = None,
    device: str = "local",
    agent: str = "joint",
    epochs: int | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    resume: bool = False,
    **fields: Any,
) -> RunResult:
    """Compress a network until it meets its budgets on a device, with the caller's own data and metric.

    Folder, stages, contract and report are those of the command line. Without `evaluate` candidates are compared with
    the dense network's outputs on `calibration`, or on inputs of `train`. Without `train` there are no labels:
    fine-tuning is distillation alone. docs/guide/own-network.md has a complete example.

    Args:
        model: Any network, with trained weights (`weights="none"` says that they are not); it is never changed.
        example_input: A tensor, a tuple of positional arguments, or a dictionary; a batch is reduced to one input.
        train: Batches to train on, of any structure, which can be iterated again and again: a list or a DataLoader.
        evaluate: Scores candidates of the search: called with a network in eval mode, returns a number; higher is
            better.
        test: As `evaluate`, and only reported; without it `evaluate` is.
        loss: Called with a network and a batch of `train`, returns a scalar; by default the cross-entropy of a batch of
            (inputs, labels).
        calibration: Batches that are the network's inputs or begin with them, such as `[pictures]` for one tensor of
            pictures; by default inputs of `train`. Without it and `evaluate`, up to two fifths of `train` are not
            trained on: they choose and judge networks. What cannot be divided (no list, no plain DataLoader) is trained
            on and judges as well; `accuracy.split` in the manifest is then "training".
        latency, flops, params, memory: Budgets, as on the command line: "5ms", "50%", "0.5x", "2G". Several limits,
            "70%,50%" or a list, are for as many networks: the result then has `runs`.
        max_drop: The other way round: the fastest network that loses at most these points; the result has `chosen`.
        device, agent: As on the command line.
        epochs: Passes over `train` (or `calibration`), search and fine-tuning together; 0 trains nothing. By default
            20, 60 for untrained weights, or 0 without both.
        out: Folder of the run, new or empty; None for a new one under `runs/`.
        seed: Seed of all random numbers; loaders and functions find the global generators seeded.
        resume: Whether to continue the run in `out` with the same objects; it begins if it is not there yet.
        fields: Further fields of the recipe, such as `search={"max_evaluations": 20}`.

    Raises:
        CompressorError: Something is missing or does not fit; nothing was measured.
    """
    _check_kinds(model, train=train, calibration=calibration, evaluate=evaluate, test=test, loss=loss)
    for name in _OWN_FIELDS:
        if name in fields:
            raise CompressorError(f"{name} is no field of a run with an own network.", "Leave it out.")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    objects = Objects(model, example_input, train, evaluate, test, loss, calibration)
    wanted = _fields(
        objects,
        {
            "budgets": {
                "latency": latency,
                "flops": flops,
                "params": params,
                "memory": memory,
                "max_drop": max_drop,
            },
            "device": device,
            "agent": agent,
            "epochs": epochs,
            "seed": seed,
        },
        fields,
    )
    loader = partial(_load, objects)
    folder = None if out is None else Path(out)
    if resume and folder is None:
        raise CompressorError("A run that is resumed needs its folder.", "Give it as out=...")
    if resume and folder is not None and (folder / RECIPE).exists():
        return continued(folder, wanted, loader)
    return started(validated(Recipe, wanted, "compress"), folder, loader)


def _check_kinds(model: Any, **given: Any) -> None:
    """Refuse arguments of the wrong kind.

    Raises:
        CompressorError: Names the first one.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise CompressorError(
            f"model is a {type(model).__name__}, expected a torch.nn.Module.",
            "For a network by name: compressor.run_recipe(Recipe(model=...)).",
        )
    for name in ("evaluate", "test", "loss"):
        if given[name] is not None and not callable(given[name]):
            raise CompressorError(f"{name} is a {type(given[name]).__name__}, expected a function.")
    for name in ("train", "calibration"):
        batches = given[name]
        if batches is None:
            continue
        if not isinstance(batches, Iterable) or isinstance(batches, str | bytes | Mapping):
            raise CompressorError(
                f"{name} is a {type(batches).__name__}, expected batches.", "Pass a list of batches or a DataLoader."
            )
        if isinstance(batches, Iterator):
            raise CompressorError(
                f"{name} can be read only once: it is a {type(batches).__name__}.",
                "Pass what can be iterated again and again: a list, a DataLoader, or an object with __iter__.",
            )
    if given["loss"] is not None and given["train"] is None:
        raise CompressorError("loss is given without train.", "Pass the batches to train on as train=...")


def _fields(objects: Objects, usual: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the recipe.

    Raises:
        CompressorError: They ask for training that is impossible.
    """
    fields = merged(usual, more)
    if fields["epochs"] is None:
        if objects.train is None and objects.calibration is None:
            fields["epochs"] = 0
        else:
            del fields["epochs"]
    fields["model"], fields["data"] = f"{PYTHON}:{type(objects.model).__name__}", {"source": PYTHON}
    if fields.setdefault("weights", "given") not in ("given", "none"):
        raise CompressorError(
            f"weights is {fields['weights']!r}: the network comes with its own.",
            "Leave it out, or give weights='none' if they are not trained.",
        )
    if fields["weights"] == "given":
        fields["weights"] = f"given:{_fingerprint(objects.model)}"
    if fields.get("search", {}).get("measure", "auto") != "auto":
        raise CompressorError(
            "search.measure is for images by class.",
            "Leave it out: evaluate scores candidates, or their closeness to the dense network.",
        )
    for name in (*BY_CLASS, "label_smoothing"):
        if fields.get("training", {}).get(name):
            raise CompressorError(
                f"training.{name} is for images by class.", "Leave it out: batches and loss are your own here."
            )
    if objects.train is None:
        _check_untrained(objects, fields)
        fields["search"] = {**fields.get("search", {}), "epochs_share": 0.0}
    return fields


def _check_untrained(objects: Objects, fields: Mapping[str, Any]) -> None:
    """Refuse fields that need labels where there are none."""
    search, training = fields.get("search", {}), fields.get("training", {})
    if fields["weights"] == "none":
        raise CompressorError("Untrained weights need batches to train on.", "Pass train=...")
    if fields.get("epochs", 1) and objects.calibration is None:
        raise CompressorError(
            f"epochs is {fields['epochs']}, and there is nothing to train on.",
            "Pass train=... (and loss=...), or calibration=... for distillation without labels; or epochs=0.",
        )
    for problem, name in (
        (search.get("epochs_share"), "search.epochs_share"),
        (search.get("brief_iterations"), "search.brief_iterations"),
        (fields.get("epochs", 1) and training.get("distill_weight", 1) == 0, "training.distill_weight"),
    ):
        if problem:
            raise CompressorError(
                f"{name} trains with labels, and there are none.", "Leave it out, or pass train=..."
            )


def _load(objects: Objects, recipe: Recipe) -> Loaded:
    """Check the objects, and return them as a run needs them.

    Raises:
        CompressorError: Something does not fit.
    """
    import torch

    from compressor.pruning.space import fixed_copy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = fixed_copy(objects.model).cpu()
    example, names = one_input(model, objects.example)
    task, notes = Checked(objects, fixed_copy(model).to(device).eval(), example, names, recipe).task()
    if recipe.search.workers not in (None, 1, "1"):
        raise CompressorError(
            "Own functions and batches are not sent to other processes.", "Leave out search.workers."
        )
    return Loaded(
        recipe=recipe,
        task=task,
        model=model.train(),
        builder=partial(fixed_copy, model),
        notes=tuple(notes),
    )


def _fingerprint(model: nn.Module) -> str:
    """Return a short checksum of a network's tensors, so that a run is resumed with the same one."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if hasattr(tensor, "detach"):
            found.update(f"{name}{tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(-1).float().numpy().tobytes())
    return found.hexdigest()[:12]
