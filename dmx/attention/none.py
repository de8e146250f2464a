"""No mixing at all: the baseline that shows what embeddings, MLP and pooling do by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dmx.attention.base import ATTENTIONS, AttentionConfig, MixerContext, TokenMixer
from dmx.nn.packing import Layout


@ATTENTIONS.register("none")
@dataclass(frozen=True, kw_only=True)
class NoneConfig(AttentionConfig):
    """Every token keeps its own value. There are no attention weights, so dropout does nothing."""

    name: ClassVar[str] = "none"

    def build(self, context: MixerContext) -> TokenMixer:
        """The mixer; it has no parameters."""
        return NoneMixer()


class NoneMixer(TokenMixer):
    """See NoneConfig."""

    packs = True
    packs_on_accelerators = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """[B, H, L, Dh] values, unchanged."""
        return v

    def mix_real(self, q: Tensor, k: Tensor, v: Tensor, slot: Tensor, full_length: int) -> Tensor:
        """[n, H, l, Dh] values, unchanged."""
        return v

    def mix_rows(self, qkv: Tensor, layout: Layout, num_heads: int) -> Tensor:
        """[T, 3 * H * Dh] -> the values [T, H * Dh], unchanged."""
        return qkv.chunk(3, dim=1)[2]
