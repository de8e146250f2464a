"""Softmax attention (Vaswani et al. 2017, arXiv 1706.03762), the exact quadratic baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dmx.attention.base import (
    ATTENTIONS,
    AttentionConfig,
    MixerContext,
    TokenMixer,
    fused_attention,
    kept_keys,
)
from dmx.nn.packing import Layout, join_rows, pad_rows, split_rows, unpad_rows


@ATTENTIONS.register("softmax")
@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(AttentionConfig):
    """softmax(q k^T / sqrt(Dh)) v over all keys that are real."""

    @property
    def has_map(self) -> bool:
        return True

    def build(self, context: MixerContext) -> TokenMixer:
        return SoftmaxMixer(self.dropout)


class SoftmaxMixer(TokenMixer):
    """See SoftmaxConfig."""

    packs = True
    packs_on_accelerators = True

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """The reference subtracts 1e6 from masked keys, which in fp32 is an exact zero weight
        beside any real key. Rows of masked tokens differ, and nothing reads them.
        """
        return self._attend(q, k, v, kept_keys(mask))

    def attention_map(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(Dh)), [B, H, L, L]; without dropout."""
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.masked_fill(~kept_keys(mask), -math.inf).softmax(dim=-1)

    def mix_real(self, q: Tensor, k: Tensor, v: Tensor, full_length: int) -> Tensor:
        return self._attend(q, k, v, None)

    def mix_rows(self, qkv: Tensor, layout: Layout, num_heads: int) -> Tensor:
        """Groups of similar length run together.

        Many small operations for each length would cost more than the padding, which is masked as
        a key. Nothing in it makes the host wait for a GPU.
        """
        outs = []
        parts = split_rows(qkv, [padded.rows for padded in layout.padded])
        for padded, rows in zip(layout.padded, parts, strict=True):
            heads = pad_rows(rows, padded).unflatten(2, (3, num_heads, -1))
            q, k, v = heads.permute(2, 0, 3, 1, 4)  # [n, H, w, Dh]
            keep = None if padded.keep is None else padded.keep[:, None, None, :]
            out = self._attend(q, k, v, keep).transpose(1, 2).flatten(2)
            outs.append(unpad_rows(out, padded))
        return join_rows(outs, qkv, qkv.shape[1] // 3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return fused_attention(q.float(), k.float(), v.float(), keep, dropout)
