"""The contract of an attention: a frozen config that builds a TokenMixer, and their registry.

`MultiHead` puts the projections around a TokenMixer, dense and on packed rows.

Shape legend: B batch, H heads, L length, Dh head dimension, D embedding_dim, T real tokens, n
groups, l real tokens of a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmx.errors import ConfigError
from dmx.nn.cpu import dropout_attention
from dmx.nn.packing import Grouping, Layout, join_rows, split_rows
from dmx.registry import NamedConfig, Registry
from dmx.runs.run import UNKNOWN
from dmx.schema import check_range

ATTENTIONS: Registry[type[AttentionConfig]] = Registry("attention", "dmx.attention")


@dataclass(frozen=True, kw_only=True)
class MixerContext:
    """Where a mixer sits.

    Attributes:
        length: positions it mixes (the sequence length, or a butterfly group's block_size).
        num_heads: H. head_dim: Dh. layer_index: 0 for the first layer.
        shared: one dict per model, for parameters that layers share (linformer).
    """

    length: int
    num_heads: int
    head_dim: int
    layer_index: int = 0
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(NamedConfig):
    """Base of every attention's config; subclasses add their sizes and implement `build`.

    Attributes:
        dropout: dropout of the attention weights, where the attention has such weights.
    """

    registry: ClassVar[Registry[type[AttentionConfig]]] = ATTENTIONS
    size_field: ClassVar[str | None] = None
    """The size that a curriculum doubles with the image side, and `NAME-SIZE` sets."""

    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "dropout", least=0, below=1)

    def check(self, context: MixerContext) -> None:
        """Raise ConfigError where the sizes do not fit the context; called before any training."""

    def build(self, context: MixerContext) -> TokenMixer:
        """The mixer of one layer."""
        raise NotImplementedError

    @classmethod
    def find(cls, name: str) -> tuple[type[AttentionConfig], dict[str, Any]]:
        """`butterfly-64` -> (ButterflyConfig, {"block_size": 64})."""
        base, dash, size = name.rpartition("-")
        if name in ATTENTIONS or not (dash and size.isdecimal()):
            return ATTENTIONS.get(name), {}
        found = ATTENTIONS.get(base)
        if found.size_field is None:
            raise ConfigError(
                f"attention {base!r} has no size; write {base!r} instead of {name!r}."
            )
        return found, {found.size_field: int(size)}

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


def sized(attention: str, values: Mapping[str, Any]) -> str:
    """`butterfly-64`, where the dotted `values` fix the size; else the name alone."""
    size_field = ATTENTIONS.get(attention).size_field if attention in ATTENTIONS else None
    size = None if size_field is None else values.get(f"attention.{size_field}")
    return attention if size is None else f"{attention}-{size}"


def attention_label(config: Mapping[str, Any] | None) -> str:
    """How reports call the attention of a plain RunConfig."""
    attention = (config or {}).get("attention")
    if isinstance(attention, str):
        return attention
    if not isinstance(attention, Mapping) or not isinstance(attention.get("name"), str):
        return UNKNOWN
    return sized(attention["name"], {f"attention.{k}": v for k, v in attention.items()})


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
    keeps = itertools.repeat(None) if keep is None else keep.split(MOST_GROUPS)
    pieces = zip(*(x.split(MOST_GROUPS) for x in (q, k, v)), keeps, strict=False)
    return torch.cat([fused_attention(a, b, c, mask, dropout) for a, b, c, mask in pieces])


def kept_keys(mask: Tensor) -> Tensor:
    """[B, L] -> [B, 1, 1, L]: the keys that count; all where none is real, for finite results."""
    return (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]


def zero_masked(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Each [B, H, L, Dh] with zero vectors at masked tokens."""
    hidden = ~mask[:, None, :, None]
    return [x.masked_fill(hidden, 0.0) for x in tensors]


Heads: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""The real tokens of n equally long groups: q, k, v [n, H, l, Dh], and their positions in the
group [n, l], ascending."""


class TokenMixer(nn.Module):
    """Mixes information between tokens, head by head, in float32 (or float64).

    `forward` is the formula over all L positions. A mixer whose result at real tokens can be
    computed from real tokens alone sets `packs = True` and implements `mix_real`, or `mix_buckets`
    where it does something once for a whole batch (a statistic over it, a draw of hashes). The
    faster `mix_rows` is optional.
    """

    packs: bool = False
    packs_on_accelerators: bool = False
    """Whether `mix_rows` does its work in a number of operations that does not grow with the number
    of distinct lengths; else `execution: auto` computes all positions on an accelerator, where a
    few operations for each length cost more than the positions that they save."""
    mixes_examples: bool = False
    """Whether an example's result depends on the others of its batch, in evaluation too."""
    projection_bias: bool = True
    """False: the projections' biases do not enter q, k and v (Reformer)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Mix.

        Args:
            q, k, v: [B, H, L, Dh]. mask: [B, L] bool, True = real token.

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

        Returns:
            [B * L / n, H, n, n] for groups of n positions, in the order of packing.to_groups; a row
            is a query and sums to 1; masked keys are 0 in a group with any real key.
        """
        raise NotImplementedError

    def grouping(self, length: int) -> Grouping:
        """Which positions mix with each other; by default all of a sequence."""
        return Grouping(size=length)

    def mix_real(self, q: Tensor, k: Tensor, v: Tensor, full_length: int) -> Tensor:
        """What `forward` gives at real tokens, [n, H, l, Dh], wherever in their group they stand.

        Args:
            q, k, v: [n, H, l, Dh], the l real tokens of each of n equally long groups.
            full_length: positions of the group, masked ones included.
        """
        raise NotImplementedError

    def mix_buckets(self, buckets: Sequence[Heads], full_length: int) -> list[Tensor]:
        """`mix_real` of every bucket of a batch, whose groups all have `full_length` positions."""
        return [self.mix_real(q, k, v, full_length) for q, k, v, _ in buckets]

    def mix_rows(self, qkv: Tensor, layout: Layout, num_heads: int) -> Tensor | None:
        """All buckets in few calls, [T, 3 * H * Dh] -> [T, H * Dh]; None leaves it to mix_buckets.

        The rows are as precise as the projections left them: bf16 in mixed precision.
        """
        return None


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class MultiHead(nn.Module):
    """Projections around a TokenMixer, which leaves mixed precision, as the reference's do."""

    def __init__(self, embedding_dim: int, config: AttentionConfig, context: MixerContext) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = context.num_heads, context.head_dim
        inner_dim = self.num_heads * self.head_dim
        self.query = nn.Linear(embedding_dim, inner_dim)
        self.key = nn.Linear(embedding_dim, inner_dim)
        self.value = nn.Linear(embedding_dim, inner_dim)
        self.mixer: TokenMixer = config.build(context)
        self.output = nn.Linear(inner_dim, embedding_dim)

    def _project(self, x: Tensor) -> Tensor:
        """[..., D] -> q, k and v, [..., 3 * H * Dh], by one product."""
        layers = (self.query, self.key, self.value)
        weight = torch.cat([layer.weight for layer in layers])
        if not self.mixer.projection_bias:
            return F.linear(x, weight)
        return F.linear(x, weight, torch.cat([layer.bias for layer in layers]))

    def _heads(self, qkv: Tensor, count: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """[..., 3 * H * Dh] of n * l tokens -> q, k, v [n, H, l, Dh], views."""
        heads = qkv.view(count, length, 3, self.num_heads, self.head_dim)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D], [B, L] bool -> [B, L, D]."""
        qkv = self._project(x)
        with torch.autocast(x.device.type, enabled=False):
            out = self.mixer(*self._heads(_widen(qkv), *mask.shape), mask)  # [B, H, L, Dh]
        return self.output(out.transpose(1, 2).flatten(2))

    def packed(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, D] in the layout's order -> [T, D]."""
        qkv = self._project(x)  # [T, 3 * H * Dh]
        with torch.autocast(x.device.type, enabled=False):
            mixed = self.mixer.mix_rows(qkv, layout, self.num_heads)
            if mixed is None:
                mixed = self._mix_buckets(_widen(qkv), layout)
        return self.output(mixed)

    def _mix_buckets(self, qkv: Tensor, layout: Layout) -> Tensor:
        """[T, 3 * H * Dh] -> [T, H * Dh], bucket by bucket."""
        sizes = [bucket.rows for bucket in layout.buckets]
        parts = zip(layout.buckets, split_rows(qkv, sizes), layout.slot.split(sizes), strict=True)
        buckets: list[Heads] = []
        for bucket, rows, slot in parts:
            shape = (bucket.count, bucket.length)
            buckets.append((*self._heads(rows, *shape), slot.view(shape)))
        outs = self.mixer.mix_buckets(buckets, layout.grouping.size)
        mixed = [out.transpose(1, 2).flatten(2).flatten(0, 1) for out in outs]
        return join_rows(mixed, qkv, self.output.in_features)

    def extra_repr(self) -> str:
        """The attention's settings, for print(model)."""
        return repr(self.config)
