"""Softmax attention on packed rows for CPUs: norm, projections and attention, group by group.

One pass over each piece of the rows: nothing but what the gradient needs leaves the cache. The
formula and its gradient (Vaswani et al. 2017) are written out; equal to `SoftmaxMixer.mix_real`.

Legend: T rows, D features, H heads, Dh head dimension, c groups of a piece, l rows of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dmx.dropout import draw_seed, int16_threshold, random_int16
from dmx.functional import NormLinearGradient, total
from dmx.packing import Bucket
from dmx.parallel import ROWS_AT_ONCE, run_shares

SCORES_AT_ONCE = 1 << 16
"""Attention weights of a piece (256 KB), so that the passes over them stay in cache."""

LONGEST_KEPT = 256
"""Up to this group length the weights are kept for the gradient, else they are computed again."""


def attend_rows(
    x: Tensor,
    norm: nn.LayerNorm,
    weight: Tensor,
    bias: Tensor | None,
    buckets: Sequence[Bucket],
    num_heads: int,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Attention of linear(norm(x)) within the groups of the buckets.

    Args:
        x: [T, D] rows in the order of the buckets.
        norm: over D.
        weight: [3 * H * Dh, D], the projections to q, k and v; bias: [3 * H * Dh].
        buckets: cover the rows.
        num_heads: H.
        dropout: of the attention weights.

    Returns:
        [T, H * Dh] rows, and x for the residual sum: so its two gradients meet in one pass.
    """
    settings = (norm.eps, tuple(buckets), num_heads, dropout)
    return _Attend.apply(x, norm.weight, norm.bias, weight, bias, *settings)


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
        # Some 40 operations have a fixed cost, together that of some 400 rows.
        return 400 + self.count * self.length * (self.length + 256) // 256

    def blocks(self) -> Iterator[slice]:
        for first in range(0, self.length, self.queries):
            yield slice(first, min(first + self.queries, self.length))

    def to_heads(self, rows: Tensor, num_heads: int, parts: int) -> Tensor:
        """[c * l, parts * H * Dh] -> a view [parts, c, H, l, Dh]."""
        return rows.view(self.count, self.length, parts, num_heads, -1).permute(2, 0, 3, 1, 4)

    def batched(self, x: Tensor) -> Tensor:
        """Contiguous [..., c, H, l, Dh] -> [..., c * H, l, Dh]."""
        return x.flatten(-4, -3)


def _pieces(buckets: Sequence[Bucket], num_heads: int) -> list[_Piece]:
    pieces = []
    for bucket in buckets:
        n = bucket.length
        queries = n if n <= LONGEST_KEPT else max(1, min(n, SCORES_AT_ONCE // (num_heads * n)))
        at_once = max(1, min(SCORES_AT_ONCE // (num_heads * n * n), ROWS_AT_ONCE // n))
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
    """See attend_rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None,
        eps: float, buckets: tuple[Bucket, ...], num_heads: int, dropout: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        width = weight.shape[0]
        qkv = x.new_empty(x.shape[0], width)  # memory of the pieces' [3, c, H, l, Dh]
        out = x.new_empty(x.shape[0], width // 3)
        seed = draw_seed() if dropout else 0
        weight_t = weight.t()

        def work(share: Sequence[_Piece]) -> list[Tensor]:
            kept = []
            for piece in share:
                normed = F.layer_norm(x[piece.rows], x.shape[1:], scale, shift, eps)
                rows = normed @ weight_t if bias is None else torch.addmm(bias, normed, weight_t)
                heads = piece.to_heads(rows, num_heads, 3)
                q, k, v = piece.batched(qkv[piece.rows].view(heads.shape).copy_(heads))
                mixed = torch.empty_like(q)
                for block in piece.blocks():
                    # No two blocks start at the same row, so that their seeds differ.
                    block_seed = seed + piece.start + block.start
                    weights = _signed_weights(q[:, block], k, dropout, block_seed)
                    if piece.keeps:  # and then it is one block
                        kept.append(weights)
                    used = weights.relu() if dropout else weights
                    mixed[:, block].baddbmm_(used, v, beta=0, alpha=1 / (1 - dropout))
                (target,) = piece.to_heads(out[piece.rows], num_heads, 1)
                target.copy_(mixed.view(target.shape))
            return kept

        pieces = _pieces(buckets, num_heads)
        results = run_shares(work, pieces, [piece.cost for piece in pieces])
        all_kept = [weights for kept in results for weights in kept]
        ctx.save_for_backward(x, scale, shift, weight, qkv, *all_kept)
        ctx.has_bias, ctx.eps = bias is not None, eps
        ctx.pieces, ctx.seed, ctx.num_heads, ctx.dropout = pieces, seed, num_heads, dropout
        return out, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_same: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight, qkv, *all_kept = ctx.saved_tensors
        kept = dict(zip((p.start for p in ctx.pieces if p.keeps), all_kept, strict=True))
        grad, grad_x = grad.contiguous(), torch.empty_like(x)

        def work(share: Sequence[_Piece]) -> tuple[Tensor, ...]:
            gradient = NormLinearGradient(x, scale, shift, weight, ctx.eps)
            for piece in share:
                grad_rows = torch.empty_like(qkv[piece.rows])
                target = piece.to_heads(grad_rows, ctx.num_heads, 3)
                heads = piece.batched(qkv[piece.rows].view(target.shape))
                target.copy_(_heads_gradient(ctx, piece, heads, grad, kept).view(target.shape))
                gradient.add(piece.rows, grad_rows, grad_same, grad_x)
            return gradient.sums

        pieces = ctx.pieces
        *sums, grad_bias = total(run_shares(work, pieces, [piece.cost for piece in pieces]))
        return grad_x, *sums, grad_bias if ctx.has_bias else None, None, None, None, None


def _heads_gradient(
    ctx: Any, piece: _Piece, heads: Tensor, grad: Tensor, kept: dict[int, Tensor]
) -> Tensor:
    """The gradient of a piece's [3, c * H, l, Dh] q, k and v; grad is that of all output rows."""
    q, k, v = heads
    (grad_out,) = piece.batched(
        piece.to_heads(grad[piece.rows], ctx.num_heads, 1).contiguous()
    ).mul(1 / (1 - ctx.dropout))  # fmt: skip
    grads = torch.empty_like(heads)
    scale, first = q.shape[2] ** -0.5, 0  # beta 0: the first block overwrites
    for block in piece.blocks():
        weights = kept.get(piece.start)
        if weights is None:
            seed = ctx.seed + piece.start + block.start
            weights = _signed_weights(q[:, block], k, ctx.dropout, seed)
        used = weights.relu() if ctx.dropout else weights
        grads[2].baddbmm_(used.transpose(1, 2), grad_out[:, block], beta=first)
        # d softmax = w' g - w sum(w' g), with w' the kept weights and g their gradient.
        scores = torch.bmm(grad_out[:, block], v.transpose(1, 2)).mul_(used)
        row_total = scores.sum(-1, keepdim=True)
        scores.addcmul_(weights.abs() if ctx.dropout else weights, row_total, value=-1)
        grads[0][:, block].baddbmm_(scores, k, beta=0, alpha=scale)
        grads[1].baddbmm_(scores.transpose(1, 2), q[:, block], beta=first, alpha=scale)
        first = 1
    return grads
