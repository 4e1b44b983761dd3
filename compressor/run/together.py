"""A run in several processes of `torchrun` or `accelerate launch`.

The first process takes the whole main path, and it alone writes. The others load the same network and data, and wait
(`run.follower`): before each epoch of a training the first one sends them what it trains and its complete state, and
all train this epoch together, each on its share of every batch. So whatever the first one decides or restores between
epochs holds for all, and the others need nothing of the run's folder.

Each process reports its own error, once. The others only say that another one has failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.training.team import is_lost, launched, team

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan
    from compressor.recipe import Recipe
    from compressor.training.loop import Join, Trainer
    from compressor.training.task import Task


@contextmanager
def leading() -> Iterator[None]:
    """Context of a run in the first process: if it fails, the others end as well.

    Raises:
        CompressorError: Another process has failed in the middle of an epoch.
    """
    everyone = team()
    try:
        yield
    except BaseException as error:
        if everyone is None:
            raise
        dismiss()
        if isinstance(error, RuntimeError) and is_lost(error):
            who = everyone.failure()
            message = (
                "Another process ended in the middle of an epoch, without a message."
                if who is None
                else f"{who} ended in the middle of an epoch; its own message says why."
            )
            raise CompressorError(
                message, "What was saved last is intact; continue with: compress --resume RUN"
            ) from error
        raise


def dismiss() -> None:
    """End the other processes, if there are any: they have no run to take part in, or it has failed."""
    if (everyone := team()) is not None:
        with suppress(RuntimeError):  # the launcher may be gone, too
            everyone.tell({"do": "give up"})


def gather(recipe: Recipe, task: Task) -> None:
    """Let the other processes load a run's network and data, before anything slow begins.

    Raises:
        CompressorError: One of them cannot.
    """
    everyone = team()
    if everyone is not None and recipe.epochs:
        everyone.tell({"do": "load", "recipe": recipe.model_dump(mode="json"), "inputs": inputs_of(task)})
        everyone.await_ready()


def joining(plan: ChannelPlan | None) -> Join | None:
    """Return what lets the other processes join each epoch of a trainer; None for a single process.

    Args:
        plan: Plan of the trained network; None for the dense one.
    """
    everyone = team()
    if everyone is None:
        return None

    def join(trainer: Trainer, middle: dict[str, Any] | None) -> dict[str, Any] | None:
        new, everyone.current = everyone.current is not trainer, trainer
        state: dict[str, Any] = {"trainer": middle or trainer.state()}
        if new and trainer.teacher is not None:
            state["teacher"] = dict(trainer.teacher.state_dict())
        network = None if plan is None else plan.to_json()
        everyone.tell({"do": "train", "new": new, "trainer": trainer.described(), "plan": network}, state)
        return middle

    return join


def send_result(plain: Mapping[str, Any]) -> None:
    """End the run in the other processes, with the result that the first one has; see `RunResult.plain`."""
    if (everyone := team()) is not None:
        everyone.tell({"do": "end", "result": dict(plain)})


def processes() -> int:
    """Return the number of processes that train."""
    return launched()[1]


def check_batch(recipe: Recipe, task: Task) -> None:
    """Refuse batches that the processes cannot share.

    Raises:
        CompressorError: Names a size that they can, if the recipe has the size.
    """
    world = processes()
    if world == 1 or not recipe.epochs:
        return
    if recipe.from_python:
        if (batches := inputs_of(task)) < world:
            raise CompressorError(
                f"{world} processes take {batches} batches in turn: one at least would have none.",
                "Start fewer processes, or pass smaller batches.",
            )
        return
    size = int(recipe.training.batch_size or 0)
    if size % world or size < 2 * world:
        fits = max(2 * world, size - size % world)
        raise CompressorError(
            f"{world} processes cannot share batches of {size} images equally, each with at least 2.",
            f"Start fewer processes, or give a batch that they can share: --set training.batch_size={fits}",
        )


def inputs_of(task: Task) -> int:
    """Return the number of training inputs; of batches, if a user's loader has them."""
    return 0 if task.train is None else task.train.steps(1)
