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

from dmx.nn.dropout import Keeps, draw_seed, int16_threshold, random_int16
from dmx.nn.functional import NormLinearGradient, total
from dmx.nn.packing import Bucket
from dmx.nn.parallel import rows_at_once, run_shares

SCORES_AT_ONCE = 1 << 18
"""Attention weights of a piece (1 MB), so that the passes over them stay in cache."""

LONGEST_KEPT = 256
"""Up to this group length the weights are kept for the gradient, else they are computed again."""


@dataclass(frozen=True)
class Projections:
    """What stands around attention in a block.

    Attributes:
        norm: over D, before.
        weight: [3 * H * Dh, D], the projections to q, k and v; bias: [3 * H * Dh].
        output: the projection from H * Dh to D, after.
        num_heads: H.
        drop: dropout before the residual sum, 0 in evaluation.
    """

    norm: nn.LayerNorm
    weight: Tensor
    bias: Tensor | None
    output: nn.Linear
    num_heads: int
    drop: float


def attend_rows(
    x: Tensor, around: Projections, buckets: Sequence[Bucket], dropout: float
) -> Tensor:
    """[T, D] -> [T, D], x + drop(output(attention(linear(norm(x))))) within the buckets' groups.

    The rows are in the order of the buckets; `dropout` is that of the attention weights.
    """
    norm, output, drops = around.norm, around.output, (dropout, around.drop)
    layers = (norm.weight, norm.bias, around.weight, around.bias, output.weight, output.bias)
    return _Attend.apply(x, *layers, norm.eps, tuple(buckets), around.num_heads, drops)


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
    most = rows_at_once(buckets[-1].stop) if buckets else 0
    for bucket in buckets:
        n = bucket.length
        queries = n if n <= LONGEST_KEPT else max(1, min(n, SCORES_AT_ONCE // (num_heads * n)))
        at_once = max(1, min(SCORES_AT_ONCE // (num_heads * n * n), most // n))
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
        weight_out: Tensor, bias_out: Tensor, eps: float, buckets: tuple[Bucket, ...],
        num_heads: int, drops: tuple[float, float],
    ) -> Tensor:  # fmt: skip
        qkv = x.new_empty(x.shape[0], weight.shape[0])  # memory of the pieces' [3, c, H, l, Dh]
        mixed = x.new_empty(x.shape[0], weight_out.shape[1])
        out = torch.empty_like(x)
        seed, keeps = draw_seed() if drops[0] else 0, Keeps(x.shape, drops[1])

        def work(share: Sequence[_Piece]) -> list[Tensor]:
            kept: list[Tensor] = []
            for piece in share:
                rows = piece.rows
                normed = F.layer_norm(x[rows], x.shape[1:], scale, shift, eps)
                wide = normed @ weight.t() if bias is None else F.linear(normed, weight, bias)
                heads = piece.to_heads(wide, num_heads, 3)
                heads = piece.batched(qkv[rows].view(heads.shape).copy_(heads))
                (target,) = piece.to_heads(mixed[rows], num_heads, 1)
                target.copy_(_attend(piece, heads, drops[0], seed, kept).view(target.shape))
                torch.addmm(bias_out, mixed[rows], weight_out.t(), out=out[rows])
                keeps.draw_and_apply(out[rows], rows).add_(x[rows])
            return kept

        pieces = _pieces(buckets, num_heads)
        results = run_shares(work, pieces, [piece.cost for piece in pieces])
        kept = [weights for share in results for weights in share]
        ctx.save_for_backward(x, scale, shift, weight, weight_out, qkv, mixed, *keeps.saved, *kept)
        ctx.has_bias, ctx.eps, ctx.keeps = bias is not None, eps, keeps.settings
        ctx.pieces, ctx.seed, ctx.num_heads, ctx.drop = pieces, seed, num_heads, drops[0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight, weight_out, qkv, mixed, *saved = ctx.saved_tensors
        keeps = Keeps.restore(ctx.keeps, saved)
        kept = dict(zip((p.start for p in ctx.pieces if p.keeps), saved, strict=True))
        grad, grad_x = grad.contiguous(), torch.empty_like(x)

        def work(share: Sequence[_Piece]) -> tuple[Tensor, ...]:
            gradient = NormLinearGradient(x, scale, shift, weight, ctx.eps)
            grad_weight, grad_bias = (
                torch.zeros_like(weight_out),
                torch.zeros_like(weight_out[:, 0]),
            )
            for piece in share:
                rows = piece.rows
                grad_out = keeps.applied(grad[rows], rows)
                grad_weight.addmm_(grad_out.t(), mixed[rows])
                grad_bias += grad_out.sum(0)
                grad_mixed = piece.to_heads(grad_out @ weight_out, ctx.num_heads, 1).contiguous()
                grad_wide = torch.empty_like(qkv[rows])
                target = piece.to_heads(grad_wide, ctx.num_heads, 3)
                heads = piece.batched(qkv[rows].view(target.shape))
                grads = _attend_gradient(
                    piece, heads, piece.batched(grad_mixed)[0], ctx.drop, ctx.seed, kept
                )
                target.copy_(grads.view(target.shape))
                gradient.add(rows, grad_wide, grad, grad_x)
            return *gradient.sums, grad_weight, grad_bias

        pieces = ctx.pieces
        *sums, grad_bias, grad_weight_out, grad_bias_out = total(
            run_shares(work, pieces, [piece.cost for piece in pieces])
        )
        grad_in = (grad_x, *sums, grad_bias if ctx.has_bias else None)
        return *grad_in, grad_weight_out, grad_bias_out, None, None, None, None


def _attend(piece: _Piece, heads: Tensor, drop: float, seed: int, kept: list[Tensor]) -> Tensor:
    """[3, c * H, l, Dh] -> [c * H, l, Dh]; appends the weights that the gradient is to find."""
    q, k, v = heads
    mixed = torch.empty_like(q)
    for block in piece.blocks():
        # No two blocks start at the same row, so that their seeds differ.
        weights = _signed_weights(q[:, block], k, drop, seed + piece.start + block.start)
        if piece.keeps:  # and then it is one block
            kept.append(weights)
        used = weights.relu() if drop else weights
        mixed[:, block].baddbmm_(used, v, beta=0, alpha=1 / (1 - drop))
    return mixed


def _attend_gradient(
    piece: _Piece, heads: Tensor, grad: Tensor, drop: float, seed: int, kept: dict[int, Tensor]
) -> Tensor:
    """The gradient [3, c * H, l, Dh] of q, k and v, from that of `_attend`'s result."""
    q, k, v = heads
    if drop:
        grad.mul_(1 / (1 - drop))
    grads = torch.empty_like(heads)
    scale, first = q.shape[2] ** -0.5, 0  # beta 0: the first block overwrites
    for block in piece.blocks():
        weights = kept.get(piece.start)
        if weights is None:
            weights = _signed_weights(q[:, block], k, drop, seed + piece.start + block.start)
        used = weights.relu() if drop else weights
        grads[2].baddbmm_(used.transpose(1, 2), grad[:, block], beta=first)
        # d softmax = w' g - w sum(w' g), with w' the kept weights and g their gradient.
        scores = torch.bmm(grad[:, block], v.transpose(1, 2)).mul_(used)
        row_total = scores.sum(-1, keepdim=True)
        scores.addcmul_(weights.abs() if drop else weights, row_total, value=-1)
        grads[0][:, block].baddbmm_(scores, k, beta=0, alpha=scale)
        grads[1].baddbmm_(scores.transpose(1, 2), q[:, block], beta=first, alpha=scale)
        first = 1
    return grads
