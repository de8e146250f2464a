"""Softmax attention (Vaswani et al. 2017, arXiv 1706.03762), the exact quadratic baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dmx.attention.base import ATTENTIONS, AttentionConfig, MixerContext, TokenMixer
from dmx.attention.softmax_rows import Projections, attend_rows
from dmx.packing import Layout
from dmx.parallel import is_fast

WIDTH_STEP = 16
"""On an accelerator groups are padded to multiples of this, for few and large kernels."""

Heads = tuple[Tensor, Tensor, Tensor, Tensor]
"""A bucket's q, k, v [n, H, l, Dh] and slot [n, l]."""


@ATTENTIONS.register("softmax")
@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(AttentionConfig):
    """softmax(q k^T / sqrt(Dh)) v over all keys that are real."""

    name: ClassVar[str] = "softmax"

    @property
    def has_map(self) -> bool:
        """Yes: the softmax itself."""
        return True

    def build(self, context: MixerContext) -> TokenMixer:
        """The mixer; it has no parameters."""
        return SoftmaxMixer(self.dropout)


class SoftmaxMixer(TokenMixer):
    """See SoftmaxConfig."""

    packs = True

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Dense attention; a row without any real key attends to all, so that it stays finite.

        The reference subtracts 1e6 from masked keys, which in fp32 is an exact zero weight beside
        any real key. Rows of masked tokens differ, and nothing reads them.
        """
        return self._attend(q, k, v, _kept_keys(mask))

    def attention_map(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(Dh)) in float32, [B, H, L, L]; without dropout."""
        scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.masked_fill(~_kept_keys(mask), -math.inf).softmax(dim=-1)

    def mix_real(self, q: Tensor, k: Tensor, v: Tensor, slot: Tensor, full_length: int) -> Tensor:
        """Attention among the real tokens of each group; positions do not matter."""
        return self._attend(q, k, v, None)

    def mix_buckets(self, buckets: Sequence[Heads], full_length: int) -> list[Tensor]:
        """Bucket by bucket on a CPU; elsewhere with similar lengths padded and run together."""
        if not buckets or buckets[0][0].device.type == "cpu":
            return super().mix_buckets(buckets, full_length)
        return self.mix_padded(buckets)

    def mix_padded(self, buckets: Sequence[Heads]) -> list[Tensor]:
        """`mix_buckets` with one call per multiple of WIDTH_STEP: padding is masked as a key.

        Written for CUDA, where dozens of small kernels cost more than the padding. It is tested
        for equality on a CPU; its speed has not been measured.
        """
        widths = [-(-q.shape[2] // WIDTH_STEP) * WIDTH_STEP for q, *_ in buckets]
        outs: dict[int, Tensor] = {}
        for width in dict.fromkeys(widths):
            same = [i for i, w in enumerate(widths) if w == width]
            q, k, v = (
                torch.cat(
                    [F.pad(buckets[i][j], (0, 0, 0, width - buckets[i][j].shape[2])) for i in same]
                )
                for j in range(3)
            )
            counts = [buckets[i][0].shape[0] for i in same]
            lengths = q.new_tensor([buckets[i][0].shape[2] for i in same], dtype=torch.long)
            lengths = lengths.repeat_interleave(lengths.new_tensor(counts))
            keep = torch.arange(width, device=q.device) < lengths[:, None]
            out = self._attend(q, k, v, keep[:, None, None, :]).split(counts)
            outs |= {i: o[:, :, : buckets[i][0].shape[2]] for i, o in zip(same, out, strict=True)}
        return [outs[i] for i in range(len(buckets))]

    def attend_packed(self, x: Tensor, around: Projections, layout: Layout) -> Tensor | None:
        """The whole branch of a block by `attend_rows`, or None where that is not faster."""
        if not is_fast(x):
            return None
        return attend_rows(x, around, layout.buckets, self.dropout if self.training else 0.0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        with torch.autocast(q.device.type, enabled=False):
            # fp32, as in the reference: its attention leaves mixed precision.
            return F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), attn_mask=keep, dropout_p=dropout
            )


def _kept_keys(mask: Tensor) -> Tensor:
    """[B, L] -> [B, 1, 1, L] bool: the keys that count; all of them where none is real."""
    keep = mask.bool()
    keep = keep | ~keep.any(dim=1, keepdim=True)
    return keep[:, None, None, :]
