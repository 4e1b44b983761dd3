"""The training loop: it learns, goes on bit by bit after a break, stops on NaN, and follows its
schedule."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from compressor.core.errors import CompressorError
from compressor.core.records import Checkpoint
from compressor.data import DataBundle, MemorySplit, Preprocessing, load_data
from compressor.data.augment import Augmentation
from compressor.models import create_model
from compressor.training.classification import Classification
from compressor.training.loop import Trainer
from compressor.training.scoring import accuracy, recent_statistics
from compressor.training.settings import TrainSettings


@pytest.fixture(scope="module")
def digits() -> DataBundle:
    """Digits at 16x16, of which 256 train."""
    data = load_data("digits", seed=0, image_size=16)
    train = data.train.sample(256)
    return DataBundle("digits", data.classes, data.input_shape, train, data.search, data.test)


def network(seed: int = 0, dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(64, 10),
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_it_learns(digits: DataBundle) -> None:
    model = network()
    trainer = Trainer(
        model, Classification.of(digits), TrainSettings(batch_size=32, learning_rate=0.1), epochs=12, seed=0
    )
    stats = [trainer.run_epoch() for _ in range(12)]
    assert stats[-1].loss < 0.5 * stats[0].loss
    assert stats[0].loss == pytest.approx(2.3, abs=0.3)  # ln 10 for a guess
    assert accuracy(model, digits.test) > 0.7
    assert stats[0].seconds > 0
    with pytest.raises(ValueError, match="all 12 epochs"):
        trainer.run_epoch()


def test_one_step_by_hand() -> None:
    """Nesterov's first step is w - lr * (1 + momentum) * gradient."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8, generator=generator)
    split = MemorySplit(
        images, torch.arange(8) % 2, Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3), Augmentation()
    )
    data = DataBundle("made", ("a", "b"), (3, 4, 4), split, split, split)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    weight, bias = (p.detach().clone().requires_grad_() for p in model.parameters())
    x = (images.flatten(1) / 255 - 0.5) / 0.5
    loss = functional.cross_entropy(x @ weight.t() + bias, torch.arange(8) % 2)
    loss.backward()  # type: ignore[no-untyped-call]
    settings = TrainSettings(8, learning_rate=0.1, warmup_share=0, weight_decay=0.01, schedule="step")
    stats = Trainer(model, Classification.of(data), settings, epochs=3, seed=0).run_epoch()
    assert stats.loss == pytest.approx(loss.item(), abs=1e-6)
    assert weight.grad is not None
    assert bias.grad is not None
    decayed = weight.grad + 0.01 * weight.detach()
    assert torch.allclose(model.get_parameter("1.weight"), weight - 0.1 * 1.9 * decayed, atol=1e-6)
    assert torch.allclose(model.get_parameter("1.bias"), bias - 0.1 * 1.9 * bias.grad, atol=1e-6)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_going_on_is_bit_identical(digits: DataBundle, tmp_path: Path, precision: str) -> None:
    """Through a checkpoint's file, with dropout, augmentation, momentum, a schedule and an average."""
    settings = TrainSettings(
        batch_size=32,
        mixed_precision=precision,  # type: ignore[arg-type]
        ema_decay=0.9,
        label_smoothing=0.1,
        grad_clip=1.0,
    )
    whole = Trainer(network(), Classification.of(digits), settings, epochs=4, seed=7)
    undisturbed = [whole.run_epoch() for _ in range(4)]

    first = Trainer(network(), Classification.of(digits), settings, epochs=4, seed=7)
    early = [first.run_epoch() for _ in range(2)]
    checkpoint = Checkpoint(tmp_path / "training.pt")
    checkpoint.save(first.state())
    first.run_epoch()  # what was not saved is lost

    torch.manual_seed(99)
    second = Trainer(network(seed=5), Classification.of(digits), settings, epochs=4, seed=7)
    state = checkpoint.load()
    assert state is not None
    second.restore(state)
    late = [second.run_epoch() for _ in range(2)]
    assert [s.loss for s in undisturbed] == [s.loss for s in early + late]
    assert same(whole.model, second.model)


