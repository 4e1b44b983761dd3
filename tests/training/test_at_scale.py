"""Training as on ImageNet: each setting by hand, and an epoch that is continued in its middle."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from compressor.core.errors import CompressorError
from compressor.core.records import Checkpoint
from compressor.data import DataBundle, FileSplit, MemorySplit, Preprocessing, load_data
from compressor.data.augment import Augmentation
from compressor.data.images import whole_picture
from compressor.training import within
from compressor.training.classification import Classification
from compressor.training.feeds import parts_of
from compressor.training.loaders import InputsOfBatch, Loader
from compressor.training.loop import Trainer
from compressor.training.mixing import mixed
from compressor.training.own_task import OwnTask, cross_entropy
from compressor.training.settings import TrainSettings
from compressor.training.within import WithinEpoch

PREPROCESSING = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)


def task_of(count: int = 8, augmentation: Augmentation | None = None) -> Classification:
    """Images of 4x4 pixels in two classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)
    split = MemorySplit(images, torch.arange(count) % 2, PREPROCESSING, augmentation or Augmentation())
    return Classification.of(DataBundle("made", ("a", "b"), (3, 4, 4), split, split, split))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 2))


def convolution(dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout),
        nn.Linear(128, 2),
    )  # fmt: skip


def trained(model: nn.Module, task: Classification, **settings: Any) -> nn.Module:
    usual = {"batch_size": 8, "learning_rate": 0.1, "warmup_share": 0.0, "weight_decay": 0.01, "schedule": "step"}
    Trainer(model, task, TrainSettings(**(usual | settings)), epochs=3, seed=0).run_epoch()  # type: ignore[arg-type]
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_first_step_of_adamw_by_hand() -> None:
    """The moments of the first step cancel: w (1 - lr * decay) - lr * sign(gradient)."""
    task, model = task_of(), linear()
    before = model.get_parameter("1.weight").detach().clone()
    assert task.train is not None
    ((images, labels),) = task.train.batches(8)
    functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    gradient = model.get_parameter("1.weight").grad
    assert gradient is not None
    trained(model, task, optimizer="adamw", learning_rate=0.01, weight_decay=0.5)
    expected = before * (1 - 0.01 * 0.5) - 0.01 * gradient.sign()
    assert torch.allclose(model.get_parameter("1.weight"), expected, atol=1e-5)


def test_parts_of_a_batch_give_the_step_of_the_whole() -> None:
    task = task_of(7)
    whole = trained(linear(), task, batch_size=7, grad_clip=0.1)
    parts = trained(linear(), task, batch_size=7, grad_clip=0.1, accumulation=3)
    assert torch.allclose(whole.get_parameter("1.weight"), parts.get_parameter("1.weight"), atol=1e-6)
    assert not same(whole, trained(linear(), task, batch_size=7, grad_clip=0.05))


def test_a_batch_of_any_structure_is_divided() -> None:
    images, labels, boxes = torch.rand(5, 3), torch.arange(5), [torch.full((n, 5), float(n)) for n in range(5)]
    parts = parts_of((images, boxes, {"y": labels, "scale": torch.tensor(2.0)}), 2)
    assert [share for _, share in parts] == [0.6, 0.4]
    first, second = (part for part, _ in parts)
    assert torch.equal(torch.cat([first[0], second[0]]), images)
    assert [len(each) for each in second[1]] == [3, 4]
    assert second[2]["y"].tolist() == [3, 4]
    assert second[2]["scale"] == 2
    pair = parts_of([torch.zeros(2, 3), torch.arange(2)], 2)[1][0]
    assert (pair[0].shape, pair[1].tolist()) == ((1, 3), [1])
    assert parts_of("no tensors", 1) == [("no tensors", 1.0)]


def test_the_labels_of_mixed_images_by_hand() -> None:
    """Image i is share * image i + (1 - share) * image i - 1, and so are the labels."""
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 2])
    torch.manual_seed(3)
    pictures, shares = mixed(images, labels, 3, mixup=1.0, cutmix=0.0)
    share = float(shares[0, 0])
    assert 0 < share < 1
    expected = torch.tensor([[share, 0, 1 - share], [1 - share, share, 0], [0, 1 - share, share], [0, 0, 1]])
    assert torch.allclose(shares, expected)
    assert torch.allclose(pictures, share * images + (1 - share) * images.roll(1, 0), atol=1e-6)


