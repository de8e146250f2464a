"""Multi-head attention: the projections around a TokenMixer, dense and on packed rows.

Shape legend: B batch, L length, D embedding_dim, H heads, Dh head_dim, T real tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmx.attention.base import AttentionConfig, MixerContext, TokenMixer
from dmx.attention.softmax_rows import Projections
from dmx.nn.dropout import Dropout
from dmx.nn.functional import norm_linear, residual_linear
from dmx.nn.packing import Layout


class MultiHead(nn.Module):
    """Projections around a TokenMixer."""

    def __init__(self, embedding_dim: int, config: AttentionConfig, context: MixerContext) -> None:
        super().__init__()
        self.num_heads, self.head_dim = context.num_heads, context.head_dim
        inner_dim = self.num_heads * self.head_dim
        self.query = nn.Linear(embedding_dim, inner_dim)
        self.key = nn.Linear(embedding_dim, inner_dim)
        self.value = nn.Linear(embedding_dim, inner_dim)
        self.mixer: TokenMixer = config.build(context)
        self.output = nn.Linear(inner_dim, embedding_dim)

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        """The projections to q, k and v as one: [3 * H * Dh, D] and their bias."""
        layers = (self.query, self.key, self.value)
        weight = torch.cat([layer.weight for layer in layers])
        if not self.mixer.projection_bias:
            return weight, None
        return weight, torch.cat([layer.bias for layer in layers])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D], [B, L] -> [B, L, D]."""
        qkv = F.linear(x, *self._weights())
        qkv = qkv.view(*x.shape[:-1], 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = self.mixer(q, k, v, mask)  # [B, H, L, Dh]
        return self.output(out.transpose(1, 2).flatten(2))

    def packed(self, x: Tensor, norm: nn.LayerNorm, layout: Layout, dropout: Dropout) -> Tensor:
        """[T, D] in the layout's order -> [T, D], x + dropout(self(norm(x)))."""
        weight, bias = self._weights()
        around = Projections(norm, weight, bias, self.output, self.num_heads, dropout.rate)
        out = self.mixer.attend_packed(x, around, layout)
        if out is not None:
            return out
        qkv, x = norm_linear(x, norm, weight, bias)  # [T, 3 * H * Dh]
        mixed = self._mix_rows(qkv, layout)
        return residual_linear(x, mixed, self.output, dropout.rate)

    def _mix_rows(self, qkv: Tensor, layout: Layout) -> Tensor:
        """[T, 3 * H * Dh] -> [T, H * Dh], on an accelerator by the mixer's own way."""
        mixed = None
        if qkv.device.type != "cpu":
            mixed = self.mixer.mix_rows(qkv, layout, self.num_heads)
        return self._mix_buckets(qkv, layout) if mixed is None else mixed

    def _mix_buckets(self, qkv: Tensor, layout: Layout) -> Tensor:
        """[T, 3 * H * Dh] -> [T, H * Dh], bucket by bucket."""
        buckets = []
        sizes = [bucket.count * bucket.length for bucket in layout.buckets]
        # `split` and not slices: the gradient of each slice would be a whole matrix of zeros.
        # A split of one part would still cost a copy of its gradient.
        parts = qkv.split(sizes) if len(sizes) > 1 else [qkv] * len(sizes)
        slots = layout.slot.split(sizes)
        for bucket, rows, slot in zip(layout.buckets, parts, slots, strict=True):
            shape = (bucket.count, bucket.length)
            q, k, v = rows.view(*shape, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            buckets.append((q, k, v, slot.view(shape)))
        outs = self.mixer.mix_buckets(buckets, layout.grouping.size)
        mixed = [out.transpose(1, 2).flatten(2).flatten(0, 1) for out in outs]
        if len(mixed) == 1:
            return mixed[0]
        return torch.cat(mixed) if mixed else qkv.new_zeros(0, self.output.in_features)