def test_a_state_is_a_copy(digits: DataBundle) -> None:
    trainer = Trainer(network(), Classification.of(digits), TrainSettings(batch_size=64), epochs=4, seed=0)
    trainer.run_epoch()
    state = trainer.state()
    before = copy.deepcopy(state)
    trainer.run_epoch()
    trainer.restore(state)
    trainer.run_epoch()
    for key, value in before["model"].items():
        assert torch.equal(state["model"][key], value)
    buffers = [part["momentum_buffer"] for part in state["optimizer"]["state"].values()]
    originals = [part["momentum_buffer"] for part in before["optimizer"]["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(buffers, originals, strict=True))


def test_states_that_do_not_fit(digits: DataBundle) -> None:
    state = Trainer(network(), Classification.of(digits), TrainSettings(), epochs=2, seed=0).state()
    with pytest.raises(CompressorError, match="seed 0, this one has 1"):
        Trainer(network(), Classification.of(digits), TrainSettings(), epochs=2, seed=1).restore(state)
    with pytest.raises(CompressorError, match="does not fit"):
        Trainer(
            create_model("cifar_resnet20", 10), Classification.of(digits), TrainSettings(), epochs=2, seed=0
        ).restore(state)


def test_the_global_generator_is_left_alone(digits: DataBundle) -> None:
    model = network()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    Trainer(model, Classification.of(digits), TrainSettings(), epochs=1, seed=0).run_epoch()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops(digits: DataBundle, spoilt: float) -> None:
    model = network()
    trainer = Trainer(
        model, Classification.of(digits), TrainSettings(learning_rate=0.3, batch_size=32), epochs=5, seed=0
    )
    trainer.run_epoch()
    with torch.no_grad():
        model.get_parameter("8.weight").fill_(spoilt)
    with pytest.raises(
        CompressorError, match=r"epoch 2 of 5, at a learning rate of 0\.2\d+ \(highest"
    ) as caught:
        trainer.run_epoch()
    assert "compress --resume RUN --set training.learning_rate=0.06" in caught.value.hint


def test_far_too_high_a_rate_is_noticed(digits: DataBundle) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    settings = TrainSettings(learning_rate=1e6, warmup_share=0, batch_size=16)
    trainer = Trainer(model, Classification.of(digits), settings, epochs=2, seed=0)
    with pytest.raises(CompressorError, match="NaN or infinite in epoch 1 of 2"):
        trainer.run_epoch()


def test_the_schedule() -> None:
    cosine = TrainSettings(learning_rate=0.1, warmup_share=0.2)
    assert cosine.learning_rate_at(0.1) == pytest.approx(0.05)
    assert cosine.learning_rate_at(0.2) == pytest.approx(0.1)
    assert cosine.learning_rate_at(0.6) == pytest.approx(0.05)
    assert cosine.learning_rate_at(1.0) == pytest.approx(0.0)
    step = TrainSettings(learning_rate=0.1, schedule="step", warmup_share=0)
    assert [step.learning_rate_at(share) for share in (0, 0.49, 0.5, 0.74, 0.75, 1)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 1}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"ema_decay": 1.0}]
)
def test_settings_that_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(CompressorError):
        TrainSettings(**wrong)  # type: ignore[arg-type]


def test_a_regulariser_pulls_and_may_be_replaced(digits: DataBundle) -> None:
    def run(weight: float) -> tuple[float, float]:
        model = network()
        settings = TrainSettings(batch_size=64, learning_rate=0.05, weight_decay=0)
        trainer = Trainer(model, Classification.of(digits), settings, epochs=4, seed=0)
        assert trainer.run_epoch().regulariser == 0
        trainer.regulariser = lambda module: weight * module.get_parameter("3.weight").square().sum()
        stats = [trainer.run_epoch() for _ in range(3)]
        return stats[0].regulariser, float(model.get_parameter("3.weight").detach().norm())

    free, pulled = run(0.0), run(1.0)
    assert free[0] == 0
    assert pulled[0] > 0.1
    assert pulled[1] < 0.5 * free[1]


