"""What a run optimizes: its batches, its loss, and the scores of its networks.

Search, training, export and report know a `Task` only. `Classification` is that of images by class,
`Segmentation` that of pixels, `Detection` that of boxes; `OwnTask` is made of a user's own loaders and functions.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressor.core.metrics import AGREEMENT, CLOSENESS, Metric
from compressor.training.feeds import Batches, Feed, inputs_in
from compressor.training.scoring import share_right

if TYPE_CHECKING:
    from compressor.training.settings import TrainSettings

Precision = Callable[[], AbstractContextManager[Any]]
"""Opens the autocast of a training step."""


@dataclass(frozen=True)
class Losses:
    """Result of a forward pass in training.

    Attributes:
        loss: Loss on the batch's labels, a scalar; None without labels.
        distilled: Distance from the teacher's outputs, a scalar; None without a teacher.
        inputs: Number of inputs in the batch.
        right: Number of them that are answered correctly; None where that has no meaning.
    """

    loss: torch.Tensor | None
    distilled: torch.Tensor | None
    inputs: int
    right: torch.Tensor | None = None

    def together(self, distill_weight: float) -> torch.Tensor:
        """Return what is minimized: the teacher's share and that of the labels."""
        if self.distilled is None or self.loss is None:
            found = self.loss if self.distilled is None else self.distilled
            assert found is not None  # a task without labels is only trained with a teacher
            return found
        return (1 - distill_weight) * self.loss + distill_weight * self.distilled


@dataclass(frozen=True)
class Examined:
    """Result of a network on the test split.

    Attributes:
        score: In the unit of the task's metric.
        answers: A classifier's answers and the labels, int64 (N,) each, of which the score is computed; None for tasks
            without both.
    """

    score: float
    answers: tuple[torch.Tensor, torch.Tensor] | None


