"""Which network a compensation returns, and the report of what was done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.models.computed import evaluated
from compressor.pruning.calibration import Images, Space
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.sites import Site
from compressor.pruning.skeleton import copy_structure

NO_BETTER = "no fit has a lower error on the images that choose"
COMPUTED = "its weights are computed while the network runs"
NOT_CLOSER = "the outputs on the images that judge are no closer to the dense network's with compensation"


@dataclass(frozen=True)
class Compensation:
    """A compensated network, and what was done to it.

    Args:
        network: The slim network.
        refitted: Layer -> its squared error on the images that chose its fit, as a share of the sliced layer's.
        left: Layer that lost inputs and is as sliced -> the reason.
        error, error_cut: Squared error of the network's outputs on the images that judge, relative to the dense
            network's outputs, and that of the network that is only sliced. No fit and no choice of strengths saw them.
        images: Number of images used, including those that choose and judge.
        statistics: Of its batch norms: "dense", or "own" if re-estimated ones make the outputs closer.
    """

    network: nn.Module
    refitted: Mapping[str, float]
    left: Mapping[str, str]
    error: float
    error_cut: float
    images: int
    statistics: str


@dataclass(frozen=True)
class Exact:
    """Outputs of the dense network on the images that choose, and on those that judge."""

    choose: list[list[Tensor]]
    judge: list[list[Tensor]]

    @classmethod
    def of(cls, images: Images, dense: nn.Module) -> Exact:
        """Run the dense network."""
        return cls(images.outputs(dense, images.choose), images.outputs(dense, images.judge))


def judged(
    space: Space,
    plan: ChannelPlan,
    small: nn.Module,
    sites: Iterable[Site],
    refitted: Mapping[str, float],
    left: Mapping[str, str],
    exact: Exact,
    images: Images,
) -> Compensation:
    """Return the compensated network, or the one that is only sliced, and the report.

    The images that choose decide whether the batch norms have statistics of their own. Those that judge decide one
    thing only: whether the compensated network is returned. It is if its outputs are closer to the dense network's.
    """
    widths = [space.widths(each.widths)[None] for each in (space.dense(), plan)]
    lost = [each.name for each in space.layers if each.in_channels(widths[1])[0] < each.in_channels(widths[0])[0]]
    statistics, cut = "dense", space.apply(plan)
    own = own_statistics(small, images, range(images.judge.start))
    if own is not None:
        errors = [difference(exact.choose, images.outputs(each, images.choose)) for each in (small, own)]
        if errors[1] < errors[0]:
            small, statistics = own, "own"
    error, error_cut = (difference(exact.judge, images.outputs(each, images.judge)) for each in (small, cut))
    if not error < error_cut:
        return Compensation(cut, {}, dict.fromkeys(lost, NOT_CLOSER), error_cut, error_cut, len(images), "dense")
    names = {site.layer for site in sites}
    named = {
        name: left.get(name, NO_BETTER if name in names else COMPUTED) for name in lost if name not in refitted
    }
    return Compensation(small, refitted, named, error, error_cut, len(images), statistics)


def own_statistics(network: nn.Module, images: Images, which: range) -> nn.Module | None:
    """Return a copy of a network whose batch norms have the statistics of these chunks; None if it has none."""
    network = copy_structure(network, lambda tensor: tensor.detach().clone())
    kinds = nn.modules.batchnorm._BatchNorm
    norms = [each for each in network.modules() if isinstance(each, kinds) and each.track_running_stats]
    before = [norm.momentum for norm in norms]
    with evaluated(network), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # all chunks have equal weight
            norm.train()
        if norms:
            images.run(network, which)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return network if norms else None


def difference(exact: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> float:
    """Return the squared error of outputs, as a share of the squares of the exact ones."""
    pairs = [(a, b) for x, y in zip(exact, other, strict=True) for a, b in zip(x, y, strict=True)]
    total = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return total / max(1e-300, sum(float(a.double().square().sum()) for a, _ in pairs))
