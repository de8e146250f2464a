"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236), and no mixing at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dmx.attention.base import ATTENTIONS, AttentionConfig, MixerContext, TokenMixer, zero_masked
from dmx.nn.packing import Layout


@ATTENTIONS.register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearConfig(AttentionConfig):
    """phi(q) (phi(k)^T v) / sqrt(L) with phi(x) = elu(x) + 1; cost linear in the length.

    The reference divides by sqrt(L), L counting masked positions too, where equation 4 of the
    paper divides by phi(q) sum_j phi(k_j). It has no attention weights, so dropout does nothing.
    """

    def build(self, context: MixerContext) -> TokenMixer:
        return LinearMixer()


class LinearMixer(TokenMixer):
    """See LinearConfig."""

    packs = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """A masked key has a zero value, so it adds nothing to phi(k)^T v."""
        (v,) = zero_masked(mask, v)
        return self.mix_real(q, k, v, q.shape[2])

    def mix_real(self, q: Tensor, k: Tensor, v: Tensor, full_length: int) -> Tensor:
        """The sum runs over real tokens; only the scale knows of the others."""
        # One factor L^-1/4 on each side, as in the reference: neither product grows large.
        scale = full_length**-0.25
        context = ((F.elu(k) + 1) * scale).transpose(-1, -2) @ v  # [n, H, Dh, Dh]
        return ((F.elu(q) + 1) * scale) @ context


@ATTENTIONS.register("none")
@dataclass(frozen=True, kw_only=True)
class NoneConfig(AttentionConfig):
    """Every token keeps its own value: what embeddings, MLP and pooling do by themselves.

    There are no attention weights, so dropout does nothing.
    """

    def build(self, context: MixerContext) -> TokenMixer:
        return NoneMixer()


class NoneMixer(TokenMixer):
    """See NoneConfig."""

    packs = True
    packs_on_accelerators = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return v

    def mix_real(self, q: Tensor, k: Tensor, v: Tensor, full_length: int) -> Tensor:
        return v

    def mix_rows(self, qkv: Tensor, layout: Layout, num_heads: int) -> Tensor:
        return qkv.chunk(3, dim=1)[2]
