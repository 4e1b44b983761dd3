"""A process that takes part in the trainings of another one; see `run.together`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.core.processes import postponed
from compressor.run.together import inputs_of
from compressor.training.team import is_lost, launched, team

if TYPE_CHECKING:
    from compressor.run.load import Loaded, Loader
    from compressor.training.loop import Trainer


class FirstEnded(CompressorError):
    """The first process ended without a result; it reports the reason itself."""

    def __init__(self) -> None:
        super().__init__("The first process of this run ended without a result.", "Its own message says why.")


def follows() -> bool:
    """Return whether this process follows another one."""
    return launched()[0] > 0


def follow(loader: Loader) -> dict[str, Any]:
    """Take part in the trainings of the first process until its run ends.

    Args:
        loader: Loads the run's objects, as in the first process.

    Returns:
        The directory, manifest and exit code of the run, and the builder of its network.

    Raises:
        FirstEnded: The first process ended without a result.
        CompressorError: This process cannot take part; the message names it.
    """
    everyone = team()
    assert everyone is not None
    follower: _Follower | None = None
    try:
        while True:
            message, state = everyone.hear()
            if message["do"] == "load":
                follower = _Follower(loader, message)
                everyone.ready()
            elif message["do"] == "train" and follower is not None:
                follower.train(message, state)
            elif message["do"] == "end":
                return {**message["result"], "builder": None if follower is None else follower.builder}
            else:
                raise FirstEnded
    except FirstEnded:
        raise
    except RuntimeError as error:
        if is_lost(error):
            raise FirstEnded from error
        everyone.failed()
        raise
    except CompressorError as error:
        everyone.failed()
        raise CompressorError(f"{everyone.name}: {error.message}", error.hint) from error
    except Exception:
        everyone.failed()
        raise


class _Follower:
    """A process with the same network and data as the first one, which trains what that one sends.

    Args:
        loader: Loads the network and the data.
        message: The job's recipe and its number of training inputs.

    Raises:
        CompressorError: Something is missing here, or differs from what the first process has.
    """

    def __init__(self, loader: Loader, message: Mapping[str, Any]) -> None:
        import torch

        from compressor.core.plugins import load_plugins
        from compressor.recipe import Recipe
        from compressor.recipe.validation import validated
        from compressor.run.job import trace

        load_plugins()
        loaded: Loaded = loader(validated(Recipe, message["recipe"], "The first process's recipe"))
        self.builder, self._task = loaded.builder, loaded.task
        if (inputs := inputs_of(self._task)) != message["inputs"]:
            raise CompressorError(
                f"There are {inputs} training inputs here, and {message['inputs']} in the first process.",
                "Every machine needs the same data under the same path.",
            )
        self._space = trace(loaded.recipe, loaded.model, loaded.task.example)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._dense = loaded.model.to(self._device)
        self._trainer: Trainer | None = None
        self._middle: dict[str, Any] | None = None

    def train(self, message: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Take part in one epoch, or in the rest of one."""
        import torch

        if message["new"]:
            self._trainer = None  # its memory is for the next one
            self._trainer = self._created(message, state.get("teacher"))
        assert self._trainer is not None
        sent = state["trainer"]
        self._middle = None
        if "done" in sent:  # its sums and random numbers are those of the first process
            self._middle = {**sent, "sums": torch.zeros_like(sent["sums"]), "random": None}
        self._trainer.restore(sent)
        with postponed(note=""):  # the first process decides when a signal stops the epoch, and ends it
            self._trainer.run_epoch()

    def _created(self, message: Mapping[str, Any], weights: Mapping[str, Any] | None) -> Trainer:
        from compressor.pruning.plan import ChannelPlan
        from compressor.training.loop import Trainer
        from compressor.training.settings import TrainSettings

        plan, described = message["plan"], message["trainer"]
        network = self._dense if plan is None else self._space.apply(ChannelPlan.from_json(plan))
        teacher = None
        if weights is not None:
            teacher = copy.deepcopy(self._dense)
            teacher.load_state_dict(weights)
        described = {**described, "settings": TrainSettings(**described["settings"])}
        return Trainer(
            network,
            self._task,
            device=self._device,
            teacher=teacher,
            join=lambda *_: self._middle,
            **described,
        )
