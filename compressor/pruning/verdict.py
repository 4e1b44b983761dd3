"""Which network a compensation returns, and the report of what was done."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.models.computed import evaluated
from compressor.pruning.calibration import Images, Space
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.sites import Site

NO_BETTER = "no fit has a lower error on the images left out"
COMPUTED = "its weights are computed while the network runs"


@dataclass(frozen=True)
class Compensation:
    """A compensated network, and what was done to it.

    Args:
        network: The slim network.
        refitted: Layer -> its squared error on the images left out, as a share of the sliced layer's.
        left: Layer that lost inputs and is as sliced -> the reason.
        error, error_cut: Squared error of the network's outputs on the images left out, relative to the dense
            network's outputs, and that of the network that is only sliced.
        images: Number of images used, including those left out.
        statistics: Of its batch norms: "dense", or "own" if re-estimated ones make the outputs closer.
    """

    network: nn.Module
    refitted: Mapping[str, float]
    left: Mapping[str, str]
    error: float
    error_cut: float
    images: int
    statistics: str


def judged(
    space: Space,
    plan: ChannelPlan,
    small: nn.Module,
    sites: Iterable[Site],
    refitted: Mapping[str, float],
    left: Mapping[str, str],
    exact: Sequence[Sequence[Tensor]],
    images: Images,
) -> Compensation:
    """Return the network whose outputs on the images left out are closest to the dense network's, and the report.

    It is the compensated one, the same with batch-norm statistics of its own, or the one that is only sliced.
    """
    widths = [space.widths(each.widths)[None] for each in (space.dense(), plan)]
    lost = [each.name for each in space.layers if each.in_channels(widths[1])[0] < each.in_channels(widths[0])[0]]
    error, error_cut = images.error(small, exact), images.error(cut := space.apply(plan), exact)
    statistics = "dense"
    own = own_statistics(small, [chunk for index, chunk in enumerate(images.chunks) if not images.left_out(index)])
    if own is not None and (found := images.error(own, exact)) < error:
        small, error, statistics = own, found, "own"
    if error > error_cut:
        reason = "the outputs on the images left out are closer to the dense network's without compensation"
        return Compensation(cut, {}, dict.fromkeys(lost, reason), error_cut, error_cut, len(images), "dense")
    names = {site.layer for site in sites}
    named = {
        name: left.get(name, NO_BETTER if name in names else COMPUTED) for name in lost if name not in refitted
    }
    return Compensation(small, refitted, named, error, error_cut, len(images), statistics)


def own_statistics(network: nn.Module, chunks: Sequence[tuple[Any, ...]]) -> nn.Module | None:
    """Return a copy of a network whose batch norms have the statistics of these inputs; None if it has none."""
    network = copy.deepcopy(network)
    kinds = nn.modules.batchnorm._BatchNorm
    norms = [each for each in network.modules() if isinstance(each, kinds) and each.track_running_stats]
    before = [norm.momentum for norm in norms]
    with evaluated(network), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # all chunks have equal weight
            norm.train()
        for chunk in chunks if norms else ():
            network(*chunk)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return network if norms else None
