"""The weights of a layer in the dense and the slim network, and how refitted ones are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compressor.pruning.calibration import Space
from compressor.pruning.least_squares import LARGEST, Fit, Moments, fit_moments
from compressor.pruning.sites import Site

TOO_LARGE = f"its patches have more than {LARGEST} values"


class Refit:
    """The weights of one site in the dense and the slim network.

    Args:
        dense, slim: Parameters and buffers by name.
        kept: Axis of the weight -> kept indices.
    """

    def __init__(
        self,
        space: Space,
        site: Site,
        dense: Mapping[str, Tensor],
        slim: Mapping[str, Tensor],
        kept: Mapping[int, Tensor],
    ) -> None:
        self.site, self.tensors = site, slim
        self.weight, self.dense_weight = slim[site.weight], dense[site.weight].detach()
        out_axis, self.in_axis = (1, 0) if site.geometry.transposed else (0, 1)
        self.kept_out, self.kept_in = kept.get(out_axis), kept.get(self.in_axis)
        #: Neighbouring inputs of a linear layer that belong to one channel that was flattened.
        self.run = 1
        for axis, layout in space.slicer.axes.get(site.weight, ()):
            if axis == self.in_axis and not site.geometry.rank:
                self.run = space.slicer.layouts[layout].run
        groups = site.geometry.groups
        if groups > 1 and self.kept_out is not None:
            # Whole groups may be gone, such as channels of a depthwise convolution.
            groups = len(torch.unique(self.kept_out // (self.dense_weight.shape[0] // groups)))
        self.geometry = site.geometry.with_groups(groups)
        outs = self.weight.shape[out_axis] // (1 if site.geometry.transposed else groups)
        self.width = self.weight.numel() // (groups * outs)
        scale = torch.ones(groups * outs, dtype=torch.float64, device=self.weight.device)
        shift = torch.zeros_like(scale)
        if site.norm is not None:
            scale, shift = site.norm.affine(slim)
        if site.bias is not None:
            shift = shift + slim[site.bias].double() * scale
        if site.gain is not None:
            gain = slim[site.gain].detach().double().flatten()
            scale, shift = scale * gain, shift * gain
        self.scale, self.shift = scale.reshape(groups, 1, outs), shift

    @property
    def old(self) -> Tensor:
        """Scaled weights, (g, p, o), float64."""
        return self.geometry.matrix(self.weight.detach()).double() * self.scale

    @property
    def lost(self) -> bool:
        """Whether the layer reads fewer channels than in the dense network."""
        if self.geometry.groups < self.site.geometry.groups:
            return True
        return self.kept_in is not None and len(self.kept_in) < self.dense_weight.shape[self.in_axis]

    @property
    def mixing(self) -> Tensor | None:
        """The kept ones of the dense network's input channels, (1, slim, dense); None for a layer with groups."""
        if self.site.geometry.groups > 1 or self.dense_weight.shape[self.in_axis] // self.run > LARGEST:
            return None
        channels = self.dense_weight.shape[self.in_axis] // self.run
        whole = torch.eye(channels, dtype=torch.float64, device=self.weight.device)
        kept = self.kept_in
        return (whole if kept is None else whole[kept[:: self.run] // self.run])[None]

    def channels(self, x: Tensor) -> Tensor:
        """Return the channels of all positions of an input, (n, C)."""
        if self.geometry.rank:
            return x.movedim(1, -1).flatten(0, -2)
        return x.reshape(-1, x.shape[-1] // self.run, self.run).transpose(1, 2).flatten(0, 1)

    def folded(self, mixing: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
        """Return scaled weights that read the dense network's channels as mixed from the slim one's."""
        full = self.full()
        full = full.reshape(mixing.shape[2], -1, full.shape[2])
        return (
            torch.einsum("sd,dko->sko", mixing[0], full).flatten(0, 1)[None],
            torch.einsum("d,dko->o", constant[0], full)[None],
        )

    def full(self) -> Tensor:
        """Return the dense network's scaled weights for the outputs that are left, (g, all inputs, o)."""
        weight = self.dense_weight
        if self.kept_out is not None:
            weight = weight.index_select(1 - self.in_axis, self.kept_out.to(weight.device))
        return self.geometry.matrix(weight).double() * self.scale

    def from_moments(self, seen: Moments, left_out: Moments) -> Fit | None:
        """Refit the layer from moments of the dense network's patches, or of its channels if there are fewer."""
        constant, kept = self.site.constant is not None, self.kept_in
        assert kept is not None
        device = self.weight.device
        if not seen.of_inputs:
            taps = torch.arange(self.geometry.taps)
            inputs, outputs = (kept[:, None] * len(taps) + taps).flatten().to(device), self._outputs()
            chosen = [each.chosen(inputs, outputs) for each in (seen, left_out)]
            found = fit_moments(chosen[0], chosen[1], self.old, constant)
            if found is not None:
                self.write(found.weight, found.constant)
            return found
        mixing = self.mixing
        assert mixing is not None
        channels = (kept[:: self.run] // self.run).to(device)
        found = fit_moments(seen.chosen(channels, None), left_out.chosen(channels, None), mixing, constant)
        if found is not None:
            self.write(*self.folded(found.weight, found.constant))
        return found

    def _outputs(self) -> Tensor | None:
        """Return the outputs that are left, numbered within each group, (g, o)."""
        if self.kept_out is None:
            return None
        groups = self.geometry.groups
        outs = self.dense_weight.shape[1 - self.in_axis] // (1 if self.site.geometry.transposed else groups)
        kept = self.kept_out.to(self.weight.device)
        if self.site.geometry.transposed:
            return kept.expand(groups, -1)
        return kept.reshape(groups, -1) - outs * torch.arange(groups, device=kept.device)[:, None]

    def scaled(self, output: Tensor) -> Tensor:
        """Return the scaled product of weights and inputs from the layer's output."""
        axis = self.site.axis
        if self.site.bias is not None:
            output = output - along(self.tensors[self.site.bias].detach(), output, axis)
        return output * along(self.scale.flatten(), output, axis)

    def stored(self) -> list[Tensor]:
        """Return copies of what `write` changes."""
        return [each.detach().clone() for each in self._changed()]

    def restore(self, stored: Sequence[Tensor]) -> None:
        """Undo `write`."""
        for tensor, before in zip(self._changed(), stored, strict=True):
            tensor.copy_(before)

    def _changed(self) -> list[Tensor]:
        return [self.weight, *([self.tensors[self.site.constant]] if self.site.constant is not None else [])]

    def write(self, weight: Tensor, constant: Tensor) -> None:
        """Store the scaled weight, (g, p, o), and constant, (g, o); outputs of no scale stay as they are."""
        scale = torch.where(self.scale.abs() > 1e-4 * self.scale.abs().amax(), self.scale, math.inf)
        plain = self.geometry.matrix(self.weight.detach()).double()
        self.weight.copy_(self.geometry.weight(plain + (weight - plain * self.scale) / scale, self.weight))
        if self.site.constant is not None:
            added = (constant / scale[:, 0]).flatten()
            holder = self.tensors[self.site.constant]
            holder.add_((added if self.site.constant == self.site.bias else -added).to(holder.dtype))


def along(vector: Tensor, like: Tensor, axis: int) -> Tensor:
    """Return a vector in the type of `like` that is broadcast along one of its axes."""
    shape = [-1 if each == axis % like.dim() else 1 for each in range(like.dim())]
    return vector.to(like.dtype).reshape(shape)
