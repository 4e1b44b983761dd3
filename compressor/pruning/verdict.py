"""Which network a compensation returns, and the report of what was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.models.computed import evaluated
from compressor.pruning.calibration import Images, Reference
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.removal import inside
from compressor.pruning.skeleton import copy_structure

NO_BETTER = "no fit has a lower error on the images that choose"
COMPUTED = "its weights are computed while the network runs"
NOT_CLOSER = "the outputs on the images that judge are not surely closer to the dense network's with compensation"
SURE = 1.0
"""Standard errors by which the outputs' error must fall; a fall at a single image is one."""


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


def judged(
    reference: Reference, plan: ChannelPlan, small: nn.Module, refitted: Mapping[str, float], left: Mapping[str, str]
) -> Compensation:
    """Return the compensated network, or the one that is only sliced, and the report.

    The images that choose decide whether the batch norms have statistics of their own. Those that judge decide one
    thing only: whether the compensated network is returned. Both need outputs that are `closer` to the dense network's.

    Args:
        reference: The dense network and the images.
        plan: The plan.
        small: Its compensated network.
        refitted, left: Layers that were refitted -> their error, and others -> the reason.
    """
    space, images = reference.space, reference.images
    widths = [space.widths(each.widths)[None] for each in (space.dense(), plan)]
    gone = space.replaced(plan)
    lost = [
        each.name
        for each in space.layers
        if each.in_channels(widths[1])[0] < each.in_channels(widths[0])[0] and not inside(each.name, gone)
    ]
    small, statistics = _with_statistics(reference, small)
    cut, of_cut = _with_statistics(reference, space.apply(plan))
    exact = reference.judging
    found, found_cut = (images.outputs(each, images.judge) for each in (small, cut))
    error, error_cut = (difference(exact, each) for each in (found, found_cut))
    if not closer(exact, found, found_cut):
        return Compensation(cut, {}, dict.fromkeys(lost, NOT_CLOSER), error_cut, error_cut, len(images), of_cut)
    names = {site.layer for site in reference.sites}
    named = {
        name: left.get(name, NO_BETTER if name in names else COMPUTED) for name in lost if name not in refitted
    }
    return Compensation(small, refitted, named, error, error_cut, len(images), statistics)


def _with_statistics(reference: Reference, network: nn.Module) -> tuple[nn.Module, str]:
    """Return a network with the batch-norm statistics that suit it, and whose they are: "dense" or "own"."""
    images = reference.images
    own = own_statistics(network, images, range(images.judge.start))
    if own is not None and closer(
        reference.choosing, *(images.outputs(each, images.choose) for each in (own, network))
    ):
        return own, "own"
    return network, "dense"


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


def closer(exact: Sequence[Sequence[Tensor]], new: Sequence[Sequence[Tensor]], old: Sequence[Sequence[Tensor]]) -> bool:
    """Whether new outputs are surely closer to the exact ones than old ones.

    The mean over images of the fall of the squared error must be above `SURE` of its standard errors, so that a single
    image with large outputs does not decide. With one image there is no standard error, and any fall counts.
    """
    fall = _squares(exact, old) - _squares(exact, new)
    error = float(fall.std()) / len(fall) ** 0.5 if len(fall) > 1 else 0.0
    return float(fall.mean()) > SURE * error


def difference(exact: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> float:
    """Return the squared error of outputs, as a share of the squares of the exact ones."""
    zero = [[torch.zeros_like(each) for each in chunk] for chunk in exact]
    return float(_squares(exact, other).sum()) / max(1e-300, float(_squares(exact, zero).sum()))


def _squares(exact: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the squared difference of the outputs for each image, (images,), float64."""
    chunks = []
    for x, y in zip(exact, other, strict=True):
        rows = [(a - b).double().square().reshape(len(a), -1).sum(1) for a, b in zip(x, y, strict=True)]
        chunks.append(torch.stack(rows).sum(0))
    return torch.cat(chunks)
