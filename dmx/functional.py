"""Fast equivalents of a few torch operations, with gradients written out; exact up to rounding.

On a CPU a training step of these small models is bound by memory traffic, page faults and waiting
threads more than by arithmetic. So rows are worked on in pieces that stay in cache, each thread on
its own pieces, and what is cheap to compute again is not kept. Under autocast, on other devices and
for other types each function is its plain torch formula.

Legend: T rows (tokens), D and N features of input and output, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dmx.dropout import draw_seed, keep_mask
from dmx.parallel import is_fast, row_pieces, run_shares


def add_residual(out: Tensor, x: Tensor) -> Tensor:
    """The sum, in the memory of out (a fresh result that nothing saves) if that keeps the type."""
    return out.add_(x) if is_fast(out) and is_fast(x) else out + x


def norm_linear(
    x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[T, D] -> [T, N], linear(norm(x)), and x for the residual sum; keeps but x for the gradient.

    The two gradients of x meet in one pass when the residual branch takes the returned x.
    """
    if not is_fast(x):
        return F.linear(norm(x), weight, bias), x
    return _NormLinear.apply(x, norm.weight, norm.bias, weight, bias, norm.eps)


def gelu_linear(x: Tensor, probability: float, linear: nn.Linear, training: bool) -> Tensor:
    """[T, D] -> [T, N], linear(dropout(gelu(x))).

    The gradient overwrites x, so that nothing else may save x for its own: autograd raises if it
    does, and on a second backward through the same graph.
    """
    probability = probability if training else 0.0
    if not is_fast(x):
        return linear(F.dropout(F.gelu(x), probability))
    return _GeluLinear.apply(x, linear.weight, linear.bias, probability)


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """[V, D], [T] -> [T, D], table[index]; the gradient is a sum over sorted rows."""
    if not is_fast(table):
        return F.embedding(index, table)
    return _Lookup.apply(table, index)


def segment_sum(x: Tensor, order: Tensor, segment: Tensor, count: int) -> Tensor:
    """[T, D] -> [count, D], the sum of x[order[i]] over all i of a segment.

    Args:
        x: rows; order: [T], a permutation of them.
        segment: [T], ascending; the segment of x[order[i]].
        count: how many segments there are; an empty one sums to zero.
    """
    if not is_fast(x):
        return x.new_zeros(count, x.shape[1]).index_add_(0, segment, x[order])
    return _SegmentSum.apply(x, order, segment, count)


def _total(results: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """The sums over all shares, in their order."""
    return [torch.stack(parts).sum(0) for parts in zip(*results, strict=True)]


def _sum_segments(x: Tensor, order: Tensor, segment: Tensor, count: int) -> Tensor:
    # embedding_bag's forward is torch's fastest gather-and-sum: 6 times index_add_, and parallel.
    sizes = torch.bincount(segment, minlength=count)
    offsets = sizes.cumsum(0) - sizes
    return F.embedding_bag(order, x, offsets, mode="sum")


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = x.new_empty(x.shape[0], weight.shape[0])

        def work(share: Sequence[slice]) -> None:
            for rows in share:
                normed = F.layer_norm(x[rows], x.shape[1:], scale, shift, eps)
                if bias is None:
                    torch.mm(normed, weight.t(), out=out[rows])
                else:
                    torch.addmm(bias, normed, weight.t(), out=out[rows])

        run_shares(work, row_pieces(x.shape[0]))
        ctx.save_for_backward(x, scale, shift, weight)
        ctx.eps, ctx.has_bias = eps, bias is not None
        return out, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_same: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)

        def work(share: Sequence[slice]) -> tuple[Tensor, ...]:
            grad_weight, grad_bias = torch.zeros_like(weight), weight.new_zeros(weight.shape[0])
            grad_scale, grad_shift = torch.zeros_like(scale), torch.zeros_like(shift)
            for rows in share:
                normed, mean, deviation = torch.native_layer_norm(
                    x[rows], x.shape[1:], scale, shift, ctx.eps
                )
                grad_weight.addmm_(grad[rows].t(), normed)
                grad_bias += grad[rows].sum(0)
                grad_normed = torch.mm(grad[rows], weight)
                dx, dscale, dshift = torch.ops.aten.native_layer_norm_backward(
                    grad_normed, x[rows], x.shape[1:], mean, deviation, scale, shift, [True] * 3
                )
                torch.add(dx, grad_same[rows], out=grad_x[rows])
                grad_scale += dscale
                grad_shift += dshift
            return grad_scale, grad_shift, grad_weight, grad_bias

        *sums, grad_bias = _total(run_shares(work, row_pieces(x.shape[0])))
        return grad_x, *sums, grad_bias if ctx.has_bias else None, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, probability: float) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        keeps = torch.empty_like(x, dtype=torch.int8) if probability else None
        seed = draw_seed() if probability else 0
        scale = ctx.scale = 1.0 / (1.0 - probability)

        def work(share: Sequence[slice]) -> None:
            for rows in share:
                hidden = F.gelu(x[rows])
                if keeps is not None:
                    keep = keep_mask(hidden.shape, probability, seed + rows.start)
                    keeps[rows] = keep
                    hidden.mul_(keep.to(x.dtype).mul_(scale))
                torch.addmm(bias, hidden, weight.t(), out=out[rows])

        run_shares(work, row_pieces(x.shape[0]))
        ctx.save_for_backward(x, weight, keeps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, keeps = ctx.saved_tensors
        grad = grad.contiguous()

        def work(share: Sequence[slice]) -> tuple[Tensor, ...]:
            grad_weight, grad_bias = torch.zeros_like(weight), weight.new_zeros(weight.shape[0])
            for rows in share:
                hidden = F.gelu(x[rows])
                grad_hidden = torch.mm(grad[rows], weight)
                if keeps is not None:
                    keep = keeps[rows].to(x.dtype).mul_(ctx.scale)
                    hidden.mul_(keep)
                    grad_hidden.mul_(keep)
                grad_weight.addmm_(grad[rows].t(), hidden)
                grad_bias += grad[rows].sum(0)
                gelu_backward = torch.ops.aten.gelu_backward.grad_input
                gelu_backward(grad_hidden, x[rows], grad_input=x[rows])
            return grad_weight, grad_bias

        return x, *_total(run_shares(work, row_pieces(x.shape[0]))), None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = table.shape[0]
        return table.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        # A stable sort keeps the summands in one order, and int16 sorts three times faster.
        narrow = index.to(torch.int16) if ctx.count <= 1 << 15 else index
        order = torch.argsort(narrow, stable=True)
        return _sum_segments(grad.contiguous(), order, index, ctx.count), None


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, segment: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(order, segment)
        return _sum_segments(x, order, segment, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        order, segment = ctx.saved_tensors
        rows = torch.empty_like(segment)
        rows[order] = segment
        return grad.index_select(0, rows), None, None, None
