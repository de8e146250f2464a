"""Softmax attention with dropout on a CPU, for which torch has no fused kernel.

Torch would draw a mask with its serial Bernoulli generator and keep all weights for the gradient.
Here 16 random bits serve a weight, pieces of the weights stay in cache, and long rows are computed
again for the gradient (Vaswani et al. 2017, written out), so that memory is linear in the length.

Legend: n groups, H heads, l rows of a group, Dh head dimension, c groups of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SCORES_AT_ONCE = 1 << 18
"""Attention weights of a piece (1 MB)."""

LONGEST_KEPT = 256
"""Up to this group length the weights are kept for the gradient, else they are computed again."""


def random_int16(shape: torch.Size, seed: int) -> Tensor:
    """Uniform int16, four from each draw: `bernoulli_` takes seven times as long."""
    words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64)
    words.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
    return words.view(torch.int16)[: shape.numel()].view(shape)


def int16_threshold(probability: float) -> int:
    """A uniform int16 is below it with this probability, to within 1 / 65536."""
    return min(round(probability * 65536) - 32768, 32767)


def dropout_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, dropout: float
) -> Tensor:
    """dropout(softmax(q k^T / sqrt(Dh))) v in float32.

    Args:
        q, k, v: [n, H, l, Dh]. keep: [n, 1, 1, l] bool, the keys that count. dropout: of weights.
    """
    seed = int(torch.randint(1 << 32, ()))  # of torch's generator, so that a resumed run repeats
    return _Attention.apply(q, k, v, keep, dropout, seed)


@dataclass(frozen=True)
class _Piece:
    """Some rows of queries of some groups."""

    number: int
    groups: slice
    queries: slice

    def of(self, x: Tensor) -> Tensor:
        """[n, H, l, Dh] -> [c * H, l, Dh], a view."""
        return x[self.groups].flatten(0, 1)


def _pieces(shape: torch.Size) -> Iterator[_Piece]:
    count, heads, length, _ = shape
    rows = length if length <= LONGEST_KEPT else SCORES_AT_ONCE // (heads * length)
    rows = max(1, min(rows, length))
    groups = max(1, SCORES_AT_ONCE // (heads * rows * length))
    number = 0
    for a in range(0, count, groups):
        for b in range(0, length, rows):
            yield _Piece(number, slice(a, min(a + groups, count)), slice(b, min(b + rows, length)))
            number += 1


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, dropout: float, seed: int
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, kept = torch.empty_like(q), []
        for piece in _pieces(q.shape):
            weights = _signed_weights(piece, q, k, keep, dropout, seed)
            mixed = piece.of(out)[:, piece.queries]
            mixed.baddbmm_(weights.relu(), piece.of(v), beta=0, alpha=1 / (1 - dropout))
            if q.shape[2] <= LONGEST_KEPT:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, keep, *kept)
        ctx.dropout, ctx.seed = dropout, seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, keep, *kept = ctx.saved_tensors
        grad = (grad * (1 / (1 - ctx.dropout))).contiguous()
        grads = tuple(map(torch.zeros_like, (q, k, v)))
        scale = q.shape[3] ** -0.5
        for piece in _pieces(q.shape):
            if kept:
                weights = kept[piece.number]
            else:
                weights = _signed_weights(piece, q, k, keep, ctx.dropout, ctx.seed)
            used, up = weights.relu(), piece.of(grad)[:, piece.queries]
            dq, dk, dv = (piece.of(x) for x in grads)
            dv.baddbmm_(used.transpose(1, 2), up)
            # d softmax = w' g - w sum(w' g), with w' the kept weights and g their gradient.
            scores = torch.bmm(up, piece.of(v).transpose(1, 2)).mul_(used)
            total = scores.sum(-1, keepdim=True)
            scores.addcmul_(weights.abs(), total, value=-1)
            dq[:, piece.queries].baddbmm_(scores, piece.of(k), alpha=scale)
            dk.baddbmm_(scores.transpose(1, 2), piece.of(q)[:, piece.queries], alpha=scale)
        return *grads, None, None, None


def _signed_weights(
    piece: _Piece, q: Tensor, k: Tensor, keep: Tensor | None, dropout: float, seed: int
) -> Tensor:
    """[c * H, l, l], softmax(q k^T / sqrt(Dh)), negative where dropout takes the weight away.

    One tensor so holds both the weights (its absolute value) and the kept ones (its positive
    part). A weight of zero adds nothing either way.
    """
    rows, keys = piece.of(q)[:, piece.queries], piece.of(k)
    scores = q.new_empty(rows.shape[0], rows.shape[1], keys.shape[1])
    scores.baddbmm_(rows, keys.transpose(1, 2), beta=0, alpha=q.shape[3] ** -0.5)
    if keep is not None:
        by_group = scores.unflatten(0, (-1, q.shape[1]))
        by_group.masked_fill_(~keep[piece.groups], -torch.inf)
    torch._softmax(scores, -1, False, out=scores)
    bits = random_int16(scores.shape, seed + piece.number).to(scores.dtype)
    return scores.copysign_(bits.sub_(int16_threshold(dropout) - 0.5))
