"""The recipe's training settings on their way to the training, and runs that are killed within an epoch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressor import CompressorError, Recipe, compress, run_recipe
from compressor.run.folder import RunFolder
from compressor.run.load import load
from compressor.run.pipeline import resume
from compressor.run.trainings import train_settings
from compressor.training import within
from compressor.training.loop import Trainer
from tests.nets import tiny
from tests.runs import recipe

FIELDS = {
    "batch_size": 64, "weight_decay": 0.3, "schedule": "step", "warmup_share": 0.2, "label_smoothing": 0.1,
    "ema_decay": 0.9, "grad_clip": 2.0, "optimizer": "adamw", "accumulation": 2, "mixup": 0.4, "cutmix": 0.5,
    "channels_last": True, "compile": True, "mixed_precision": "bf16", "learning_rate": 0.7,
}  # fmt: skip


def job_of(**fields: Any) -> Any:
    return SimpleNamespace(recipe=Recipe.model_validate({"model": "tests.nets:tiny", **fields}).resolved())


def test_every_field_reaches_the_training() -> None:
    settings = train_settings(job_of(training=FIELDS))
    assert {name: getattr(settings, name) for name in FIELDS} == FIELDS


def test_without_fields_the_training_is_what_it_was() -> None:
    settings = train_settings(job_of(training={"mixed_precision": "no"}))
    plain = {"batch_size": 32, "learning_rate": 0.05, "weight_decay": 1e-4}
    assert settings == type(settings)(**plain)  # type: ignore[arg-type]


def test_augmentation_follows_the_recipe() -> None:
    wanted = {"rand_augment": 7, "random_erasing": 0.2}
    loaded = load(recipe(training=wanted).resolved())
    change = loaded.task.train.augmentation  # type: ignore[union-attr]
    assert (change.rand_augment, change.random_erasing, change.shift) == (7, 0.2, 1)
    assert loaded.task.test.augmentation.rand_augment == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["mixup", "cutmix", "rand_augment", "random_erasing"])
def test_what_is_for_images_by_class_is_refused_elsewhere(name: str) -> None:
    fields = {"model": "tests.nets:segmenter", "data": "shapes:20", "task": "segmentation", "image_size": 32}
    with pytest.raises(CompressorError, match=rf"training\.{name} is 1.*images by class"):
        load(Recipe.model_validate({**fields, "training": {name: 1}}).resolved())
    batches = [(torch.rand(2, 3, 16, 16), torch.arange(2))]
    with pytest.raises(CompressorError, match=rf"training\.{name} is for images by class"):
        compress(tiny(), batches[0][0], train=batches, training={name: 1})


class Interrupted:
    """Stops a training before the step of this number, as Ctrl-C does; 0 for never."""

    def __init__(self, at: int) -> None:
        self.left, self.step = at, Trainer._step

    def __call__(self, trainer: Trainer, *rest: Any) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.step(trainer, *rest)


def test_a_run_that_is_killed_within_epochs_ends_as_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Once while the dense network is trained, and once in fine-tuning; what follows fine-tuning is left out."""
    fields = {
        "agent": "uniform", "budgets": {"params": "50%"}, "training": {"ema_decay": 0.9, "mixup": 0.2},
        "pruning": {"compensate": "off"}, "epochs": 2, "search": {"epochs_share": 0.5, "batch_norm_batches": 2},
    }  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    monkeypatch.setattr("compressor.run.pipeline.export", _stop)

    def killed(command: Any, at: int = 0) -> None:
        stop = Interrupted(at)
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", lambda *rest: stop(*rest))
            with pytest.raises(KeyboardInterrupt):
                command()

    killed(lambda: run_recipe(recipe(**fields), out=whole))
    monkeypatch.setattr(within, "SAVE_EVERY_S", 0.0)
    epoch = 1295 // 32
    killed(lambda: run_recipe(recipe(**fields), out=stopped), at=6)
    assert (stopped / "checkpoints/search-epoch.pt").is_file()
    killed(lambda: resume(stopped), at=epoch - 5 + 8)
    assert (stopped / "checkpoints/finetune-epoch.pt").is_file()
    said.clear()
    killed(lambda: resume(stopped))
    assert f"Epoch 1 of 1 continues after 7 of {epoch} steps." in said
    assert not [line for line in said if "missing" in line]
    assert not list(stopped.glob("checkpoints/*-epoch.pt"))
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_forked_process_does_not_keep_the_folder_locked(tmp_path: Path) -> None:
    """One that reads images lives on for seconds when its parent is killed."""
    run = RunFolder.create(tmp_path / "run", "model: resnet50\n")
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        time.sleep(0.05)
        with pytest.raises(CompressorError, match="Another process"):
            RunFolder.open(tmp_path / "run")
        run.close()
        RunFolder.open(tmp_path / "run").close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
