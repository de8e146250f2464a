"""The encoder classifier: embeddings, pre-norm blocks, pooling, and a head for one text or a pair.

Shape legend: B batch, L length, D embedding_dim, H heads, Dh head_dim, T real tokens, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmx.attention import AttentionConfig, MixerContext, TokenMixer
from dmx.dropout import Dropout
from dmx.errors import ConfigError
from dmx.functional import add_residual, gelu_linear, lookup, norm_linear, segment_sum
from dmx.packing import Layout, Packing, pack, reorder


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the encoder. Defaults: lra_config.py of Solving-LRA-PathX (from Nystromformer).

    Attributes:
        vocab_size, max_length, num_classes: taken from the task and its data when None.
        embedding_dim: D. hidden_dim: width of the MLP and of the head.
        dropout: before each residual sum. embedding_dropout, mlp_dropout: where they say.
        pooling: `mean` over the full length (masked positions count as zeros), or `cls`.
        mask: `nonzero`: tokens with id 0 are masked, black pixels too, as in the reference;
            `none`: every position is real.
        execution: `packed` computes real tokens only, exactly; `dense` computes all positions;
            `auto` packs where the attention can.
    """

    num_layers: int = 2
    num_heads: int = 2
    head_dim: int = 32
    embedding_dim: int = 64
    hidden_dim: int = 128
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    mlp_dropout: float = 0.0
    pooling: Literal["mean", "cls"] = "mean"
    mask: Literal["nonzero", "none"] = "nonzero"
    execution: Literal["auto", "packed", "dense"] = "auto"
    vocab_size: int | None = None
    max_length: int | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "head_dim", "embedding_dim", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("dropout", "embedding_dropout", "mlp_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in [0, 1).")
        for name, least in (("vocab_size", 2), ("max_length", 1), ("num_classes", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}.")


class Embeddings(nn.Module):
    """Token plus learned position embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size and config.max_length
        self.token = nn.Embedding(config.vocab_size, config.embedding_dim)
        nn.init.normal_(self.token.weight, std=0.02)
        self.position = nn.Embedding(config.max_length, config.embedding_dim)
        nn.init.normal_(self.position.weight, std=0.02)
        self.dropout = Dropout(config.embedding_dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] ids -> [B, L, D]."""
        position = torch.arange(ids.shape[1], device=ids.device)
        return self.dropout(self.token(ids) + self.position(position))

    def packed(self, ids: Tensor, position: Tensor) -> Tensor:
        """[T] ids and positions -> [T, D]."""
        x = lookup(self.token.weight, ids)
        return self.dropout(add_residual(x, lookup(self.position.weight, position)))


class MultiHead(nn.Module):
    """Projections around a TokenMixer."""

    def __init__(self, config: ModelConfig, mixer_config: AttentionConfig, context: MixerContext):
        super().__init__()
        inner_dim = config.num_heads * config.head_dim
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.query = nn.Linear(config.embedding_dim, inner_dim)
        self.key = nn.Linear(config.embedding_dim, inner_dim)
        self.value = nn.Linear(config.embedding_dim, inner_dim)
        self.mixer: TokenMixer = mixer_config.build(context)
        self.output = nn.Linear(inner_dim, config.embedding_dim)

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
        qkv, x = norm_linear(x, norm, *self._weights())  # [T, 3 * H * Dh]
        mix_rows = getattr(self.mixer, "mix_rows", None)
        rows = None if mix_rows is None else mix_rows(qkv, layout, self.num_heads)
        out = self.output(self._mix_buckets(qkv, layout) if rows is None else rows)
        return add_residual(dropout(out), x)

    def _mix_buckets(self, qkv: Tensor, layout: Layout) -> Tensor:
        """[T, 3 * H * Dh] -> [T, H * Dh], bucket by bucket."""
        buckets = []
        sizes = [bucket.count * bucket.length for bucket in layout.buckets]
        # `split` and not slices: the gradient of each slice would be a whole matrix of zeros.
        slots = layout.slot.split(sizes)
        for bucket, rows, slot in zip(layout.buckets, qkv.split(sizes), slots, strict=True):
            shape = (bucket.count, bucket.length)
            q, k, v = rows.view(*shape, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            buckets.append((q, k, v, slot.view(shape)))
        outs = self.mixer.mix_buckets(buckets, layout.grouping.size)
        mixed = [out.transpose(1, 2).flatten(2).flatten(0, 1) for out in outs]
        return torch.cat(mixed) if mixed else qkv.new_zeros(0, self.output.in_features)


class Block(nn.Module):
    """Pre-norm transformer block; everything but the mixer works token by token."""

    def __init__(self, config: ModelConfig, mixer_config: AttentionConfig, context: MixerContext):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embedding_dim)
        self.attention = MultiHead(config, mixer_config, context)
        self.dropout = Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(config.embedding_dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.embedding_dim, config.hidden_dim),
            nn.GELU(),
            Dropout(config.mlp_dropout),
            nn.Linear(config.hidden_dim, config.embedding_dim),
            Dropout(config.dropout),
        )
        self.mlp_dropout = config.mlp_dropout

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D], [B, L] -> [B, L, D], in plain torch: the oracle of `packed`."""
        x = self.dropout(self.attention(self.norm1(x), mask)) + x
        return self.mlp(self.norm2(x)) + x

    def packed(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, D] in the layout's order -> [T, D]."""
        x = self.attention.packed(x, self.norm1, layout, self.dropout)
        first, second = self.mlp[0], self.mlp[3]
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        hidden, x = norm_linear(x, self.norm2, first.weight, first.bias)
        out = gelu_linear(hidden, self.mlp_dropout, second, self.training)
        return add_residual(self.dropout(out), x)


