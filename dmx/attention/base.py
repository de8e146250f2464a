"""The contract of an attention: a frozen config that builds a TokenMixer, and their registry.

`MultiHead` puts the projections around a TokenMixer, dense and on packed rows.

Shape legend: B batch, H heads, L length, Dh head dimension, D embedding_dim, T real tokens, n
groups, l real tokens of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmx.errors import ConfigError
from dmx.nn.cpu import dropout_attention
from dmx.nn.packing import Grouping, Layout
from dmx.registry import Registry
from dmx.schema import from_dict, to_dict

ATTENTIONS: Registry[type[AttentionConfig]] = Registry("attention", "dmx.attention")


@dataclass(frozen=True, kw_only=True)
class MixerContext:
    """Where a mixer sits.

    Attributes:
        length: positions it mixes (the sequence length, or a butterfly group's block_size).
        num_heads: H.
        head_dim: Dh.
        layer_index: 0 for the first layer.
        shared: one dict per model, for parameters that layers share (linformer).
    """

    length: int
    num_heads: int
    head_dim: int
    layer_index: int = 0
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Base of every attention's config; subclasses add their sizes and implement `build`.

    Attributes:
        dropout: dropout of the attention weights, where the attention has such weights.
    """

    name: ClassVar[str] = ""
    size_field: ClassVar[str | None] = None
    """The size that a curriculum doubles with the image side, and `NAME-SIZE` sets."""

    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is {self.dropout}; it must lie in [0, 1).")

    def check(self, context: MixerContext) -> None:
        """Raise ConfigError where the sizes do not fit the context; called before any training."""

    def build(self, context: MixerContext) -> TokenMixer:
        """The mixer for one layer."""
        raise NotImplementedError

    @classmethod
    def parse(cls, value: object, path: str) -> AttentionConfig:
        """Config from `name`, `name-size` or a mapping with `name`.

        Raises:
            ConfigError: unknown attention or setting.
        """
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ConfigError(f"{path} must be an attention's name or a mapping with `name`.")
        settings = dict(value)
        try:
            config_class, size = split_name(settings.pop("name"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        if size is not None:
            assert config_class.size_field is not None
            settings.setdefault(config_class.size_field, size)
        return from_dict(config_class, settings, path)

    def to_plain(self) -> dict[str, Any]:
        """The YAML-ready mapping that `parse` reads back."""
        fields = {f.name: to_dict(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"name": self.name, **fields}

    @property
    def has_map(self) -> bool:
        """Whether its mixer weighs keys by probabilities (see TokenMixer.attention_map)."""
        return False

    @property
    def size(self) -> int | None:
        """The value of `size_field`."""
        return None if self.size_field is None else int(getattr(self, self.size_field))

    @property
    def label(self) -> str:
        """`butterfly-64`, as commands take it."""
        return self.name if self.size is None else f"{self.name}-{self.size}"


def split_name(name: str) -> tuple[type[AttentionConfig], int | None]:
    """`butterfly-64` -> (ButterflyConfig, 64); `butterfly` -> (ButterflyConfig, None).

    Raises:
        ConfigError: no such attention, or a size where the attention has none.
    """
    base, dash, size = name.rpartition("-")
    if name in ATTENTIONS or not (dash and size.isdecimal()):
        return ATTENTIONS.get(name), None
    config_class = ATTENTIONS.get(base)
    if config_class.size_field is None:
        raise ConfigError(f"attention {base!r} has no size; write {base!r} instead of {name!r}.")
    return config_class, int(size)


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32 at least: the reference's attention leaves mixed precision."""
    return tuple(t if t.dtype == torch.float64 else t.float() for t in tensors)


MOST_GROUPS = 65535
"""torch's fused kernels on CUDA number the batch in a grid's third dimension, which ends here:
above it they fail or, with dropout, refuse (github.com/pytorch/pytorch/issues/146704)."""


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """F.scaled_dot_product_attention, in pieces where a GPU could not take so many groups at once.

    Args:
        q, k, v: [n, H, l, Dh]. keep: [n, 1, 1, l] bool, the keys that count. dropout: of weights.
    """
    if q.device.type == "cpu" and dropout and not torch.compiler.is_compiling():
        return dropout_attention(q, k, v, keep, dropout)
    if q.shape[0] <= MOST_GROUPS or q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, dropout_p=dropout)
    masks = [None] * -(-q.shape[0] // MOST_GROUPS) if keep is None else keep.split(MOST_GROUPS)
    pieces = zip(*(x.split(MOST_GROUPS) for x in (q, k, v)), masks, strict=True)
    return torch.cat(
        [
            F.scaled_dot_product_attention(a, b, c, attn_mask=mask, dropout_p=dropout)
            for a, b, c, mask in pieces
        ]
    )


class TokenMixer(nn.Module):
    """Mixes information between tokens, head by head.

    `forward` is the formula over all L positions. A mixer whose result at real tokens can be
    computed from real tokens alone sets `packs = True` and implements `mix_real`. The faster
    `mix_rows` is optional: None leaves the work to `mix_buckets`.
    """

    packs: ClassVar[bool] = False
    packs_on_accelerators: ClassVar[bool] = False
    """Whether `mix_rows` does its work in a number of operations that does not grow with the number
    of distinct lengths; else `execution: auto` computes all positions on an accelerator, where a
    few operations for each length cost more than the positions that they save."""
    mixes_examples: ClassVar[bool] = False
    """Whether an example's result depends on the others of its batch, in evaluation too."""
    projection_bias: ClassVar[bool] = True
    """False: the projections' biases do not enter q, k and v (Reformer)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Mix.

        Args:
            q, k, v: [B, H, L, Dh].
            mask: [B, L], 1 (or True) = real token.

        Returns:
            [B, H, L, Dh]; rows of masked tokens are finite and otherwise undefined.
        """
        raise NotImplementedError

    def at_step(self, step: int, seed: int) -> None:
        """Called before each optimizer step with the number of steps done before and `train.seed`.

        What changes over a run is made here, and only from these and the layer: the same in each
        process, in a step that is done again, and after a resume.
        """

    def attention_map(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """The probabilities by which `forward` weighs v, where the config's `has_map` is true.

        Args:
            q, k: [B, H, L, Dh]. mask: [B, L].

        Returns:
            [B * L / n, H, n, n] for groups of n positions, in the order of packing.to_groups; a row
            is a query and sums to 1; masked keys are 0 in a group with any real key.
        """
        raise NotImplementedError

    def grouping(self, length: int) -> Grouping:
        """Which positions mix with each other; by default all of a sequence."""
        return Grouping(size=length)

    def mix_real(self, q: Tensor, k: Tensor, v: Tensor, slot: Tensor, full_length: int) -> Tensor:
        """The same result, from real tokens only.

        Args:
            q, k, v: [n, H, l, Dh], the l real tokens of each of n equally long groups.
            slot: [n, l], their positions in the group, ascending, in 0..full_length-1.
            full_length: positions of the group, masked ones included.

        Returns:
            [n, H, l, Dh], what `forward` gives at these tokens when all others are masked.
        """
        raise NotImplementedError

    def mix_buckets(
        self,
        buckets: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
        full_length: int,
    ) -> list[Tensor]:
        """`mix_real` over all (q, k, v, slot) buckets of a batch.

        A mixer that does something once for the whole batch overrides this (a statistic over it,
        a draw of hashes); every other one leaves it.
        """
        return [self.mix_real(q, k, v, slot, full_length) for q, k, v, slot in buckets]

    def mix_rows(self, qkv: Tensor, layout: Layout, num_heads: int) -> Tensor | None:
        """All buckets in few calls, [T, 3 * H * Dh] -> [T, H * Dh], or None."""
        return None


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

    def packed(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, D] in the layout's order -> [T, D]."""
        qkv = F.linear(x, *self._weights())  # [T, 3 * H * Dh]
        mixed = self.mixer.mix_rows(qkv, layout, self.num_heads)
        return self.output(self._mix_buckets(qkv, layout) if mixed is None else mixed)

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
