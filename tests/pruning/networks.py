"""Small networks that hold, one each, the things that make pruning go wrong."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.pruning.checks import count_macs

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.space import PruningSpace


class Zoo(nn.Module):
    """One network with shared modules, reshape + linear, cat, chunk, shuffle, grouped and depthwise
    convolution, squeeze-excitation, PReLU, LayerNorm and transposed convolution. 3x32x32 to `num_classes`."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.act = nn.PReLU(16)
        self.shared = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.shared_norm = nn.BatchNorm2d(16)
        self.left = nn.Conv2d(16, 12, 1)
        self.right = nn.Conv2d(16, 20, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.squeeze = nn.Conv2d(32, 8, 1)
        self.excite = nn.Conv2d(8, 32, 1)
        self.gate = nn.Conv2d(32, 48, 1)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(24, 14, 2, stride=2)
        self.down = nn.Conv2d(14, 18, 4, stride=4)
        self.norm = nn.LayerNorm(18)
        self.flat = nn.Linear(18 * 4 * 4, 30)
        self.head = nn.Linear(30, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        # The same convolution twice: its input and output channels are the same channels.
        x = x + F.relu(self.shared_norm(self.shared(x)))
        x = x + F.relu(self.shared_norm(self.shared(x)))
        x = torch.cat([self.left(x), F.relu(self.right(x))], dim=1)
        x = F.max_pool2d(F.relu(self.depthwise(x)), 4)
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        a, b = self.gate(x).chunk(2, dim=1)
        x = a * torch.sigmoid(b)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = self.down(F.relu(self.up(self.grouped(x))))
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(F.relu(self.flat(x.reshape(n, -1))))


class UNet(nn.Module):
    """Two levels down and up, with skip connections by concatenation. 3xHxW to 2xHxW."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.deep = _double(3, 12), _double(12, 20), _double(20, 28)
        self.up2 = nn.ConvTranspose2d(28, 20, 2, stride=2)
        self.join2, self.join1 = _double(40, 20), _double(32, 12)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.deep(F.max_pool2d(two, 2))
        x = self.join2(torch.cat([self.up2(x), two], 1))
        x = self.join1(torch.cat([F.interpolate(x, scale_factor=2.0, mode="bilinear"), one], 1))
        return self.out(x)


def _double(ins: int, outs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ins, outs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outs, outs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outs),
        nn.ReLU(inplace=True),
    )


class Attentive(nn.Module):
    """Self-attention by torch's module with weights returned, then attention by hand. 10 tokens of 24."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.qkv = nn.Linear(32, 96)
        self.heads = 4
        self.proj = nn.Linear(32, 32)
        self.hidden, self.back = nn.Linear(32, 40), nn.Linear(40, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=True)[0]
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.proj((scores @ v).transpose(1, 2).reshape(b, n, -1))
        x = x + self.back(F.gelu(self.hidden(x)))
        return self.head(x.mean(1))


class Tied(nn.Module):
    """An autoencoder whose decoder is the transposed encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 12)
        self.encoder = nn.Linear(12, 20)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        code = F.relu(self.encoder(hidden))
        return self.out(F.relu(code @ self.encoder.weight) + hidden)


class DataDependent(nn.Module):
    """Goes one way or another by the values it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > 0 else self.other(x)


def zoo(num_classes: int = 5) -> nn.Module:
    """A factory that artefacts can name."""
    return Zoo(num_classes)


def unset(num_classes: int = 5) -> nn.Module:
    """A factory that fails in its own way."""
    return {}["config"]


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that keep activations alive, batch-norm statistics far from their defaults, in eval mode."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.copy_(
                    torch.rand(parameter.shape, generator=random, dtype=parameter.dtype) * 0.5 + 0.5
                )
            else:
                gain = 1.4 / max(1, parameter[0].numel()) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=parameter.dtype) * gain)
        for name, buffer in model.named_buffers():
            if "running_var" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=random, dtype=buffer.dtype) + 0.5)
            elif "running_mean" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=random, dtype=buffer.dtype) * 0.1)
    return model.eval()


def fvcore_macs(model: nn.Module, *inputs: Any) -> int:
    """What fvcore counts."""
    return count_macs(model, inputs)[0]


def assert_is_dense_with_zeros(
    small: nn.Module, space: PruningSpace, plan: ChannelPlan, example: Tensor, rtol: float, atol: float
) -> None:
    """The slim network computes what the dense one does whose removed parameters are zero."""
    masked, masks = copy.deepcopy(space.model), space.keep_masks(plan)
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
        expected, found = masked(example), small(example)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


class FusedInForward(nn.Module):
    """A RepVGG block that fuses its branches in forward: a 3x3 and a 1x1 convolution and, at equal widths, the input
    itself, each with batch normalisation."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = c_in, stride
        self.wide = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.wide_norm = nn.BatchNorm2d(c_out)
        self.point = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        self.point_norm = nn.BatchNorm2d(c_out)
        self.norm = nn.BatchNorm2d(c_in) if c_in == c_out and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.fused(self.wide.weight, self.wide_norm)
        point, shift = self.fused(self.point.weight, self.point_norm)
        weight, bias = weight + F.pad(point, [1, 1, 1, 1]), bias + shift
        if self.norm is not None:
            unit = torch.eye(self.channels, device=x.device, dtype=x.dtype)[:, :, None, None]
            same, shift = self.fused(F.pad(unit, [1, 1, 1, 1]), self.norm)
            weight, bias = weight + same, bias + shift
        return F.relu(F.conv2d(x, weight, bias, self.stride, 1))

    @staticmethod
    def fused(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        return weight * factor.reshape(-1, 1, 1, 1), norm.bias - norm.running_mean * factor


class RepVGG(nn.Module):
    """Blocks that fuse in forward. 3xHxW to 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = FusedInForward(8, 16, 2), FusedInForward(16, 16, 1)
        self.three = FusedInForward(16, 20, 2)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(self.two(self.one(F.relu(self.stem(x))))).mean((2, 3)))
