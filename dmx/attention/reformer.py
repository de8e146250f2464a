"""Reformer (Kitaev et al. 2020, arXiv 2001.04451): attention among tokens that hash alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dmx.attention.base import ATTENTIONS, AttentionConfig, Heads, MixerContext, TokenMixer
from dmx.errors import ConfigError
from dmx.schema import check_range

_MASKED = -1e9
_ITSELF = -1e5
"""Scores of masked keys and of a token for itself: it is attended when there is nobody else."""


@ATTENTIONS.register("reformer")
@dataclass(frozen=True, kw_only=True)
class ReformerConfig(AttentionConfig):
    """LSH attention with tied queries and keys, as `transformers`' LSHSelfAttention has it.

    Tokens are sorted by the hash of q, cut into chunks, and attend to their own and the previous
    chunk, round after round; the rounds are combined by their normalisers (section 2 and appendix
    A of the paper). Keys are q divided by its root mean square and sqrt(Dh); projections have no
    bias; the projection of k is unused. Up to chunk_length positions it is exact attention.
    Hashes are drawn anew at every call, from torch's generator, in evaluation too.

    Departures from the reference: under bf16 the projections take part in mixed precision (the
    attention itself does not). The reference leaves the library's dropout at its default of 0,
    so `dropout` does nothing.

    Attributes:
        num_hashes: rounds of hashing. chunk_length: tokens of a chunk.
    """

    size_field: ClassVar[str | None] = "num_hashes"

    num_hashes: int = 2
    chunk_length: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_hashes", "chunk_length", least=1)

    def check(self, context: MixerContext) -> None:
        """Chunks tile the sequence."""
        if context.length > self.chunk_length and context.length % self.chunk_length:
            raise ConfigError(
                f"chunk_length is {self.chunk_length}; it must divide the length "
                f"{context.length} or be at least as large."
            )

    def build(self, context: MixerContext) -> TokenMixer:
        return ReformerMixer(self)


def bucket_factors(length: int, chunk_length: int) -> tuple[int, ...]:
    """How many hash buckets a sequence gets: about two per chunk, a power of two.

    Many buckets come as two factors, hashed separately; their product is the number of buckets.
    The limit is the library's with max_position_embeddings = length, as the reference sets it.
    """
    exponent = (2 * (length // chunk_length)).bit_length() - 1
    if 2**exponent > 2 * max(int((length // chunk_length) ** 0.5), chunk_length):
        return 2 ** (exponent // 2), 2 ** (exponent - exponent // 2)
    return (2**exponent,)


class ReformerMixer(TokenMixer):
    """See ReformerConfig. Legend: R rounds, c chunk_length, N chunks of a round."""

    packs = True
    projection_bias = False

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.num_hashes, self.chunk_length = config.num_hashes, config.chunk_length

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Masked tokens have a bucket of their own, after all others."""
        return self._mix(q, v, mask, self._rotations(q, q.shape[2]), q.shape[2])

    def mix_buckets(self, buckets: Sequence[Heads], full_length: int) -> list[Tensor]:
        """One draw of hashes for all buckets, as for all rows of a dense batch.

        Sorting puts masked tokens behind all real ones, so the chunks of the real ones are those
        of the dense path; their last one is filled up with masked tokens.
        """
        if not buckets:
            return []
        rotations = self._rotations(buckets[0][0], full_length)
        outs = []
        for q, _, v, _ in buckets:
            length = q.shape[2]
            fill = -length % self.chunk_length if rotations is not None else 0
            q, v = F.pad(q, (0, 0, 0, fill)), F.pad(v, (0, 0, 0, fill))
            keep = torch.arange(length + fill, device=q.device) < length
            out = self._mix(q, v, keep.expand(q.shape[0], -1), rotations, full_length)
            outs.append(out[:, :, :length])
        return outs

    def _rotations(self, q: Tensor, full_length: int) -> Tensor | None:
        """[H, Dh, R, r] random projections for r pairs of buckets; None: one chunk holds all."""
        if full_length <= self.chunk_length:
            return None
        pairs = sum(bucket_factors(full_length, self.chunk_length)) // 2
        shape = (q.shape[1], q.shape[3], self.num_hashes, pairs)
        return torch.randn(shape, device=q.device, dtype=q.dtype)

    def _mix(
        self, q: Tensor, v: Tensor, keep: Tensor, rotations: Tensor | None, full_length: int
    ) -> Tensor:
        """[n, H, l, Dh] x 2, keep [n, l] -> [n, H, l, Dh]."""
        k = q * torch.rsqrt(q.square().mean(dim=-1, keepdim=True) + 1e-6) * q.shape[-1] ** -0.5
        token = torch.arange(q.shape[2], device=q.device).expand(keep.shape)
        key_token = token.masked_fill(~keep, -1)[:, None, :]  # [n, 1, l]
        if rotations is None:
            return _attend(q, k, v, token[:, None, :], key_token)[0]
        order = self._sorted(q, keep, rotations, full_length)  # [n, H, R, l]
        inverse = order.argsort(dim=-1)

        def chunks(x: Tensor) -> Tensor:
            """[n, H, l, Dh] -> [n, H, R * N, c, Dh], sorted by hash."""
            index = order.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
            return x.gather(2, index).unflatten(2, (-1, self.chunk_length))

        key_token = chunks(key_token[..., None].expand_as(q[..., :1])).squeeze(-1)
        key_token = _with_previous(key_token)  # [n, H, R * N, 2 c]
        if q.shape[2] < full_length:
            # The chunk before a round's first one is the last of the previous round, and in the
            # full sequence that one holds masked tokens only.
            starts = key_token.unflatten(2, (self.num_hashes, -1))[:, :, :, 0]
            starts[..., : self.chunk_length] = -1
        query_token = order.flatten(2).unflatten(2, (-1, self.chunk_length))
        k, v = _with_previous(chunks(k)), _with_previous(chunks(v))
        out, logits = _attend(chunks(q), k, v, query_token, key_token)
        # Back to the tokens' order, then the rounds' average, weighted by normaliser.
        logits = logits.flatten(2).view_as(order).gather(3, inverse)
        out = out.flatten(2, 3).unflatten(2, (self.num_hashes, -1))
        out = out.gather(3, inverse[..., None].expand_as(out))
        return (out * logits.softmax(dim=2)[..., None]).sum(dim=2)

    def _sorted(self, q: Tensor, keep: Tensor, rotations: Tensor, full_length: int) -> Tensor:
        """[n, H, R, l] token numbers by round, in the order of their buckets, masked ones last."""
        turned = torch.einsum("nhld,hdrb->nhrlb", q.detach(), rotations)
        buckets = torch.zeros(turned.shape[:-1], dtype=torch.long, device=q.device)
        total, start = 1, 0
        for factor in bucket_factors(full_length, self.chunk_length):
            part = turned[..., start : start + factor // 2]
            buckets += total * torch.cat([part, -part], dim=-1).argmax(dim=-1)
            total, start = total * factor, start + factor // 2
        buckets = buckets.masked_fill(~keep[:, None, None, :], total)
        return buckets.argsort(dim=-1, stable=True)


def _with_previous(x: Tensor) -> Tensor:
    """[n, H, R N, c, ...] -> [n, H, R N, 2 c, ...]: the previous chunk in front, round a circle."""
    return torch.cat([x.roll(1, dims=2), x], dim=3)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, query_token: Tensor, key_token: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention that avoids masked keys and, more weakly, the query's own token.

    Args:
        q: [..., c, Dh]. k, v: [..., w, Dh].
        query_token, key_token: [..., c] and [..., w] token numbers; -1: a masked key.

    Returns:
        The output, and the logarithm of each query's normaliser.
    """
    scores = q @ k.transpose(-1, -2)
    scores = scores.masked_fill((key_token < 0)[..., None, :], _MASKED)
    scores = scores.masked_fill(query_token[..., :, None] == key_token[..., None, :], _ITSELF)
    logits = scores.logsumexp(dim=-1, keepdim=True)
    return (scores - logits).exp() @ v, logits.squeeze(-1)
