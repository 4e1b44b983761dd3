"""A user's batches as feeds: how the network's inputs are found in a batch, and inputs that are held in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.data.splits import epoch_order
from compressor.training.feeds import joined
from compressor.training.randomness import own_randomness
from export.convert.trees import mapped, rows, tensors_in

Inputs = tuple[Any, ...]
MEMORY_LIMIT = 2**30
"""Bytes of inputs that are held in memory."""


class InputsOfBatch:
    """Finds the network's positional arguments in a batch of any structure.

    The arguments are the batch itself or the beginning of it: for a network of one tensor `x`, a batch is `x`,
    `(x, ...)` or a dictionary with a tensor as its first value; for one of two, `(x, y, ...)` or
    `((x, y), ...)`. For a network of named inputs a batch is a dictionary with these names, or begins with one.

    Args:
        example: Arguments for one input.
        names: Names of the arguments, if the user gave them as a dictionary; else None.
    """

    def __init__(self, example: Inputs, names: tuple[str, ...] | None = None) -> None:
        self.example, self.names = example, names

    def __call__(self, batch: Any) -> Inputs:
        """Return the arguments.

        Raises:
            CompressorError: The batch does not begin with the network's inputs.
        """
        for found in self._candidates(batch):
            if self._fits(found):
                return tuple(map(_like, found, self.example))
        raise CompressorError(
            f"A batch does not fit the network: it has {_described(batch)}, and the network takes "
            f"{_described(self.example)}.",
            "A batch should be the inputs or begin with them, as in (inputs, labels), in the form of the example.",
        )

    def _candidates(self, batch: Any) -> Iterator[Inputs]:
        count = len(self.example)
        for part in (batch, batch[0] if isinstance(batch, list | tuple) and len(batch) else None):
            if isinstance(part, Mapping):
                if self.names is not None and all(name in part for name in self.names):
                    yield tuple(part[name] for name in self.names)
                yield (part,)
                if part:
                    yield (next(iter(part.values())),)
            elif isinstance(part, list | tuple):
                yield tuple(part[:count])
                yield (part,)
            elif part is not None:
                yield (part,)

    def _fits(self, found: Inputs) -> bool:
        return len(found) == len(self.example) and all(map(_alike, found, self.example))


def _alike(found: Any, example: Any) -> bool:
    """Whether a value has the structure, the rank and the kind of numbers of the example; sizes may differ."""
    if isinstance(example, Tensor):
        return (
            isinstance(found, Tensor)
            and found.dim() == example.dim()
            and found.is_floating_point() == example.is_floating_point()
            and (found.dim() < 2 or found.shape[1] == example.shape[1])
        )
    if isinstance(example, Mapping):
        return isinstance(found, Mapping) and all(
            name in found and _alike(found[name], value) for name, value in example.items()
        )
    if isinstance(example, list | tuple):
        return isinstance(found, list | tuple) and len(found) == len(example) and all(map(_alike, found, example))
    return True


def _like(found: Any, example: Any) -> Any:
    """Return a value without the keys of dictionaries that the example lacks."""
    if isinstance(example, Mapping):
        return {name: _like(found[name], value) for name, value in example.items()}
    if isinstance(example, list | tuple):
        items = [_like(*pair) for pair in zip(found, example, strict=True)]
        return type(example)(*items) if hasattr(example, "_fields") else type(example)(items)
    return found


def _described(value: Any) -> str:
    """Describe the shapes in a value: tensors of shapes [8, 3, 32, 32] and [8]."""
    shapes = [str(list(tensor.shape)) for tensor in tensors_in(value)[:4]]
    if not shapes:
        return f"no tensors ({type(value).__name__})"
    kind = "" if isinstance(value, Tensor | list | tuple) else f" in a {type(value).__name__}"
    return f"{'tensors' if len(shapes) > 1 else 'a tensor'} of shape {' and '.join(shapes)}{kind}"


class Loader:
    """A user's re-iterable batches; their size, order and augmentation are the loader's own.

    Several processes take its batches in turn; those that do not make up a whole round are left out.

    Args:
        batches: The user's object.
        steps: Number of batches in it.
    """

    def __init__(self, batches: Iterable[Any], steps: int) -> None:
        self._batches, self._steps = batches, steps

    def steps(self, batch_size: int, world: int = 1) -> int:
        return self._steps // world

    def release(self) -> None:
        """Keeps nothing."""

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        augment: bool = False,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
        shard: tuple[int, int] = (0, 1),
        skip: int = 0,
    ) -> Iterator[Any]:
        rank, world = shard
        source = iter(self._batches)
        rounds = iter(lambda: list(itertools.islice(source, world)), [])
        if world > 1:  # loaders shuffle with the global generators when they are first read: alike in all processes
            with own_randomness(shuffle_seed or 0, torch.device("cpu")):
                rounds = itertools.chain(list(itertools.islice(rounds, 1)), rounds)
        for _ in itertools.islice(rounds, skip):
            pass
        whole = itertools.takewhile(lambda batches: len(batches) == world, rounds)
        return (mapped(lambda tensor: tensor.to(device, non_blocking=True), batches[rank]) for batches in whole)


class Memory:
    """Inputs of a network in memory, (N, ...) each, without labels.

    Args:
        inputs: Positional arguments; tensors whose first size is N have an input in each row, others belong to all.
        count: N.
    """

    def __init__(self, inputs: Inputs, count: int) -> None:
        self._inputs, self._count = inputs, count

    @classmethod
    def of(
        cls, batches: Iterable[Any], inputs: Callable[[Any], Inputs], most: int, *, alike: bool = False
    ) -> Memory:
        """Read up to `most` inputs, as many as `MEMORY_LIMIT` holds.

        Args:
            batches: The user's batches.
            inputs: Finds the network's arguments in a batch.
            most: Number of inputs after which no further batch is read.
            alike: Whether to leave out batches whose inputs have other shapes than those of the first.

        Raises:
            CompressorError: There are none, a batch does not fit the network, or the inputs differ in shape.
        """
        read: list[Inputs] = []
        count = size = 0
        for batch in batches:
            found = mapped(lambda tensor: tensor.detach().cpu(), inputs(batch))
            length = len(tensors_in(found)[0])
            if alike and read and _shapes(found) != _shapes(read[0]):
                continue
            read.append(rows(found, length, slice(0, most - count)))
            count += min(length, most - count)
            size += sum(tensor.nbytes for tensor in tensors_in(found))
            if count >= most or size >= MEMORY_LIMIT:
                break
        if not count:
            raise CompressorError("There are no inputs in the batches: they are empty.", "Pass at least one batch.")
        try:
            return cls(joined(read), count)
        except (RuntimeError, TypeError, ValueError) as error:
            raise CompressorError(
                f"The batches' inputs cannot be put together: {str(error).splitlines()[0].rstrip('.')}.",
                "Inputs for calibration should have one shape: crop or pad them.",
            ) from error

    def __len__(self) -> int:
        return self._count

    def steps(self, batch_size: int, world: int = 1) -> int:
        return max(1, self._count // batch_size)

    def release(self) -> None:
        """Keeps nothing for epochs alone."""

    def inputs(self, batch: Inputs) -> Inputs:
        return batch

    def chosen(self, indices: Tensor) -> Memory:
        """Return the inputs at these indices, in their order."""
        return Memory(rows(self._inputs, self._count, indices), len(indices))

    def sample(self, number: int, seed: int = 0) -> Memory:
        order = torch.randperm(self._count, generator=torch.Generator().manual_seed(seed))
        return self.chosen(order[:number])

    def in_memory(self) -> Memory:
        return self

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        augment: bool = False,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
        shard: tuple[int, int] = (0, 1),
        skip: int = 0,
    ) -> Iterator[Inputs]:
        order, size = epoch_order(self._count, batch_size, shuffle_seed, drop_last, shard)
        for indices in torch.split(order, size)[skip:]:
            yield mapped(lambda tensor: tensor.to(device), rows(self._inputs, self._count, indices))


def _shapes(inputs: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape[1:]) for tensor in tensors_in(inputs)]