class Task(ABC):
    """What a run optimizes.

    Attributes:
        metric: What the test split is scored by.
        example: Arguments of the network for one input; only shapes and types matter.
        train: Batches to train on; None if nothing can be trained.
        search: Inputs on which candidates are scored, disjoint from `train`; None if a user's function scores them.
        test: Inputs of the reported score, which nothing else reads; None if a user's function scores.
        calibration: Inputs that batch norm, compensation and INT8 read, without labels; None if there are none.
        labelled: Whether there is a loss of its own; else only a teacher trains.
        classes: Number of outputs of a classifier; 0 for other networks.
        portable: Whether other processes can score candidates.
        batch_size: Inputs per batch where nothing is trained.
        split: Name of the split of the reported score: "test"; of a user's few inputs "training" where they are
            trained on, or "search" where they only choose the network.
    """

    metric = Metric()
    example: tuple[Any, ...] = ()
    train: Batches | None = None
    search: Feed | None = None
    test: Feed | None = None
    calibration: Feed | None = None
    labelled = True
    classes = 0
    portable = False
    batch_size = 128
    split = "test"

    # ---------------------------------------------------------------- training
    @abstractmethod
    def losses(
        self,
        model: nn.Module,
        batch: Any,
        teacher: nn.Module | None,
        settings: TrainSettings,
        precision: Precision,
    ) -> Losses:
        """Run a training batch through a network and, if there is one, through its teacher."""

    def reconstruction(self, device: str | torch.device, seed: int) -> Any:
        """Return batches for the criterion "reconstruction", as for `PruningSpace.rank`.

        Returns:
            None without inputs, and if what `gradients` returns serves as well.
        """
        feed = self.calibration
        return None if feed is None else list(inputs_in(feed, 2 * self.batch_size, seed, self.batch_size, device))

    def gradients(self, device: str | torch.device, seed: int) -> Any:
        """Return data for criteria that need gradients of the loss, as for `PruningSpace.rank`; None without a loss."""
        return None

    # ---------------------------------------------------------------- scores
    def search_goals(
        self, dense: nn.Module, feed: Feed | None, *, device: str | torch.device, batch_size: int
    ) -> Any:
        """Return what candidates are compared with, if that is the dense network; else None."""
        return None

    @abstractmethod
    def search_score(
        self,
        model: nn.Module,
        feed: Feed | None,
        goals: Any,
        *,
        device: str | torch.device,
        batch_size: int,
        floor: float | None = None,
    ) -> float:
        """Return the score of a candidate, 0..1.

        Args:
            model: Network on `device`.
            feed: The search inputs, or a sample of them.
            goals: Result of `search_goals` on the same inputs.
            device: Device of the batches.
            batch_size: Inputs per batch.
            floor: Stop as soon as this score cannot be reached, and return one below it.
        """

    def test_goals(self, dense: nn.Module, device: str | torch.device) -> Any:
        """Return what the test score compares with, if that is the dense network; else None."""
        return None

    @abstractmethod
    def test_score(self, model: nn.Module, goals: Any, device: str | torch.device) -> float:
        """Return the reported score of a network, in the metric's unit."""

    def answers(
        self, model: nn.Module, device: str | torch.device
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return a classifier's answers and the labels on the test split, int64 (N,); None for tasks without both."""
        return None

    def tested(self, model: nn.Module, goals: Any, device: str | torch.device) -> Examined:
        """Test a network in one pass: its reported score, and the answers that it comes from."""
        found = self.answers(model, device)
        return Examined(self.test_score(model, goals, device) if found is None else share_right(*found), found)

    def on_search(self) -> Task:
        """Return the task whose reported score is that of the search inputs, in the unit of its own metric."""
        other = copy.copy(self)
        other.test = self.search
        return other

    def on_calibration(self, seed: int) -> Task | None:
        """Return the task whose search inputs are as many of the calibration; None if they cannot be scored."""
        if self.calibration is None or self.search is None:
            return None
        other = copy.copy(self)
        other.search = self.calibration.sample(len(self.search), seed)
        return other

    def scorer(self, dense: nn.Module, device: str | torch.device) -> Callable[[nn.Module], float]:
        """Return the function that gives a network's reported score, beside the dense network where that counts."""
        goals = self.test_goals(dense, device)
        return lambda network: self.test_score(network, goals, device)

    def judge(self, dense: nn.Module, device: str | torch.device) -> tuple[Metric, Callable[[nn.Module], float]]:
        """Return what two networks are compared by on the search inputs: a metric, and the function that computes it.

        It is the reported metric; but instead of the agreement, which is coarse on few inputs, the closeness.
        """
        on_search, feed = self.on_search(), self.search
        if on_search.metric.name != AGREEMENT:
            return on_search.metric, on_search.scorer(dense, device)
        goals = self.search_goals(dense, feed, device=device, batch_size=self.batch_size)
        return Metric(CLOSENESS), lambda network: self.search_score(
            network, feed, goals, device=device, batch_size=self.batch_size
        )

    @abstractmethod
    def file_score(
        self, path: Path, network: nn.Module, goals: Any, advance: Callable[[int], None]
    ) -> float | None:
        """Return the reported score of an ONNX file; None if it cannot be scored.

        Args:
            path: The file.
            network: The network that it was exported from.
            goals: Result of `test_goals`.
            advance: Receives the number of inputs after each batch.
        """

    def file_answers(self, path: Path) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the answers of an ONNX file and the labels, like `answers` of a network."""
        return None

    @abstractmethod
    def file_judge(self, number: int, seed: int, network: nn.Module) -> Callable[[Path], float]:
        """Return a function that scores an ONNX file of a network on a sample of the search inputs, 0..1."""

    def spread(self, number: int, seed: int) -> dict[str, int]:
        """Return how many of the calibration inputs each class has; empty without classes."""
        return {}

    @property
    def real(self) -> Feed | None:
        """Real inputs for comparing files with the network, those that nothing was chosen by if there are any."""
        return self.test or self.search or self.calibration

    @property
    def test_inputs(self) -> int | None:
        """Number of inputs of the reported score; None if it is not known."""
        return None if self.test is None else len(self.test)

    # ---------------------------------------------------------------- descriptions
    def facts(self) -> dict[str, Any]:
        """Return what a network's files say about its inputs and outputs; JSON's kinds only."""
        return {}