def test_a_teacher_is_learnt_from_and_not_changed(digits: DataBundle) -> None:
    teacher = network(dropout=0)
    Trainer(teacher, Classification.of(digits), TrainSettings(batch_size=32), epochs=15, seed=0)
    before = copy.deepcopy(teacher)
    student = network(seed=1, dropout=0)
    settings = TrainSettings(batch_size=32, learning_rate=0.05)
    trainer = Trainer(
        student, Classification.of(digits), settings, epochs=8, seed=0, teacher=teacher, distill_weight=1.0
    )
    losses = [trainer.run_epoch().loss for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    assert same(teacher, before)
    assert not teacher.training


def test_average_of_weights(digits: DataBundle) -> None:
    """With decay d, two steps on: d * (d * w0 + (1 - d) * w1) + (1 - d) * w2, d rising as 2/11, 3/12."""
    from compressor.training.loop import averaged

    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average = averaged(model, 0.9)
    for value in (2.0, 4.0):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
    expected = 3 / 12 * (2 / 11 * 1 + 9 / 11 * 2) + 9 / 12 * 4
    assert float(average.module.weight) == pytest.approx(expected)  # type: ignore[arg-type]


def test_between_epochs_the_model_has_the_averaged_weights(digits: DataBundle) -> None:
    """The steps themselves are those without an average; what is seen after each epoch is the mean of them."""

    def run(decay: float) -> tuple[list[float], torch.Tensor]:
        model = network(dropout=0)
        settings = TrainSettings(batch_size=32, learning_rate=0.05, ema_decay=decay)
        trainer = Trainer(model, Classification.of(digits), settings, epochs=3, seed=0)
        return [trainer.run_epoch().loss for _ in range(3)], model.get_parameter("0.weight").detach().clone()

    (plain, last), (averaged, mean) = run(0.0), run(0.95)
    assert averaged == plain
    assert not torch.allclose(last, mean)
    assert torch.allclose(last, mean, atol=0.1)


def test_a_part_of_a_longer_schedule(digits: DataBundle) -> None:
    settings = TrainSettings(learning_rate=0.1, schedule="step", warmup_share=0)
    first = Trainer(network(), Classification.of(digits), settings, epochs=6, seed=0, span=(0, 10))
    second = Trainer(network(), Classification.of(digits), settings, epochs=4, seed=0, span=(6, 10))
    rates = []
    for part in (first, second):
        for epoch in range(part.epochs):
            part.epoch = epoch
            rates.append(part.learning_rate)
    assert rates == pytest.approx([0.1] * 5 + [0.01] * 3 + [0.001] * 2)


def test_unknown_device(digits: DataBundle) -> None:
    with pytest.raises(CompressorError, match="no device 'cuda:77'"):
        Trainer(network(), Classification.of(digits), TrainSettings(), epochs=1, seed=0, device="cuda:77")


def test_several_trainings_in_one_process(digits: DataBundle) -> None:
    """Trainings of different precision take turns, and neither changes the other."""
    alone = Trainer(
        network(), Classification.of(digits), TrainSettings(mixed_precision="bf16"), epochs=2, seed=0
    )
    expected = [alone.run_epoch().loss for _ in range(2)]
    one = Trainer(
        network(), Classification.of(digits), TrainSettings(mixed_precision="bf16"), epochs=2, seed=0
    )
    other = Trainer(network(), Classification.of(digits), TrainSettings(), epochs=2, seed=0)
    losses = []
    for _ in range(2):
        losses.append(one.run_epoch().loss)
        other.run_epoch()
    assert losses == expected
    assert type(copy.deepcopy(one.model).forward(torch.zeros(2, 3, 16, 16))) is torch.Tensor


@pytest.mark.parametrize(
    ("given", "steps", "expected"), [(0.01, 400, 0.025), (0.01, 50, 0.1), (0.01, 5000, 0.01), (0.1, 400, 0.1)]
)
def test_statistics_are_those_of_the_last_tenth(given: float, steps: int, expected: float) -> None:
    network = nn.Sequential(nn.BatchNorm2d(3, momentum=given), nn.BatchNorm2d(3, momentum=None))
    with recent_statistics(network, steps):
        assert [norm.momentum for norm in network] == [pytest.approx(expected), None]
    assert [norm.momentum for norm in network] == [given, None]


def test_a_short_training_raises_small_momenta(digits: DataBundle) -> None:
    model = create_model("tests.nets:tiny", 10)
    norm, seen = model.get_submodule("stem.1"), set()
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = 0.01
    norm.register_forward_hook(lambda *_: seen.add(norm.momentum))
    trained = Trainer(model, Classification.of(digits), TrainSettings(batch_size=256), epochs=3, seed=0)
    trained.run_epoch()
    assert trained.steps_per_epoch * 3 < 100
    assert seen == {0.1}
    assert norm.momentum == 0.01
