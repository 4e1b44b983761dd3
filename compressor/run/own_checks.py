"""Try a user's objects once, before anything is measured: network, batches, loss and scores."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.core.plugins import raised_at, shown
from compressor.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.training.loaders import InputsOfBatch, Memory
    from compressor.training.own_task import OwnTask

CALIBRATION = 2560
"""Inputs that are read for batch norm, compensation, INT8 and comparisons, at most."""

SCORED_SHARE = 0.2
"""Share of the inputs on which candidates are compared with the dense network, and as many for the report."""

LEAST = 3
"""Inputs that compensation needs: one to fit, one to choose and one to judge."""

FEWEST = 20
"""With fewer calibration inputs all of them serve every purpose."""


@dataclass(frozen=True)
class Objects:
    """What the caller of `compress` passed; see there."""

    model: nn.Module
    example: Any
    train: Iterable[Any] | None
    evaluate: Callable[[nn.Module], float] | None
    test: Callable[[nn.Module], float] | None
    loss: Callable[[nn.Module, Any], Tensor] | None
    calibration: Iterable[Any] | None


def one_input(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], tuple[str, ...] | None]:
    """Return an example as positional arguments for one input on the CPU, and their names.

    Args:
        model: The network.
        example: A tensor, a tuple, or a dictionary. The keys of a dictionary are names of parameters of `forward`, or
            it is the only argument.

    Raises:
        CompressorError: There is no tensor in it, or the names leave out a parameter that comes before.
    """
    from export.convert.trees import moved, rows, tensors_in

    if not tensors_in(example):
        raise CompressorError(
            f"The example input must contain a tensor, got {type(example).__name__}.",
            "Pass for example torch.randn(1, 3, 224, 224).",
        )
    names: tuple[str, ...] | None = None
    if isinstance(example, Mapping):
        parameters = list(inspect.signature(model.forward).parameters)
        if all(name in parameters for name in example):
            names = tuple(name for name in parameters if name in example)
            if missing := [name for name in parameters[: len(names)] if name not in names]:
                raise CompressorError(
                    f"The example input names {', '.join(names)}, but not {missing[0]}, which forward takes before.",
                    "Name all parameters up to the last one.",
                )
            example = tuple(example[name] for name in names)
    arguments = moved(example if isinstance(example, tuple) else (example,), "cpu")
    first = tensors_in(arguments)[0]
    count = len(first) if first.dim() else 0
    if count > 1:
        arguments = rows(arguments, count, slice(1))
    return arguments, names


def _has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward hooks besides those of torch.nn.utils, such as weight norm's."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not type(hook).__module__.startswith("torch.nn.utils") for hook in hooks)


class Checked:
    """Tries everything that the caller passed once, on a copy of the network.

    Args:
        given: The caller's objects.
        model: Copy of the network in eval mode on the run's device; checks may change it.
        example: Arguments for one input.
        names: Their names, if the caller gave them.
        recipe: The run's recipe.
    """

    def __init__(
        self,
        given: Objects,
        model: nn.Module,
        example: tuple[Any, ...],
        names: tuple[str, ...] | None,
        recipe: Recipe,
    ) -> None:
        from compressor.training.loaders import InputsOfBatch

        self.given, self.model, self.example, self.recipe = given, model, example, recipe
        self.inputs: InputsOfBatch = InputsOfBatch(example, names)
        self.device = next((tensor.device for tensor in model.parameters()), "cpu")
        self.notes: list[str] = []
        self.train = given.train
        self.held: Memory | None = None
        """Inputs of the caller's `train` that `self.train` lacks."""
        self.split = "test"

    def task(self) -> tuple[OwnTask, list[str]]:
        """Return the task, and what the user should know of it.

        Raises:
            CompressorError: Something does not fit.
        """
        from compressor.training.likeness import RawOutputs, ScoresOfClasses, likeness_of
        from compressor.training.own_task import OwnTask

        given = self.given
        outputs = self._outputs()
        if hooked := [name or "the network" for name, each in given.model.named_modules() if _has_hooks(each)]:
            self.notes.append(f"Forward hooks are not copied: the run's networks have none of {', '.join(hooked[:3])}.")
        likeness = likeness_of(outputs) if given.loss is None else RawOutputs()
        train, loss = self._training()
        calibration, search, test = self._calibration()
        if train is None and calibration is not None and self.recipe.epochs:
            self._try_distillation(calibration)
        needed = given.evaluate is None
        if needed and search is None:
            raise CompressorError(
                "Nothing says how good a network is.",
                "Pass evaluate=..., a function of a network that returns a number; or calibration=..., batches on "
                "which networks are compared with the dense one.",
            )
        if needed and isinstance(likeness, ScoresOfClasses) and train is None:
            self.notes.append(
                f"The network's output of {outputs[0].shape[1]} numbers is taken for the scores of classes."
            )
        score = given.test or given.evaluate
        if given.evaluate is not None and given.test is None:
            self.notes.append("The reported score is the one that chose the network: there is no test function.")
        plain: dict[str, Any] = {
            "train": train, "loss": loss, "calibration": calibration, "search": search, "test": test,
            "evaluate": given.evaluate, "score": score, "likeness": likeness, "seed": self.recipe.seed,
            "split": self.split,
        }  # fmt: skip
        trial = OwnTask(self.inputs, **plain)
        dense = self._scored(trial, "evaluate", given.evaluate)
        reported = dense if given.test is None else self._scored(trial, "test", given.test)
        return OwnTask(self.inputs, **plain, dense=dense, share=0 <= reported <= 1), self.notes

    def _outputs(self) -> list[Tensor]:
        import torch

        from export.convert.trees import moved, outputs_of

        try:
            with torch.no_grad():
                found = outputs_of(self.model(*moved(self.example, self.device)))
        except Exception as error:  # a user's network may raise anything
            raise CompressorError(
                f"The network does not run on the example input: {shown(error)}{raised_at(error)}.",
                "Pass what forward takes: a tensor, a tuple of arguments, or a dictionary of them.",
            ) from error
        if not found:
            raise CompressorError(
                "The network returns no tensor of numbers.", "Return tensors, also in a tuple or a dictionary."
            )
        return found

    def _training(self) -> tuple[Any, Callable[[nn.Module, Any], Tensor] | None]:
        """Try the loss on the first batch, hold out what choosing and judging need, and count the batches."""
        from compressor.training.loaders import Loader
        from compressor.training.own_task import counted, cross_entropy

        if self.given.train is None:
            return None, None
        batch = self._first("train", self.given.train)
        self._try_loss(self.given.loss or cross_entropy, batch)
        if self.given.evaluate is None and self.given.calibration is None:
            self._hold_out(self.given.train)
        assert self.train is not None
        steps = counted(self.train)
        self._first("train", self.train)  # counting may have read them all
        return Loader(self.train, steps), self.given.loss or cross_entropy

    def _hold_out(self, train: Iterable[Any]) -> None:
        """Keep a part of `train` from training where it can be divided."""
        from compressor.training.held_out import divided
        from compressor.training.loaders import MEMORY_LIMIT
        from export.convert.trees import tensors_in

        size = sum(tensor.nbytes for tensor in tensors_in(self.example))
        most, parts = min(CALIBRATION, MEMORY_LIMIT // max(size, 1)), 1 if self.given.test is not None else 2

        def number(total: int) -> int:
            return parts * max(1, round(SCORED_SHARE * min(total, most))) if total >= FEWEST else 0

        try:
            found = divided(
                train, number, lambda batch: len(tensors_in(self.inputs(batch))[0]), self.recipe.seed
            )
            if found is not None:
                self.held = self._inputs_in("train", found[1], alike=True, most=number(CALIBRATION))
                self.train = found[0]
        except CompressorError:  # batches that do not fit, or too few of one shape: all are read for calibration
            return

    def _first(self, name: str, batches: Iterable[Any]) -> Any:
        """Return the first of some batches, read twice."""
        import torch

        from compressor.training.randomness import own_randomness

        for _ in range(2):
            try:
                with own_randomness(self.recipe.seed, torch.device("cpu")):
                    batch = next(iter(batches))
            except StopIteration:
                raise CompressorError(
                    f"{name} has no batches.", "Pass at least one, and batches that can be read again."
                ) from None
            except Exception as error:  # a user's loader may raise anything
                raise CompressorError(
                    f"{name} cannot be read: {shown(error)}{raised_at(error)}."
                ) from error
        return batch

    def _try_loss(self, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> None:
        import torch

        from compressor.pruning.space import fixed_copy
        from compressor.training.randomness import own_randomness
        from export.convert.trees import mapped

        name = "loss" if self.given.loss is not None else "the cross-entropy of a batch of (inputs, labels)"
        hint = "Pass loss=..., a function of a network and a batch that returns a scalar."
        network = fixed_copy(self.model).train()
        placed = mapped(lambda tensor: tensor.to(self.device), batch)
        try:
            with own_randomness(self.recipe.seed, torch.device(self.device)):
                found = loss(network, placed)
        except Exception as error:  # a user's function may raise anything
            raise CompressorError(
                f"On the first batch of train, {name} raises {shown(error)}{raised_at(error)}.", hint
            ) from error
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            what = f"of shape {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
            raise CompressorError(f"loss returned a value {what}, expected a scalar tensor.", "Return its mean.")
        if not bool(torch.isfinite(found)):
            raise CompressorError(f"On the first batch of train, {name} is {float(found.detach())}.", hint)
        if not found.requires_grad:
            raise CompressorError(
                f"{name} has no gradient: it does not depend on the network's parameters.",
                "Compute it from the network's output, without detach or no_grad.",
            )

    def _calibration(self) -> tuple[Memory | None, Memory | None, Memory | None]:
        """Read the inputs for statistics and compensation, for candidates, and for the report."""
        given, recipe = self.given, self.recipe
        trains, whole = bool(recipe.epochs or recipe.search.brief_iterations), None
        if given.calibration is not None:
            whole = self._inputs_in("calibration", given.calibration)
        elif self.train is not None:
            try:
                whole = self._inputs_in("train", self.train, alike=True)
            except CompressorError as error:
                if given.evaluate is None:
                    raise
                self.notes.append(f"{error.message} Pass calibration=... for networks that are compensated.")
        if whole is None:
            self.notes.append(
                "There are no calibration inputs: slim networks are not compensated, and keep the dense network's "
                "batch-norm statistics."
            )
            return None, None, None
        if given.evaluate is not None:
            return whole, None, None
        if self.held is not None:
            return whole, *self._apart(self.held)
        if len(whole) < FEWEST:
            self.notes.append(
                f"There are {len(whole)} calibration inputs only: the same ones calibrate, choose and judge."
            )
            seen = trains and (given.calibration is None or given.train is None)
            self._reported_on("training" if seen else "search")
            return whole, whole, whole if given.test is None else None
        if trains and given.calibration is None:
            self._reported_on("training")
            self.notes.append(
                "The inputs on which networks are chosen and judged are trained on, too: train cannot be divided. Pass "
                "evaluate=... and test=..., or calibration=... with other inputs."
            )
        held = max(1, round(SCORED_SHARE * len(whole)))
        search, test, rest = self._drawn(whole, held, held)
        return rest, search, test if given.test is None else None

    def _apart(self, held: Memory) -> tuple[Memory, Memory | None]:
        """Return the inputs for candidates and for the report among those that training does not see."""
        if self.given.test is not None:
            search, test = held, None
        else:
            search, test, _ = self._drawn(held, len(held) // 2, len(held) - len(held) // 2)
        judged = "" if test is None else f", {len(test)} judge it"
        self.notes.append(f"Training leaves out inputs of train: {len(search)} choose the network{judged}.")
        return search, test

    def _drawn(self, inputs: Memory, first: int, second: int) -> list[Memory]:
        """Return two random parts of some inputs, and the others."""
        import torch

        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(self.recipe.seed))
        both = first + second
        return [inputs.chosen(part) for part in (order[:first], order[first:both], order[both:])]

    def _reported_on(self, split: str) -> None:
        """Name the inputs of the reported score, unless a function gives it."""
        if self.given.test is None:
            self.split = split

    def _inputs_in(self, name: str, batches: Iterable[Any], alike: bool = False, most: int = CALIBRATION) -> Memory:
        """Return the inputs in some batches, after the network has run on some of them."""
        import torch

        from compressor.training.loaders import Memory
        from compressor.training.randomness import own_randomness

        self._first(name, batches)
        try:
            with own_randomness(self.recipe.seed, torch.device("cpu")):
                found = Memory.of(batches, self.inputs, most, alike=alike)
        except CompressorError as error:
            if isinstance(batches, torch.Tensor):  # its rows were taken for batches
                raise CompressorError(
                    f"{name} is one tensor of shape {list(batches.shape)}, expected batches.",
                    f"Pass a list of batches, such as {name}=[inputs] or {name}=inputs.split(16).",
                ) from None
            raise CompressorError(f"{name}: {error.message}", error.hint) from None
        if len(found) < LEAST:
            raise CompressorError(
                f"{name} holds {len(found)} input{'s' if len(found) > 1 else ''}; at least {LEAST} are needed.",
                "Better hundreds: networks are fitted to them and compared on them.",
            )
        self._run(name, found)
        return found

    def _run(self, name: str, inputs: Memory) -> None:
        """Refuse inputs that the network does not run on."""
        import torch

        from export.convert.trees import outputs_of

        try:
            with torch.no_grad():
                found = outputs_of(self.model(*next(inputs.batches(2, device=self.device))))
        except Exception as error:  # a user's network may raise anything
            raise CompressorError(
                f"The network does not run on the inputs in {name}: {shown(error)}.",
                "They should have the form of the example input.",
            ) from error
        if not all(bool(torch.isfinite(each).all()) for each in found):
            raise CompressorError(
                f"The network's outputs on {name} are not finite.", "Are its weights, or the inputs, NaN?"
            )

    def _try_distillation(self, inputs: Memory) -> None:
        """Refuse to train without labels if the network returns other tensors in training than in evaluation."""
        import torch

        from compressor.pruning.space import fixed_copy
        from compressor.training.likeness import same_shapes
        from compressor.training.randomness import own_randomness
        from export.convert.trees import outputs_of

        batch = next(inputs.batches(2, device=self.device))
        hint = "Pass epochs=0, which trains nothing, or train=... and loss=..."
        try:
            with torch.no_grad(), own_randomness(self.recipe.seed, torch.device(self.device)):
                goals, found = outputs_of(self.model(*batch)), outputs_of(fixed_copy(self.model).train()(*batch))
        except Exception as error:  # a user's network may raise anything
            raise CompressorError(
                f"In training mode the network does not run on inputs alone: {shown(error)}{raised_at(error)}.", hint
            ) from error
        if not same_shapes(found, goals):
            shapes = [", ".join(str(list(each.shape[1:])) for each in part) or "nothing" for part in (goals, found)]
            raise CompressorError(
                f"Without labels a network learns from the dense one's outputs ({shapes[0]}), but in training mode it "
                f"returns others ({shapes[1]}).",
                hint,
            )

    def _scored(self, task: OwnTask, name: str, function: Callable[[nn.Module], float] | None) -> float:
        """Return what a function gives for the dense network; it must be finite."""
        if function is None:
            return 0.0
        value = task.called(name, function, self.model, self.device)
        if not math.isfinite(value):
            raise CompressorError(
                f"{name} returns {value} for the dense network, expected a finite number.", "Higher should be better."
            )
        return value
