"""The encoder classifier: embeddings, pre-norm blocks, pooling, and a head for one text or a pair.

Shape legend: B batch, L length, D embedding_dim, H heads, Dh head_dim, T real tokens, C classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmx.attention import AttentionConfig, MixerContext, TokenMixer
from dmx.attention.base import MultiHead
from dmx.errors import ConfigError, DataError
from dmx.nn.packing import Layout, pack, reorder
from dmx.schema import check_range


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
            `auto` packs where the attention can, and on an accelerator only where it does so in
            few operations.
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
        check_range(self, "num_layers", least=1, below=1025)
        check_range(self, "num_heads", "head_dim", "embedding_dim", "hidden_dim", least=1)
        check_range(self, "max_length", least=1)
        check_range(self, "vocab_size", "num_classes", least=2)
        check_range(self, "dropout", "embedding_dropout", "mlp_dropout", least=0, below=1)

    def context(self, length: int, layer_index: int = 0) -> MixerContext:
        """What the mixer of a layer is built for."""
        return MixerContext(
            length=length,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            layer_index=layer_index,
        )

    def check_packs(self, attention: AttentionConfig, mixer: TokenMixer) -> None:
        """Refuse `execution: packed` where the mixer cannot."""
        if self.execution == "packed" and not mixer.packs:
            raise ConfigError(
                f"model.execution is packed, but attention {attention.name!r} needs every "
                "position; use auto or dense."
            )


class Embeddings(nn.Module):
    """Token plus learned position embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size and config.max_length
        self.token = nn.Embedding(config.vocab_size, config.embedding_dim)
        nn.init.normal_(self.token.weight, std=0.02)
        self.position = nn.Embedding(config.max_length, config.embedding_dim)
        nn.init.normal_(self.position.weight, std=0.02)
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        """[..., L] ids and their positions, [L] or [..., L] -> [..., L, D]."""
        return self.dropout(self.token(ids) + self.position(position))


class Block(nn.Module):
    """Pre-norm transformer block; everything but the mixer works token by token."""

    def __init__(self, config: ModelConfig, mixer_config: AttentionConfig, context: MixerContext):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embedding_dim)
        self.attention = MultiHead(config.embedding_dim, mixer_config, context)
        self.dropout = nn.Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(config.embedding_dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.embedding_dim, config.hidden_dim),
            nn.GELU(),
            nn.Dropout(config.mlp_dropout),
            nn.Linear(config.hidden_dim, config.embedding_dim),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D], [B, L] -> [B, L, D], in plain torch: the oracle of `packed`."""
        x = self.dropout(self.attention(self.norm1(x), mask)) + x
        return self.mlp(self.norm2(x)) + x

    def packed(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, D] in the layout's order -> [T, D]."""
        x = self.dropout(self.attention.packed(self.norm1(x), layout)) + x
        return self.mlp(self.norm2(x)) + x


class Encoder(nn.Module):
    """Embeddings, blocks and final norm, pooled to one vector per sequence."""

    def __init__(self, config: ModelConfig, attention: AttentionConfig) -> None:
        super().__init__()
        assert config.vocab_size and config.max_length and config.num_classes
        self.config = config
        self.embeddings = Embeddings(config)
        first = config.context(config.max_length)
        layers = (dataclasses.replace(first, layer_index=i) for i in range(config.num_layers))
        self.layers = nn.ModuleList(Block(config, attention, layer) for layer in layers)
        self.norm = nn.LayerNorm(config.embedding_dim)
        mixer = self.blocks()[0].attention.mixer
        config.check_packs(attention, mixer)
        self.packs = mixer.packs and config.execution != "dense"
        few = mixer.packs_on_accelerators or config.execution == "packed"
        self.packs_on_accelerators = self.packs and few

    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, L] ids of any integer type -> [B, D]; DataError where L is more than max_length."""
        assert self.config.max_length
        if input_ids.shape[1] > self.config.max_length:
            raise DataError(
                f"the sequences have {input_ids.shape[1]:,} positions, but the model reads "
                f"{self.config.max_length:,}."
            )
        ids = input_ids.long()
        real = self.config.mask == "nonzero"
        mask = ids != 0 if real else torch.ones_like(ids, dtype=torch.bool)
        if self.config.pooling == "cls":
            assert self.config.vocab_size
            ids = F.pad(ids[:, :-1], (1, 0), value=self.config.vocab_size - 1)
            mask = F.pad(mask[:, :-1], (1, 0), value=True)
        packs = self.packs if ids.device.type == "cpu" else self.packs_on_accelerators
        return self._packed(ids, mask) if packs else self._dense(ids, mask)

    def _dense(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embeddings(ids, torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks():
            x = block(x, mask)
        x = self.norm(x) * mask[:, :, None]
        return x[:, 0] if self.config.pooling == "cls" else x.mean(dim=1)

    def _packed(self, ids: Tensor, mask: Tensor) -> Tensor:
        packing = pack(mask)
        tokens = ids[packing.sequence, packing.position]  # ids[mask] would search them again
        x = self.embeddings(tokens, packing.position)
        layout: Layout | None = None
        for block in self.blocks():
            wanted = packing.layout(block.attention.mixer.grouping(ids.shape[1]))
            x = block.packed(reorder(x, layout, wanted), wanted)
            layout = wanted
        assert layout is not None
        if self.config.pooling == "cls":
            return self.norm(x[layout.inverse[packing.position == 0]])
        # The rows' sequences, and not the rows in natural order: what is gathered are numbers
        # without a gradient.
        sums = x.new_zeros(ids.shape[0], x.shape[1])
        sums = sums.index_add(0, packing.sequence[layout.order], self.norm(x))
        return sums / ids.shape[1]


class Classifier(nn.Module):
    """Encoder and MLP head; `paired`: two sequences are compared by [a, b, a * b, a - b]."""

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

    @property
    def mixes_examples(self) -> bool:
        """Whether an example's result depends on the others of its batch."""
        return any(block.attention.mixer.mixes_examples for block in self.encoder.blocks())

    def at_step(self, step: int, seed: int) -> None:
        """Before each optimizer step: how many were done, and `train.seed`."""
        for block in self.encoder.blocks():
            block.attention.mixer.at_step(step, seed)

    def forward(self, input_ids: Tensor, input_ids_1: Tensor | None = None) -> Tensor:
        """[B, L] ids (and a second [B, L] for pairs) -> logits [B, C]."""
        assert self.paired == (input_ids_1 is not None), "a pair needs two inputs, else one"
        pooled = self.encoder(input_ids)
        if input_ids_1 is not None:
            other = self.encoder(input_ids_1)
            pooled = torch.cat([pooled, other, pooled * other, pooled - other], dim=-1)
        return self.head(pooled)
