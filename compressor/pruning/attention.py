"""Attention modules that support removed heads and a smaller embedding.

torch's `MultiheadAttention` and torchvision's window attention derive the head size from the width of their input, so
that heads times head size must equal that width. A pruned network uses these classes instead: parameters have the same
names and meaning, and the head size is unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlimAttention(nn.MultiheadAttention):
    """Multi-head attention in which heads times head size may differ from the embedding size.

    `in_proj_weight` is (3 * heads * head_dim, embedding), `out_proj.weight` (embedding, heads * head_dim).
    """

    num_heads: int

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `MultiheadAttention.forward`, for batched input.

        Shapes are (batch, tokens, embedding), or (tokens, batch, embedding) without `batch_first`.
        """
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        assert self.in_proj_weight is not None
        inner = self.in_proj_weight.shape[0] // 3
        size = inner // self.num_heads
        q, k, v = self._project(query, key, value, inner)
        batch = query.shape[0]
        q, k, v = (t.reshape(batch, -1, self.num_heads, size).transpose(1, 2) for t in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            mixed, weights = _explicit(q, k, v, mask, dropout)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(mixed.transpose(1, 2).reshape(batch, -1, inner))
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, inner: int) -> list[Tensor]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        assert weight is not None
        if query is key and key is value:
            return list(torch.split(F.linear(query, weight, bias), inner, dim=-1))
        biases = [None] * 3 if bias is None else list(torch.split(bias, inner))
        parts = zip((query, key, value), torch.split(weight, inner), biases, strict=True)
        return [F.linear(source, w, b) for source, w, b in parts]

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        mask = None
        for given in (attn_mask, None if padding is None else padding[:, None, None, :]):
            if given is None:
                continue
            if given.dtype == torch.bool:
                given = torch.zeros_like(given, dtype=q.dtype).masked_fill_(given, float("-inf"))
            if given.dim() == 3:
                given = given.reshape(q.shape[0], -1, *given.shape[-2:])
            mask = given if mask is None else mask + given
        return mask


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    batch, heads = q.shape[:2]
    flat = [t.reshape(batch * heads, *t.shape[2:]) for t in (q * q.shape[-1] ** -0.5, k, v)]
    if mask is None:
        scores = torch.bmm(flat[0], flat[1].transpose(1, 2))
    else:
        full = mask.expand(batch, heads, q.shape[2], k.shape[2]).reshape(batch * heads, q.shape[2], k.shape[2])
        scores = torch.baddbmm(full, flat[0], flat[1].transpose(1, 2))
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)
    mixed = torch.bmm(weights, flat[2])
    return mixed.reshape(batch, heads, *mixed.shape[1:]), weights.reshape(batch, heads, *weights.shape[1:])


def _windows(x: Tensor, window: list[int]) -> Tensor:
    """(batch, height, width, channels) -> (batch * windows, tokens of a window, channels)."""
    batch, height, width, channels = x.shape
    tiles = x.reshape(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return tiles.permute(0, 1, 3, 2, 4, 5).reshape(-1, window[0] * window[1], channels)


def _shift_mask(height: int, width: int, window: list[int], shift: list[int], like: Tensor) -> Tensor:
    """(windows, tokens, tokens): -100 between tokens that were not neighbours before the cyclic shift."""

    def regions(size: int, tile: int, by: int) -> Tensor:
        place = torch.arange(size, device=like.device)
        if by == 0:
            return torch.zeros_like(place)
        return (place >= size - tile).long() + (place >= size - by).long()

    rows, columns = regions(height, window[0], shift[0]), regions(width, window[1], shift[1])
    region = _windows((rows[:, None] * 3 + columns[None, :])[None, :, :, None], window)[..., 0]
    apart = region[:, None, :] != region[:, :, None]
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill_(apart, -100.0)


def slim_window_attention(version: int) -> type[nn.Module]:
    """Return the class that replaces torchvision's ShiftedWindowAttention (version 1) or its V2 (version 2)."""
    from torchvision.models import swin_transformer

    base: Any = swin_transformer.ShiftedWindowAttention if version == 1 else swin_transformer.ShiftedWindowAttentionV2
    return type(f"Slim{base.__name__}", (base,), {"forward": _window_forward, "__doc__": slim_window_attention.__doc__})


def _window_forward(self: Any, x: Tensor) -> Tensor:
    """Compute attention in shifted windows, (batch, height, width, channels) to the same shape; Swin and Swin V2."""
    _, height, width, _ = x.shape
    window = list(self.window_size)
    down, right = -height % window[0], -width % window[1]
    padded = F.pad(x, (0, 0, 0, right, 0, down))
    high, wide = height + down, width + right
    # A window that covers the whole image is not shifted.
    shift = [0 if window[i] >= size else self.shift_size[i] for i, size in enumerate((high, wide))]
    if any(shift):
        padded = torch.roll(padded, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    tokens = _windows(padded, window)
    cosine = hasattr(self, "logit_scale")
    inner = self.qkv.weight.shape[0] // 3
    bias = self.qkv.bias
    if cosine and bias is not None:
        # Swin V2 gives keys no bias.
        bias = torch.cat([bias[:inner], torch.zeros_like(bias[inner : 2 * inner]), bias[2 * inner :]])
    qkv = F.linear(tokens, self.qkv.weight, bias)
    q, k, v = qkv.reshape(tokens.shape[0], tokens.shape[1], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    if cosine:
        limit = torch.clamp(self.logit_scale, max=4.605170185988092).exp()
        scores = F.normalize(q, dim=-1).matmul(F.normalize(k, dim=-1).transpose(-2, -1)) * limit
    else:
        scores = (q * q.shape[-1] ** -0.5).matmul(k.transpose(-2, -1))
    scores = scores + self.get_relative_position_bias()
    if any(shift):
        mask = _shift_mask(high, wide, window, shift, scores)
        tiled = scores.reshape(-1, mask.shape[0], *scores.shape[1:]) + mask[None, :, None]
        scores = tiled.reshape(scores.shape)
    weights = F.dropout(F.softmax(scores, dim=-1), self.attention_dropout, self.training)
    mixed = weights.matmul(v).transpose(1, 2).reshape(tokens.shape[0], tokens.shape[1], inner)
    out = F.dropout(F.linear(mixed, self.proj.weight, self.proj.bias), self.dropout, self.training)
    channels = out.shape[-1]
    tiles = out.reshape(-1, high // window[0], wide // window[1], window[0], window[1], channels)
    image = tiles.permute(0, 1, 3, 2, 4, 5).reshape(-1, high, wide, channels)
    if any(shift):
        image = torch.roll(image, shifts=(shift[0], shift[1]), dims=(1, 2))
    return image[:, :height, :width].contiguous()


def slim_class(name: str) -> type[nn.Module] | None:
    """Return the replacement class by the name stored in artefacts; None for an unknown name."""
    if name == "multi_head_attention":
        return SlimAttention
    if name in ("window_attention_1", "window_attention_2"):
        return slim_window_attention(int(name[-1]))
    return None


def swap_name(module: nn.Module) -> str | None:
    """Return the name of the class that replaces `module` once it is pruned; None if none is needed."""
    kind = type(module)
    if kind is nn.MultiheadAttention:
        return "multi_head_attention"
    if kind.__module__ == "torchvision.models.swin_transformer" and kind.__name__.startswith("ShiftedWindowAttention"):
        return "window_attention_2" if kind.__name__.endswith("V2") else "window_attention_1"
    return None