class Encoder(nn.Module):
    """Embeddings, blocks and final norm, pooled to one vector per sequence."""

    def __init__(self, config: ModelConfig, attention: AttentionConfig) -> None:
        super().__init__()
        assert config.vocab_size and config.max_length and config.num_classes
        self.config = config
        self.embeddings = Embeddings(config)
        shared: dict[str, object] = {}
        self.layers = nn.ModuleList(
            Block(
                config,
                attention,
                MixerContext(
                    length=config.max_length,
                    num_heads=config.num_heads,
                    head_dim=config.head_dim,
                    layer_index=index,
                    shared=shared,
                ),
            )
            for index in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.embedding_dim)
        can_pack = all(block.attention.mixer.packs for block in self.blocks())
        if config.execution == "packed" and not can_pack:
            raise ConfigError(
                f"model.execution is packed, but attention {attention.name!r} needs every "
                "position; use auto or dense."
            )
        self.packs = can_pack and config.execution != "dense"

    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, L] ids of any integer type -> [B, D]."""
        ids = input_ids.long()
        mask = ids != 0 if self.config.mask == "nonzero" else torch.ones_like(ids, dtype=torch.bool)
        if self.config.pooling == "cls":
            assert self.config.vocab_size
            ids = F.pad(ids[:, :-1], (1, 0), value=self.config.vocab_size - 1)
            mask = F.pad(mask[:, :-1], (1, 0), value=True)
        return self._packed(ids, pack(mask)) if self.packs else self._dense(ids, mask)

    def _dense(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embeddings(ids)
        for block in self.blocks():
            x = block(x, mask)
        x = self.norm(x) * mask[:, :, None]
        return x[:, 0] if self.config.pooling == "cls" else x.mean(dim=1)

    def _packed(self, ids: Tensor, packing: Packing) -> Tensor:
        x = self.embeddings.packed(ids[packing.mask], packing.position)
        layout: Layout | None = None
        for block in self.blocks():
            wanted = packing.layout(block.attention.mixer.grouping(ids.shape[1]))
            x = block.packed(reorder(x, layout, wanted), wanted)
            layout = wanted
        assert layout is not None
        if self.config.pooling == "cls":
            return self.norm(x[layout.inverse[packing.position == 0]])
        total = segment_sum(self.norm(x), layout.inverse, packing.sequence, ids.shape[0])
        return total / ids.shape[1]


class Classifier(nn.Module):
    """Encoder and MLP head.

    Args:
        config: sizes; vocab_size, max_length and num_classes are set.
        attention: the mixer of every layer.
        paired: two sequences per example, compared through [a, b, a * b, a - b].
    """

    def __init__(self, config: ModelConfig, attention: AttentionConfig, *, paired: bool) -> None:
        super().__init__()
        assert config.num_classes
        self.paired = paired
        self.encoder = Encoder(config, attention)
        self.head = nn.Sequential(
            nn.Linear(config.embedding_dim * (4 if paired else 1), config.hidden_dim),
            nn.ReLU(),
            nn.Linear(config.hidden_dim, config.num_classes),
        )

    def forward(self, input_ids: Tensor, input_ids_1: Tensor | None = None) -> Tensor:
        """[B, L] ids (and a second [B, L] for pairs) -> logits [B, C]."""
        assert self.paired == (input_ids_1 is not None), "a pair needs two inputs, else one"
        pooled = self.encoder(input_ids)
        if input_ids_1 is not None:
            other = self.encoder(input_ids_1)
            pooled = torch.cat([pooled, other, pooled * other, pooled - other], dim=-1)
        return self.head(pooled)