def test_a_cut_image_has_its_labels_by_area() -> None:
    torch.manual_seed(1)
    images = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 3, 16, 16)
    pictures, shares = mixed(images, torch.tensor([0, 1]), 2, mixup=0.0, cutmix=1.0)
    assert 0 < shares[0, 1] < 1
    assert torch.allclose(pictures[:, 0].mean((1, 2)), shares[:, 1], atol=1e-6)
    torch.manual_seed(0)
    batches = [mixed(images, torch.tensor([0, 1]), 2, mixup=1.0, cutmix=1.0)[0] for _ in range(20)]
    whole = {bool((batch % 1 == 0).all()) for batch in batches}
    assert whole == {False, True}  # each batch has one of the two


def test_mixed_batches_train_on_their_shares() -> None:
    """The loss of a batch of mixed images is the mixed loss, and no accuracy is claimed of it."""
    task, model = task_of(), linear()
    assert task.train is not None
    ((images, labels),) = task.train.batches(8)
    torch.manual_seed(5)
    pictures, shares = mixed(images, labels, 2, mixup=0.4, cutmix=0.0)
    expected = -(shares * functional.log_softmax(model(pictures), 1)).sum(1).mean()
    torch.manual_seed(5)
    found = task.losses(model, (images, labels), None, TrainSettings(mixup=0.4), nullcontext)
    assert found.loss is not None
    assert found.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert found.right is None
    trainer = Trainer(model, task, TrainSettings(batch_size=8, mixup=0.4), epochs=1, seed=0)
    assert trainer.run_epoch().accuracy is None


def test_channels_last_is_for_the_epoch_only() -> None:
    seen = []
    model = convolution(0.0)
    model[0].register_forward_pre_hook(  # type: ignore[operator]
        lambda module, _: seen.append(module.weight.is_contiguous(memory_format=torch.channels_last))
    )
    trained(model, task_of(), channels_last=True)
    assert seen == [True]
    assert model.get_parameter("0.weight").is_contiguous()
    for one, other in zip(model.parameters(), trained(convolution(0.0), task_of()).parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_compile_compiles_the_network_and_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    model = trained(linear(), task_of(), compile=True)
    assert compiled == [model]

    class BackendFailed(Exception):
        """As torch's own."""

    BackendFailed.__module__ = "torch._dynamo.exc"

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise BackendFailed("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda module: Broken())
    with pytest.raises(CompressorError, match=r"cannot compile the network: BackendFailed: no C\+\+ compiler"):
        trained(linear(), task_of(), compile=True)


@pytest.mark.parametrize("wrong", [{"accumulation": 5}, {"accumulation": 0}, {"warmup_share": 1.0}])
def test_settings_at_scale_that_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CompressorError):
        TrainSettings(batch_size=8, **wrong)


# ---------------------------------------------------------------- within an epoch
SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "optimizer": "adamw",
    "ema_decay": 0.9,
    "mixup": 0.2,
    "learning_rate": 0.01,
    "accumulation": 2,
}


class Killed(Exception):
    """The end of a process."""


