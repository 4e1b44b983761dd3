"""The training loop: one epoch at a time, reproducible across interruptions; or a few steps on a candidate."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from compressor.core.errors import CompressorError
from compressor.core.processes import postponed
from compressor.core.progress import say
from compressor.training.feeds import parts_of
from compressor.training.placement import place, place_together
from compressor.training.randomness import generator_states, own_randomness, restore_generators
from compressor.training.scoring import recent_statistics
from compressor.training.settings import TrainSettings
from compressor.training.task import Losses, Task
from compressor.training.within import WithinEpoch

Regulariser = Callable[[nn.Module], torch.Tensor]
Join = Callable[["Trainer", dict[str, Any] | None], dict[str, Any] | None]
_CHECK_EVERY = 10
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EpochStats:
    """Statistics of one epoch on the training split, with augmented images and while the weights change.

    Attributes:
        loss: Mean loss per image, without the regularizer.
        accuracy: Share of correctly classified images, 0..1; None for tasks without classes.
        seconds: Wall time.
        regulariser: Mean of the regularizer over the steps; 0 without one.
    """

    loss: float
    accuracy: float | None
    seconds: float
    regulariser: float = 0.0


class Trainer:
    """Trains a model in place over a fixed number of epochs.

    All randomness of an epoch (order, augmentation, dropout) follows from the seed and the epoch's number
    alone, and the global generators keep their state.

    Args:
        model: Network, trained in place and moved to the device.
        task: Task whose training batches and loss are used.
        settings: See `TrainSettings`.
        epochs: Number of epochs of the schedule.
        seed: Seed of all random numbers.
        device: "cpu", "cuda:0", or "auto" for the best available.
        teacher: Network to distill from; put into evaluation mode.
        distill_weight: Share of the distillation loss, 0..1; the labels have the rest.
        regulariser: Added to the loss of every step; may be replaced between epochs.
        span: First epoch and total number of epochs of the learning-rate schedule, if this training is a part of a
            longer one; None for a schedule of its own.
        rate_field: Recipe field with which the user can lower the learning rate, for the message of a non-finite loss.
        within: Where the state in the middle of an epoch is kept; None for nowhere.
        join: Called before each epoch in a training of several processes, which all call `run_epoch`, with this trainer
            and the state in the middle of the epoch; returns that from which all continue. None to train in this
            process alone.

    If the settings ask for an average of the weights, the model has the averaged weights between epochs: these are
    scored, sliced and delivered. The optimizer's own weights are restored for each epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: TrainSettings,
        *,
        epochs: int,
        seed: int,
        device: str | torch.device = "cpu",
        teacher: nn.Module | None = None,
        distill_weight: float = 0.5,
        regulariser: Regulariser | None = None,
        span: tuple[int, int] | None = None,
        rate_field: str = "training.learning_rate",
        within: WithinEpoch | None = None,
        join: Join | None = None,
    ) -> None:
        assert task.train is not None  # checked before the run begins
        self.task, self.settings, self.epochs, self.seed = task, settings, epochs, seed
        self._feed = task.train
        self.regulariser = regulariser
        self._start, self._whole = span or (0, epochs)
        self._rate_field = rate_field
        self.epoch = 0
        self._counts = True
        self._join = join
        self._place = place(device) if join is None else place_together(device)
        self.device = self._place.device
        self.model = model.to(self.device)
        self._within = within
        self._wrapped: Any = self.model
        if join is None:  # else all processes do so in the first epoch
            self._wrap()
        self._teacher = None if teacher is None or not distill_weight else teacher.to(self.device).eval()
        self._distill_weight = distill_weight
        self._optimizer = _optimizer(self.model, settings)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=settings.mixed_precision == "fp16")
        self._average = averaged(self.model, settings.ema_decay) if settings.ema_decay else None
        self.steps_per_epoch = self._feed.steps(settings.batch_size, self._place.world)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next epoch's first step."""
        return self._rate_at(self.epoch)

    def _rate_at(self, epoch: float) -> float:
        return self.settings.learning_rate_at(min((self._start + epoch) / self._whole, 1.0))

    def run_epoch(self, on_step: Callable[[int], None] | None = None) -> EpochStats:
        """Train on the whole training split once.

        Args:
            on_step: Called after each step with the number of finished steps, of `steps_per_epoch`.

        Raises:
            CompressorError: The loss is no longer finite; the weights are then unusable.
            ValueError: All epochs of the schedule have been run.
        """
        if self.epoch >= self.epochs:
            raise ValueError(f"all {self.epochs} epochs of the schedule have been run")
        started = time.perf_counter()
        middle = self._middle()
        if self._join is not None:
            middle = self._join(self, middle)
        if self._average is not None:
            _swap(self._average.module, self.model)
        if self.settings.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if self._join is not None and self._wrapped is self.model:
            self._wrap()
        self._wrapped.train()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # loss, correct, images, regularizer
        done = skipped = 0
        random = own_randomness(self._epoch_seed() + self._place.rank, self.device)
        recent = recent_statistics(self.model, self.epochs * self.steps_per_epoch)
        with random, recent, nullcontext() if self._within is None else postponed():
            if middle is not None:
                self.restore(middle)
                done = skipped = middle["done"]
                self._counts = middle["counts"]
                sums += middle["sums"].to(self.device)
                started -= middle["seconds"]
            batches = self._batches(skipped)
            if middle is not None:
                if middle["random"] is not None:
                    restore_generators(middle["random"], self.device)
                say(f"Epoch {self.epoch + 1} of {self.epochs} continues after {done} of {self.steps_per_epoch} steps.")
                if on_step is not None:
                    on_step(done)
            for done, batch in enumerate(batches, start=skipped + 1):
                rate = self._rate_at(self.epoch + (done - 0.5) / self.steps_per_epoch)
                sums += self._step(batch, rate)
                if done % _CHECK_EVERY == 0:
                    self._check(sums)
                if on_step is not None:
                    on_step(done)
                self._save_middle(done, sums, time.perf_counter() - started)
        sums = self._place.total(sums)
        self._check(sums)
        self._agree()
        if self.settings.channels_last:
            self.model.to(memory_format=torch.contiguous_format)
        if self._average is not None:
            _swap(self._average.module, self.model)
        self.epoch += 1
        if self.epoch == self.epochs:
            self._feed.release()
        if self._within is not None:
            self._within.end()
        loss, right, images_seen, regulariser = sums.tolist()
        steps = max(1, done) * self._place.world
        seconds = time.perf_counter() - started
        return EpochStats(
            loss / max(1, images_seen),
            right / max(1, images_seen) if self._counts else None,
            seconds,
            regulariser / steps,
        )

    def _wrap(self) -> None:
        self._wrapped = self._place.wrap(self.model)
        if self.settings.compile:
            self._wrapped = torch.compile(self._wrapped)

    def _middle(self) -> dict[str, Any] | None:
        """Return the state from which this epoch continues; None if it begins."""
        if self._within is None:
            return None
        rate = self.settings.learning_rate
        same = {"epoch": self.epoch, "seed": self.seed, "epochs": self.epochs, "rate": rate}
        return self._within.begin(same)

    def _save_middle(self, done: int, sums: torch.Tensor, seconds: float) -> None:
        """Save the state after a step if it is time to."""
        if self._within is not None and self._within.due():
            self._check(sums)
            random = generator_states(self.device)
            state = {"done": done, "counts": self._counts, "sums": sums, "seconds": seconds, "random": random}
            self._within.save({**self.state(), **state})

    def _batches(self, skip: int = 0) -> Iterator[Any]:
        return self._feed.batches(
            self.settings.batch_size,
            shuffle_seed=self._epoch_seed(),
            augment=True,
            device=self.device,
            drop_last=True,  # batch norm cannot train on a last batch of one image
            shard=(self._place.rank, self._place.world),
            skip=skip,
        )

    def _step(self, batch: Any, learning_rate: float) -> torch.Tensor:
        """Run one optimizer step; return (loss * inputs, correct, inputs, regularizer)."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        parts = parts_of(batch, self.settings.accumulation)
        for number, (part, share) in enumerate(parts, start=1):
            last = number == len(parts)
            apart = self._place.world > 1 and not last
            with self._wrapped.no_sync() if apart else nullcontext():  # averaged once, with the last part
                found = self._losses(part)
                loss = found.together(self._distill_weight)
                extra = loss.new_zeros(())
                if self.regulariser is not None and last:  # only the first process has one, and gradients are averaged
                    extra = self.regulariser(self.model) * self._place.world
                torch.autograd.backward(self._scaler.scale((loss if share == 1 else loss * share) + extra))
            self._counts = found.right is not None
            right = loss.new_zeros(()) if found.right is None else found.right
            count = torch.tensor(float(found.inputs), device=self.device)
            sums += torch.stack([loss.detach() * count, right, count, extra.detach()]).double()
        if self.settings.grad_clip:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._average is not None:
            self._average.update_parameters(self.model)
        return sums

    def _losses(self, batch: Any) -> Losses:
        dtype = _DTYPES.get(self.settings.mixed_precision)
        precision = partial(torch.autocast, self.device.type, dtype=dtype, enabled=dtype is not None)
        try:
            return self.task.losses(self._wrapped, batch, self._teacher, self.settings, precision)
        except Exception as error:
            if not (self.settings.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CompressorError(
                f"torch.compile cannot compile the network: {type(error).__name__}: {reason}",
                "It needs a C++ compiler on a CPU and Triton on a GPU. Or leave out training.compile.",
            ) from error

    def _check(self, sums: torch.Tensor) -> None:
        rate = self._optimizer.param_groups[0]["lr"]
        if self._place.rank == 0 and not torch.isfinite(sums).all():  # averaged gradients spread it to all
            raise CompressorError(
                f"The training loss became NaN or infinite in epoch {self.epoch + 1} of {self.epochs}, "
                f"at a learning rate of {rate:g} (highest: {self.settings.learning_rate:g}).",
                "The checkpoint from before this epoch is intact. Continue from it at a lower rate: compress --resume "
                f"RUN --set {self._rate_field}={self.settings.learning_rate / 5:g} (from Python: resume=True and that "
                "field).",
            )

    def _agree(self) -> None:
        """Average the batch-norm statistics of all processes; averaged gradients keep their weights equal."""
        if self._place.world > 1:
            for buffer in self.model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self._place.total(buffer.clone()) / self._place.world)

    def _epoch_seed(self) -> int:
        return self.seed * 100_003 + self.epoch

    def described(self) -> dict[str, Any]:
        """Return the arguments of an equal trainer in another process as plain values, but for the networks."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "epochs": self.epochs,
            "seed": self.seed,
            "distill_weight": self._distill_weight,
            "span": [self._start, self._whole],
            "rate_field": self._rate_field,
        }

    @property
    def teacher(self) -> nn.Module | None:
        """The network to distill from; None without one."""
        return self._teacher

    def state(self) -> dict[str, Any]:
        """Return the complete training state, as nested dicts and lists of copied tensors and plain values."""
        return {
            "epoch": self.epoch,
            "seed": self.seed,
            "model": _copied(self.model.state_dict()),
            "optimizer": _copied(self._optimizer.state_dict()),
            "scaler": _copied(self._scaler.state_dict()),
            "average": None if self._average is None else _copied(self._average.state_dict()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state()`, bit for bit as without an interruption.

        Raises:
            CompressorError: The state belongs to another model or seed.
        """
        try:
            self.model.load_state_dict(state["model"])
            # The optimizer would otherwise keep and modify the tensors of the state.
            self._optimizer.load_state_dict(_copied(state["optimizer"]))
            self._scaler.load_state_dict(state["scaler"])
            if self._average is not None:
                self._average.load_state_dict(state["average"])
            self.epoch, seed = int(state["epoch"]), int(state["seed"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CompressorError(
                f"The saved training state does not fit: {reason}.", "Start again without it."
            ) from error
        if seed != self.seed:
            raise CompressorError(
                f"The saved training had seed {seed}, this one has {self.seed}.", "Use the saved seed."
            )


class BriefTraining:
    """Trains networks in place for a few steps, each on the same images in the same order.

    Args:
        task: Task whose training batches and loss are used.
        settings: As for any training; the learning rate is the same in all steps, and nothing is averaged or compiled.
        seed: Seed of order and augmentation.
        device: Device of the networks.
        rate_field: Recipe field with which the user can lower the learning rate.

    Raises:
        CompressorError: A network's loss is not finite.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainSettings,
        *,
        seed: int,
        device: str | torch.device = "cpu",
        rate_field: str = "training.finetune_learning_rate",
    ) -> None:
        self._task = task
        self._settings = dataclasses.replace(settings, ema_decay=0.0, channels_last=False, compile=False)
        self._seed, self._device, self._rate_field = seed, device, rate_field

    def __call__(self, model: nn.Module, steps: int) -> None:
        """Train `model` for `steps` minibatches."""
        trainer = Trainer(model, self._task, self._settings, epochs=1, seed=self._seed, device=self._device)
        trainer._wrapped.train()
        rate = self._settings.learning_rate
        sums = torch.zeros(4, dtype=torch.float64, device=trainer.device)
        with own_randomness(trainer._epoch_seed(), trainer.device):
            batches = itertools.chain.from_iterable(trainer._batches() for _ in itertools.count())
            for batch in itertools.islice(batches, steps):
                sums += trainer._step(batch, rate)
        if not torch.isfinite(sums).all():
            raise CompressorError(
                f"The loss of a candidate became NaN or infinite in its {steps} steps of training at a learning rate "
                f"of {rate:g}.",
                f"Continue with a lower rate: compress --resume RUN --set {self._rate_field}={rate / 5:g}",
            )
        trainer.model.eval()


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a module's parameters; buffers are those of the latest step.

    The decay rises to its value over the first steps, so that a short training forgets its start:
    min(decay, (1 + step) / (10 + step)).
    """

    def update(mean: Any, latest: Any, _step: Any) -> None:
        step = int(average.n_averaged)  # the argument is a copy on the weights' device, which would have to be awaited
        torch._foreach_lerp_(mean, latest, 1 - min(decay, (1 + step) / (10 + step)))

    average = AveragedModel(model, multi_avg_fn=update)
    average.n_averaged += 1  # the weights so far count; torch would overwrite them at the first step
    return average.requires_grad_(False)


@torch.no_grad()
def _swap(one: nn.Module, other: nn.Module) -> None:
    """Exchange the parameters of two modules, in place."""
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)


def _optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    momentum = settings.momentum
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=momentum, nesterov=momentum > 0)


def _copied(value: Any) -> Any:
    """Return a nested structure with its tensors copied."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return value
