"""The first and the last operation on packed rows, as dmx.nn.functional: embedding and pooling.

Legend: T rows (tokens), B sequences, D features, V rows of a table.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dmx.nn.dropout import Keeps, dropout
from dmx.nn.functional import total
from dmx.nn.packing import Packing
from dmx.nn.parallel import is_fast, row_pieces, run_shares, single_thread


def embed(tables: Sequence[Tensor], indices: Sequence[Tensor], drop: float) -> Tensor:
    """[V_i, D] and [T] each -> [T, D], dropout of the sum of `tables[i][indices[i]]`.

    The gradient of a table is a sum over its sorted rows: several times faster than torch's.
    """
    if not is_fast(tables[0]):
        rows = [F.embedding(i, t) for i, t in zip(indices, tables, strict=True)]
        return dropout(functools.reduce(torch.add, rows), drop, True)
    return _Embed.apply(drop, tuple(indices), *tables)


def norm_sum(x: Tensor, norm: nn.LayerNorm, order: Tensor, packing: Packing) -> Tensor:
    """[T, D] -> [B, D], the sum of norm(x) over each sequence.

    Args:
        x: rows in any order.
        norm: over D.
        order: [T], the row of each of the packing's tokens.
        packing: B sequences; one without tokens sums to zero.
    """
    if not is_fast(x):
        # Each row's sequence, and not the rows in the tokens' order: what is sorted and scattered
        # are numbers without a gradient.
        sequence = torch.empty_like(order)
        sequence[order] = packing.sequence
        return x.new_zeros(packing.mask.shape[0], x.shape[1]).index_add(0, sequence, norm(x))
    return _NormSum.apply(x, norm.weight, norm.bias, norm.eps, order, tuple(packing.lengths))


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, drop: float, indices: tuple[Tensor, ...], *tables: Tensor) -> Tensor:
        out = tables[0].new_empty(indices[0].shape[0], tables[0].shape[1])
        keeps = Keeps(out.shape, drop)

        def work(share: Sequence[slice]) -> None:
            for rows in share:
                torch.index_select(tables[0], 0, indices[0][rows], out=out[rows])
                for table, index in zip(tables[1:], indices[1:], strict=True):
                    out[rows].add_(table.index_select(0, index[rows]))
                keeps.draw_and_apply(out[rows], rows)

        run_shares(work, row_pieces(out.shape[0]))
        ctx.save_for_backward(*indices, *keeps.saved)
        ctx.keeps, ctx.sizes = keeps.settings, [table.shape[0] for table in tables]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices = ctx.saved_tensors[: len(ctx.sizes)]
        keeps = Keeps.restore(ctx.keeps, list(ctx.saved_tensors[len(ctx.sizes) :]))
        if keeps.on:
            grad = grad.clone()
            run_shares(
                lambda share: [keeps.apply(grad[rows], rows) for rows in share],
                row_pieces(grad.shape[0]),
            )
        return None, None, *map(_row_sums, [grad] * len(indices), indices, ctx.sizes)


def _row_sums(x: Tensor, index: Tensor, count: int) -> Tensor:
    """[T, D] -> [count, D], the sum of all x[i] of each value of index[i]."""
    out = x.new_empty(count, x.shape[1])
    # A stable sort keeps the summands in one order, and int16 sorts three times faster.
    with single_thread(x):
        narrow = index.to(torch.int16) if count <= 1 << 15 else index
        order = torch.argsort(narrow, stable=True)
        sizes = torch.bincount(index, minlength=count)
        ends = sizes.cumsum(0)
        offsets = ends - sizes

    def work(share: Sequence[slice]) -> None:
        for rows in share:
            first, last = int(offsets[rows.start]), int(ends[rows.stop - 1])
            # embedding_bag's forward is torch's fastest gather-and-sum, 6 times index_add_.
            bags = offsets[rows] - first
            out[rows] = F.embedding_bag(order[first:last], x, bags, mode="sum")

    run_shares(work, row_pieces(count))
    return out


class _NormSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, order: Tensor,
        lengths: tuple[int, ...],
    ) -> Tensor:  # fmt: skip
        out = x.new_empty(len(lengths), x.shape[1])
        sequences = list(enumerate(order.split(list(lengths))))

        def work(share: Sequence[tuple[int, Tensor]]) -> None:
            for number, rows in share:
                normed = F.layer_norm(x.index_select(0, rows), x.shape[1:], scale, shift, eps)
                out[number] = normed.sum(0)

        run_shares(work, sequences, [length + 50 for length in lengths])
        ctx.save_for_backward(x, scale, shift, order)
        ctx.eps, ctx.lengths = eps, lengths
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, order = ctx.saved_tensors
        shape, grad_x = x.shape[1:], torch.empty_like(x)
        with single_thread(x):
            numbers = torch.arange(len(ctx.lengths))
            sequence = torch.empty_like(order)
            sequence[order] = numbers.repeat_interleave(torch.tensor(ctx.lengths))

        def work(share: Sequence[slice]) -> tuple[Tensor, ...]:
            grad_scale, grad_shift = torch.zeros_like(scale), torch.zeros_like(shift)
            for rows in share:
                _, mean, deviation = torch.native_layer_norm(x[rows], shape, scale, shift, ctx.eps)
                dx, dscale, dshift = torch.ops.aten.native_layer_norm_backward(
                    grad.index_select(0, sequence[rows]),
                    x[rows], shape, mean, deviation, scale, shift, [True] * 3,
                )  # fmt: skip
                grad_x[rows] = dx
                grad_scale += dscale
                grad_shift += dshift
            return grad_scale, grad_shift

        sums = total(run_shares(work, row_pieces(x.shape[0])))
        return grad_x, *sums, None, None, None
