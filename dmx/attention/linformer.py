"""Linformer (Wang et al. 2020, arXiv 2006.04768): keys and values projected to a fixed length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmx.attention.base import (
    ATTENTIONS,
    AttentionConfig,
    Heads,
    MixerContext,
    TokenMixer,
    fused_attention,
    zero_masked,
)
from dmx.errors import ConfigError
from dmx.schema import check_range


@ATTENTIONS.register("linformer")
@dataclass(frozen=True, kw_only=True)
class LinformerConfig(AttentionConfig):
    """softmax(q (E k)^T / sqrt(Dh)) (E v), with E [H, projection_dim, L] learned.

    One E serves keys and values of all layers of a model ("layerwise sharing", section 4 of the
    paper). The reference has the same sharing, but through a class attribute, so that a second
    model in the process gets the first one's E. The reference has no dropout here, nor has dmx:
    `dropout` does nothing.

    Attributes:
        projection_dim: k, the length to which keys and values are projected.
    """

    size_field: ClassVar[str | None] = "projection_dim"

    projection_dim: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "projection_dim", least=1)

    def check(self, context: MixerContext) -> None:
        """A projection to more positions than there are saves nothing."""
        if self.projection_dim > context.length:
            raise ConfigError(
                f"projection_dim is {self.projection_dim}; it must be at most the length "
                f"{context.length}."
            )

    def build(self, context: MixerContext) -> TokenMixer:
        """The mixer of one layer; the first one built makes the E that all layers share."""
        shape = (context.num_heads, self.projection_dim, context.length)
        key = f"linformer.E{list(shape)}"
        if key not in context.shared:
            context.shared[key] = nn.Parameter(torch.randn(shape) * 0.02)
        return LinformerMixer(context.shared[key])


class LinformerMixer(TokenMixer):
    """See LinformerConfig; `projection` is E [H, k, L]."""

    packs = True

    def __init__(self, projection: nn.Parameter) -> None:
        super().__init__()
        self.E = projection

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Masked tokens enter the projection as zeros; no projected key is masked."""
        k, v = zero_masked(mask, k, v)
        return fused_attention(q, self.E @ k, self.E @ v)

    def mix_buckets(self, buckets: Sequence[Heads], full_length: int) -> list[Tensor]:
        """Only the columns of E at real tokens have something to multiply."""
        num_heads, size, _ = self.E.shape
        # Columns as rows, once: a row of H * k numbers is gathered (and scattered) in one piece.
        columns = self.E.permute(2, 0, 1).reshape(-1, num_heads * size)  # [L, H * k]
        outs = []
        for q, k, v, slot in buckets:
            near: Tensor = self.E
            if k.shape[2] < full_length:
                near = F.embedding(slot, columns).view(*slot.shape, num_heads, size)
                near = near.permute(0, 2, 3, 1)  # [n, H, k, l]
            outs.append(fused_attention(q, near @ k, near @ v))
        return outs
