"""Softmax attention with dropout on a CPU, for which torch has no fused kernel.

Torch would draw a mask with its serial Bernoulli generator and keep all weights for the gradient.
Here 16 random bits serve a weight, pieces of the weights stay in cache, and long rows are computed
again for the gradient (Vaswani et al. 2017, written out), so that memory is linear in the length.
There each thread takes some of the groups through all operations: torch would split every single
one over its threads and wait for all of them, and draw on one of them while the others wait.

Legend: n groups, H heads, l rows of a group, Dh head dimension, c groups of a piece.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SCORES_AT_ONCE = 1 << 18
"""Attention weights of a piece (1 MB)."""

LONGEST_KEPT = 256
"""Up to this group length the weights are kept for the gradient, else they are computed again."""


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


def _pieces(shape: torch.Size) -> list[_Piece]:
    count, heads, length, _ = shape
    rows = length if length <= LONGEST_KEPT else SCORES_AT_ONCE // (heads * length)
    rows = max(1, min(rows, length))
    groups = max(1, SCORES_AT_ONCE // (heads * rows * length))
    places = (
        (slice(a, min(a + groups, count)), slice(b, min(b + rows, length)))
        for a in range(0, count, groups)
        for b in range(0, length, rows)
    )
    return [_Piece(number, *place) for number, place in enumerate(places)]


def _for_each(pieces: list[_Piece], work: Callable[[_Piece], None], *, long: bool) -> None:
    """Call `work` with all of them; those of the same groups in order, by one thread.

    Groups of long rows are shared out among threads. With short ones torch's own threads, which
    wait busily for its next operation, would stand in the way of ours (a tenth of a step).
    """
    threads = torch.get_num_threads() if long else 1
    groups = [list(g) for _, g in itertools.groupby(pieces, lambda piece: piece.groups.start)]
    each = -(-len(groups) // threads) or 1
    shares = [groups[i : i + each] for i in range(0, len(groups), each)]

    @torch.no_grad()  # autograd's mode belongs to the thread
    def work_through(share: list[list[_Piece]]) -> None:
        for piece in itertools.chain.from_iterable(share):
            work(piece)

    run = _pool(threads).map if len(shares) > 1 else map
    list(run(work_through, shares))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch has no threads of its own."""
    started = threading.Barrier(threads)

    def start() -> None:
        torch.set_num_threads(1)  # of this thread, and the default of threads to come
        torch.get_num_threads()  # takes the default, once per thread: now, while it is 1
        started.wait()

    pool = ThreadPoolExecutor(threads, "dmx", initializer=start)
    list(pool.map(lambda _: None, range(threads)))
    torch.set_num_threads(threads)  # puts the default back
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has the pools, not their threads


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, dropout: float, seed: int
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, pieces = torch.empty_like(q), _pieces(q.shape)
        kept: dict[int, Tensor] = {}

        def work(piece: _Piece) -> None:
            weights = _signed_weights(piece, q, k, keep, dropout, seed)
            mixed = piece.of(out)[:, piece.queries]
            mixed.baddbmm_(weights.relu(), piece.of(v), beta=0, alpha=1 / (1 - dropout))
            if q.shape[2] <= LONGEST_KEPT:
                kept[piece.number] = weights

        _for_each(pieces, work, long=q.shape[2] > LONGEST_KEPT)
        ctx.save_for_backward(q, k, v, keep, *(kept[n] for n in sorted(kept)))
        ctx.dropout, ctx.seed = dropout, seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, keep, *kept = ctx.saved_tensors
        grad = (grad * (1 / (1 - ctx.dropout))).contiguous()
        grads = tuple(map(torch.zeros_like, (q, k, v)))
        scale = q.shape[3] ** -0.5

        def work(piece: _Piece) -> None:
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

        _for_each(_pieces(q.shape), work, long=not kept)
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
    # Uniform int16, four from each draw: `bernoulli_` takes seven times as long. One is below the
    # threshold with the probability of dropout, to within 1 / 65536.
    words = torch.empty(-(-scores.numel() // 4), dtype=torch.int64)
    words.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed + piece.number))
    bits = words.view(torch.int16)[: scores.numel()].view(scores.shape).to(scores.dtype)
    threshold = min(round(dropout * 65536) - 32768, 32767)
    return scores.copysign_(bits.sub_(threshold - 0.5))
