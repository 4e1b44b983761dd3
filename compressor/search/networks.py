"""The networks of plans, as they are scored and delivered: only sliced, or compensated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressor.core.errors import CompressorError
from compressor.pruning.calibration import Images, Reference, dense_copy, recorded
from compressor.pruning.compensate import EFFORTS, compensate
from compressor.pruning.moments import DenseMoments
from compressor.training.feeds import Feed, inputs_in, random_inputs

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.space import PruningSpace
    from compressor.pruning.verdict import Compensation
    from compressor.recipe import Recipe

FIT_BATCH = 64
"""Images that are prepared for the network at once."""


@dataclass(frozen=True)
class Methods:
    """How networks are compensated: each is "off" or a method of `compensate`.

    Attributes:
        scored: Candidates of the search.
        delivered: The network that is fine-tuned and delivered.
        note: Why nothing is compensated although the recipe leaves it to the network; empty if it is.
    """

    scored: str = "off"
    delivered: str = "off"
    note: str = ""


def methods(recipe: Recipe, space: PruningSpace, inputs: bool = True) -> Methods:
    """Return the methods of a recipe's `pruning.compensate`.

    By default candidates are compensated only where the network has trained weights from the beginning: weights that
    train during the search are a moving goal, with statistics that lag behind, and the data may be so small that
    fitting takes longer than scoring.

    Args:
        recipe, space: Recipe and traced network.
        inputs: Whether there are inputs to fit to.

    Raises:
        CompressorError: The recipe names a method, and the network cannot be compensated.
    """
    wanted = recipe.pruning.compensate
    if wanted == "off" or (wanted == "auto" and not inputs):
        return Methods()
    if not inputs:
        raise CompressorError(
            f"pruning.compensate is {wanted}, and there are no inputs to fit to.",
            "Pass calibration=... or train=..., or leave it out.",
        )
    try:
        # As many images as make chunks of two: of one alone a replay cannot tell whether forward mixes images.
        recorded(dense_copy(space), Images.of(space, [random_inputs(space.example_input, 16, 0)], seed=0))
    except CompressorError as error:
        if wanted == "auto":
            return Methods(note=f"Networks are not compensated. {error.message}")
        raise CompressorError(error.message, "Omit pruning.compensate, or set it to off.") from error
    if wanted == "auto":
        return Methods("quick" if recipe.pretrained or not recipe.epochs else "off", "layers")
    return Methods(wanted, wanted)


class Networks:
    """Builds the networks of plans with the current weights of the space's model.

    What all plans share, the dense network's values or their moments, is computed with the first plan, and again after
    `weights_moved`.

    Args:
        space: Pruning space of the dense network.
        feed: Inputs to fit to; their labels are not used. None if nothing is compensated.
        method: "off" for networks that are only sliced, or a method of `compensate`.
        images: Number of images of the split; "quick" takes a quarter of them.
        seed: Seed that chooses them.
        device: Device of the dense network.
    """

    def __init__(
        self,
        space: PruningSpace,
        feed: Feed | None,
        method: str = "off",
        *,
        images: int = 512,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.space, self.method = space, method
        self._seed = seed
        number = max(8, images // 4) if method == "quick" else images
        self._batches: list[tuple[Any, ...]] = []
        if method != "off":
            assert feed is not None
            self._batches = list(inputs_in(feed, number, seed, FIT_BATCH, device))
        self._shared: Reference | DenseMoments | None = None

    @property
    def compensated(self) -> bool:
        """Whether the networks are compensated; they then have the batch-norm statistics that suit them best."""
        return self.method != "off"

    def build(self, plan: ChannelPlan) -> nn.Module:
        """Return the network of a plan."""
        return self.compensation(plan).network if self.compensated else self.space.apply(plan)

    def compensation(self, plan: ChannelPlan) -> Compensation:
        """Return the compensated network of a plan, and what was done to it.

        Raises:
            CompressorError: The network cannot be compensated.
        """
        if self._shared is None:
            if self.method == "moments":
                self._shared = DenseMoments(self.space, self._batches, seed=self._seed)
            else:
                effort = EFFORTS[self.method]
                self._shared = Reference(self.space, self._batches, seed=self._seed, effort=effort)
        return compensate(self.space, plan, self._shared, self.method)

    def weights_moved(self) -> None:
        """Run the dense network again with the next plan, after it was trained."""
        self._shared = None
