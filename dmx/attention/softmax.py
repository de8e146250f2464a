"""Softmax attention (Vaswani et al. 2017, arXiv 1706.03762), the exact quadratic baseline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmx.attention.base import ATTENTIONS, AttentionConfig, MixerContext, TokenMixer
from dmx.dropout import draw_seed, int16_threshold, random_int16
from dmx.packing import Bucket, Layout
from dmx.parallel import is_fast, run_shares

SCORES_AT_ONCE = 1 << 17
"""Attention weights of a piece (512 KB), so that the passes over them stay in cache."""

LONGEST_KEPT = 256
"""Up to this group length the weights are kept for the gradient, else they are computed again."""


@ATTENTIONS.register("softmax")
@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(AttentionConfig):
    """softmax(q k^T / sqrt(Dh)) v over all keys that are real."""

    name: ClassVar[str] = "softmax"

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
        keep = mask.bool()
        keep = keep | ~keep.any(dim=1, keepdim=True)
        return self._attend(q, k, v, keep[:, None, None, :])

    def mix_real(self, q: Tensor, k: Tensor, v: Tensor, slot: Tensor, full_length: int) -> Tensor:
        """Attention among the real tokens of each group; positions do not matter."""
        return self._attend(q, k, v, None)

    def mix_rows(self, qkv: Tensor, layout: Layout, num_heads: int) -> Tensor | None:
        """`mix_real` over all buckets, straight on the rows; None where that is not the faster way.

        Args:
            qkv: [T, 3 * H * Dh] rows in the layout's order; the gradient overwrites them.
            layout: the order and its buckets.
            num_heads: H.

        Returns:
            [T, H * Dh].
        """
        if not is_fast(qkv):
            return None
        dropout = self.dropout if self.training else 0.0
        return _Attend.apply(qkv, layout.buckets, num_heads, dropout)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        with torch.autocast(q.device.type, enabled=False):
            # fp32, as in the reference: its attention leaves mixed precision.
            return F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), attn_mask=keep, dropout_p=dropout
            )


@dataclass(frozen=True)
class _Piece:
    """Some groups of a bucket, and how many of their query rows are worked on at once."""

    start: int
    count: int
    length: int
    queries: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.count * self.length)

    @property
    def keeps(self) -> bool:
        return self.length <= LONGEST_KEPT

    @property
    def cost(self) -> int:
        # Each of some 20 operations has a fixed cost, about that of 2000 elements.
        return 40_000 + self.count * self.length * (self.length + 64)

    def blocks(self) -> Iterator[slice]:
        for first in range(0, self.length, self.queries):
            yield slice(first, min(first + self.queries, self.length))

    def heads(self, rows: Tensor, num_heads: int, parts: int) -> Tensor:
        """Rows [count * length, parts * H * Dh] -> a contiguous [parts, count * H, length, Dh]."""
        x = rows.view(self.count, self.length, parts, num_heads, -1).permute(2, 0, 3, 1, 4)
        return x.reshape(parts, self.count * num_heads, self.length, x.shape[-1])

    def store(self, x: Tensor, rows: Tensor, num_heads: int) -> None:
        """The inverse of `heads`, into rows."""
        parts = x.shape[0]
        target = rows.view(self.count, self.length, parts, num_heads, -1).permute(2, 0, 3, 1, 4)
        target.copy_(x.view(target.shape))


def _pieces(buckets: Sequence[Bucket], num_heads: int) -> list[_Piece]:
    pieces = []
    for bucket in buckets:
        n = bucket.length
        queries = n if n <= LONGEST_KEPT else max(1, min(n, SCORES_AT_ONCE // (num_heads * n)))
        at_once = max(1, SCORES_AT_ONCE // (num_heads * n * n))
        for first in range(0, bucket.count, at_once):
            count = min(at_once, bucket.count - first)
            pieces.append(_Piece(bucket.start + first * n, count, n, queries))
    return pieces


def _signed_weights(q: Tensor, k: Tensor, dropout: float, seed: int) -> Tensor:
    """softmax(q k^T / sqrt(Dh)), negative where dropout takes the weight away.

    One tensor so holds both the weights (its absolute value) and the kept ones (its positive
    part). A weight of zero adds nothing either way.
    """
    scores = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5)
    torch._softmax(scores, -1, False, out=scores)
    if dropout:
        bits = random_int16(scores.shape, seed).to(scores.dtype)
        scores.copysign_(bits.sub_(int16_threshold(dropout) - 0.5))
    return scores


class _Attend(torch.autograd.Function):
    """Attention within each group of each bucket, [T, 3 * H * Dh] -> [T, H * Dh]."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, buckets: Sequence[Bucket], num_heads: int, dropout: float
    ) -> Tensor:
        out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
        seed = draw_seed() if dropout else 0

        def work(share: Sequence[_Piece]) -> list[Tensor]:
            kept = []
            for piece in share:
                q, k, v = piece.heads(qkv[piece.rows], num_heads, 3)
                mixed = torch.empty_like(q)
                for block in piece.blocks():
                    # No two blocks start at the same row, so that their seeds differ.
                    block_seed = seed + piece.start + block.start
                    weights = _signed_weights(q[:, block], k, dropout, block_seed)
                    if piece.keeps:
                        kept.append(weights)
                    used = weights.relu() if dropout else weights
                    mixed[:, block].baddbmm_(used, v, beta=0, alpha=1 / (1 - dropout))
                piece.store(mixed[None], out[piece.rows], num_heads)
            return kept

        pieces = _pieces(buckets, num_heads)
        results = run_shares(work, pieces, [piece.cost for piece in pieces])
        ctx.save_for_backward(qkv, *(weights for kept in results for weights in kept))
        ctx.pieces, ctx.seed, ctx.num_heads, ctx.dropout = pieces, seed, num_heads, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, *kept = ctx.saved_tensors
        weights_of: dict[int, Tensor] = {}
        all_kept = iter(kept)
        for piece in ctx.pieces:
            if piece.keeps:  # such a piece is one block
                weights_of[piece.start] = next(all_kept)
        grad, dropout, num_heads = grad.contiguous(), ctx.dropout, ctx.num_heads

        def work(share: Sequence[_Piece]) -> None:
            for piece in share:
                rows = qkv[piece.rows]
                q, k, v = piece.heads(rows, num_heads, 3)
                (grad_out,) = piece.heads(grad[piece.rows], num_heads, 1)
                if dropout:
                    grad_out = grad_out * (1 / (1 - dropout))
                grads = torch.empty((3, *q.shape))
                scale, first = q.shape[2] ** -0.5, 0
                for block in piece.blocks():
                    weights = weights_of.get(piece.start)
                    if weights is None:
                        block_seed = ctx.seed + piece.start + block.start
                        weights = _signed_weights(q[:, block], k, dropout, block_seed)
                    used = weights.relu() if dropout else weights
                    grads[2].baddbmm_(used.transpose(1, 2), grad_out[:, block], beta=first)
                    # d softmax = w' g - w sum(w' g), with w' the kept weights, g their gradient.
                    scores = torch.bmm(grad_out[:, block], v.transpose(1, 2)).mul_(used)
                    total = scores.sum(-1, keepdim=True)
                    scores.addcmul_(weights.abs() if dropout else weights, total, value=-1)
                    grads[0][:, block].baddbmm_(scores, k, beta=0, alpha=scale)
                    grads[1].baddbmm_(scores.transpose(1, 2), q[:, block], beta=first, alpha=scale)
                    first = 1
                piece.store(grads, rows, num_heads)

        run_shares(work, ctx.pieces, [piece.cost for piece in ctx.pieces])
        return qkv, None, None, None
