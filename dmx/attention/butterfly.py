"""Butterfly attention (Dimension Mixer, arXiv 2311.18735): groups whose stride grows by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dmx.attention.base import ATTENTIONS, AttentionConfig, Heads, MixerContext, TokenMixer
from dmx.attention.softmax import SoftmaxConfig
from dmx.errors import ConfigError
from dmx.nn.packing import Grouping, Layout, from_groups, to_groups
from dmx.schema import check_range


def butterfly_stride(length: int, block_size: int, layer_index: int) -> int:
    """Stride of the groups in a layer (section 3 of the paper; `ButterflyTransformer` there).

    Layer i of n = ceil(log_block_size(length)) has stride block_size^(i mod n), and the last of
    them is cut to length / block_size. Integers only: a floating-point logarithm gives one layer
    too many at exact powers (log(125)/log(5) > 3).
    """
    num_layers, reach = 1, block_size
    while reach < length:
        num_layers, reach = num_layers + 1, reach * block_size
    stride = block_size ** (layer_index % num_layers)
    return stride if stride * block_size <= length else length // block_size


@ATTENTIONS.register("butterfly")
@dataclass(frozen=True, kw_only=True)
class ButterflyConfig(AttentionConfig):
    """Any attention, applied within strided groups of block_size positions.

    Attributes:
        block_size: positions of a group; divides the sequence length.
        inner: the attention inside a group. Its dropout is this config's dropout.
    """

    size_field: ClassVar[str | None] = "block_size"

    block_size: int = 64
    inner: AttentionConfig = dataclasses.field(default_factory=SoftmaxConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "block_size", least=2)
        if isinstance(self.inner, ButterflyConfig):
            raise ConfigError("inner is butterfly; a butterfly cannot run inside a butterfly.")
        if self.inner.dropout != self.dropout:
            object.__setattr__(self, "inner", dataclasses.replace(self.inner, dropout=self.dropout))

    def check(self, context: MixerContext) -> None:
        """The block divides the length, the layer's groups tile it, and the inner mixer fits."""
        length, layer = context.length, context.layer_index
        if self.block_size > length or length % self.block_size:
            fits = [s for s in (16, 32, 64, 128, 256, 512) if s <= length and length % s == 0]
            raise ConfigError(
                f"block_size is {self.block_size}, which does not divide the length {length}; "
                f"some that do: {', '.join(map(str, fits))}."
            )
        stride = butterfly_stride(length, self.block_size, layer)
        if length % (stride * self.block_size):
            raise ConfigError(
                f"block_size is {self.block_size}; layer {layer} has stride {stride}, "
                f"and {stride} * {self.block_size} does not divide the length {length}."
            )
        try:
            self.inner.check(dataclasses.replace(context, length=self.block_size))
        except ConfigError as error:
            raise ConfigError(f"inner: {error}") from None

    @property
    def has_map(self) -> bool:
        return self.inner.has_map

    def build(self, context: MixerContext) -> TokenMixer:
        stride = butterfly_stride(context.length, self.block_size, context.layer_index)
        inner = self.inner.build(dataclasses.replace(context, length=self.block_size))
        return ButterflyMixer(inner, Grouping(size=self.block_size, stride=stride))


class ButterflyMixer(TokenMixer):
    """See ButterflyConfig."""

    def __init__(self, inner: TokenMixer, grouping: Grouping) -> None:
        super().__init__()
        self.inner = inner
        self._grouping = grouping
        self.packs = inner.packs
        self.packs_on_accelerators = inner.packs_on_accelerators
        self.mixes_examples = inner.mixes_examples
        self.projection_bias = inner.projection_bias

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        length = q.shape[2]
        groups = to_groups(mask, self._grouping)
        out = self.inner(self._split(q), self._split(k), self._split(v), groups)
        return from_groups(out.transpose(1, 2), self._grouping, length).transpose(1, 2)

    def _split(self, x: Tensor) -> Tensor:
        """[B, H, L, Dh] -> [B * L / n, H, n, Dh]."""
        return to_groups(x.transpose(1, 2), self._grouping).transpose(1, 2)

    def at_step(self, step: int, seed: int) -> None:
        self.inner.at_step(step, seed)

    def attention_map(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        groups = to_groups(mask, self._grouping)
        return self.inner.attention_map(self._split(q), self._split(k), groups)

    def grouping(self, length: int) -> Grouping:
        return self._grouping

    def mix_buckets(self, buckets: Sequence[Heads], full_length: int) -> list[Tensor]:
        """Buckets already are groups: the inner mixer takes them as they are."""
        return self.inner.mix_buckets(buckets, full_length)

    def mix_rows(self, qkv: Tensor, layout: Layout, num_heads: int) -> Tensor | None:
        return self.inner.mix_rows(qkv, layout, num_heads)

    def extra_repr(self) -> str:
        return f"block_size={self._grouping.size}, stride={self._grouping.stride}"