@pytest.fixture
def pictures(tmp_path: Path) -> DataBundle:
    """Two classes of 20 pictures of 130x100 pixels on disk, of which crops of 100x100 are trained on."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 2)):
        for index, name in enumerate(("a", "b")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (100, 130, 3), dtype=np.uint8)
                pixels[..., index] += 120
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number:02}.png")
    return load_data(f"folder:{tmp_path}", seed=0, image_size=100, workers=0)


def pooled() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=5), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(16, 2),
    )  # fmt: skip


def interrupted(make: Callable[[WithinEpoch | None], Trainer], file: Path, at: int) -> tuple[Trainer, Trainer]:
    """Return a trainer after two epochs, and one that was killed at a step of the second and continued."""
    whole = make(None)
    losses = [whole.run_epoch().loss for _ in range(2)]
    checkpoint = Checkpoint(file)
    first = make(WithinEpoch(checkpoint))
    first.run_epoch()
    assert not file.exists()
    state = first.state()

    def die(done: int) -> None:
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        first.run_epoch(die)
    assert file.exists()
    torch.manual_seed(77)
    second = make(WithinEpoch(checkpoint))
    second.restore(state)
    steps: list[int] = []
    stats = second.run_epoch(steps.append)
    assert steps[0] == at - 1
    assert steps[-1] == whole.steps_per_epoch
    assert stats.loss == losses[1]
    assert not file.exists()
    return whole, second


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(within, "SAVE_EVERY_S", 0.0)


@pytest.mark.usefixtures("every_step")
def test_an_epoch_continues_where_it_was_killed(
    pictures: DataBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, mixup, an average and crops of files; what was trained on is not read again."""
    assert isinstance(pictures.train, FileSplit)
    pictures.train.augmentation = Augmentation(flip=True, smallest_crop=0.3, random_erasing=0.5, rand_augment=5)
    read: list[str] = []

    def reading(path: str, *rest: Any) -> Any:
        read.append(path)
        return whole_picture(path, *rest)

    monkeypatch.setattr("compressor.data.files.whole_picture", reading)

    def make(kept: WithinEpoch | None) -> Trainer:
        read.clear()
        task = Classification.of(pictures)
        return Trainer(pooled(), task, TrainSettings(**SETTINGS), epochs=3, seed=1, within=kept)

    whole, second = interrupted(make, tmp_path / "epoch.pt", at=6)
    assert same(whole.model, second.model)
    assert all(
        torch.equal(one, other)
        for one, other in zip(whole.state()["average"].values(), second.state()["average"].values(), strict=True)
    )
    assert len(read) == 4 * (9 - 5)


@pytest.mark.usefixtures("every_step")
def test_an_epoch_of_images_in_memory_continues(tmp_path: Path) -> None:
    task = task_of(40, Augmentation(shift=1, flip=True))

    def make(kept: WithinEpoch | None) -> Trainer:
        return Trainer(convolution(), task, TrainSettings(**SETTINGS), epochs=3, seed=1, within=kept)

    whole, second = interrupted(make, tmp_path / "epoch.pt", at=3)
    assert same(whole.model, second.model)


@pytest.mark.usefixtures("every_step")
def test_an_epoch_of_a_users_loader_continues(tmp_path: Path) -> None:
    """Its order is drawn from the global generator, which dropout draws from, too."""
    data = torch.utils.data.TensorDataset(torch.rand(40, 3, 4, 4), torch.arange(40) % 2)
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    inputs = InputsOfBatch((torch.zeros(1, 3, 4, 4),))

    def make(kept: WithinEpoch | None) -> Trainer:
        task = OwnTask(
            inputs, train=Loader(loader, 10), loss=cross_entropy, calibration=None, search=None, test=None,
            evaluate=lambda _: 0.0, score=lambda _: 0.0, likeness=None,  # type: ignore[arg-type]
        )  # fmt: skip
        return Trainer(convolution(), task, TrainSettings(batch_size=4), epochs=3, seed=1, within=kept)

    whole, second = interrupted(make, tmp_path / "epoch.pt", at=6)
    assert same(whole.model, second.model)


@pytest.mark.usefixtures("every_step")
def test_the_middle_of_another_epoch_is_not_continued(tmp_path: Path) -> None:
    """Of another plan, at another rate, or damaged: the epoch is repeated."""
    file = tmp_path / "epoch.pt"

    def steps(of: str, rate: float) -> list[int]:
        settings = TrainSettings(batch_size=4, learning_rate=rate)
        trainer = Trainer(
            convolution(), task_of(12), settings, epochs=3, seed=1, within=WithinEpoch(Checkpoint(file), of)
        )
        seen: list[int] = []

        def note(done: int) -> None:
            seen.append(done)
            if done == 3:
                raise Killed

        with pytest.raises(Killed):
            trainer.run_epoch(note)
        return seen

    assert steps("plan", 0.1) == [1, 2, 3]
    assert steps("plan", 0.1) == [2, 3]
    assert steps("another", 0.1) == [1, 2, 3]
    assert steps("another", 0.05) == [1, 2, 3]
    file.write_bytes(b"damaged")
    assert steps("another", 0.05) == [1, 2, 3]


def test_a_signal_is_seen_after_the_step() -> None:
    """Postponed, the first one raises nothing until the work ends."""
    script = """
import os, signal
from compressor.core.processes import postponed, stoppable, stopped
with stoppable():
    with postponed():
        os.kill(os.getpid(), signal.SIGTERM)
        print("step", stopped())
    print("not reached")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "step True\n"
    assert done.returncode == 143
    assert done.stderr == ""
