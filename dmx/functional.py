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


def mlp(
    x: Tensor,
    norm: nn.LayerNorm,
    first: nn.Linear,
    second: nn.Linear,
    probability: float,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """[T, D] -> [T, D], second(dropout(gelu(first(norm(x))))), and x, as `norm_linear`."""
    probability = probability if training else 0.0
    if not is_fast(x):
        return second(F.dropout(F.gelu(first(norm(x))), probability)), x
    return _Mlp.apply(
        x, norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias,
        norm.eps, probability,
    )  # fmt: skip


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


def total(results: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """The sums over all shares, in their order."""
    return [torch.stack(parts).sum(0) for parts in zip(*results, strict=True)]


class NormLinearGradient:
    """The gradient of linear(norm(x)) + x, piece by piece.

    Attributes:
        sums: gradients so far of the norm's scale and shift and the linear's weight and bias.
    """

    def __init__(self, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, eps: float):
        self.x, self.scale, self.shift, self.weight, self.eps = x, scale, shift, weight, eps
        zeros = torch.zeros_like
        self.sums = (zeros(scale), zeros(shift), zeros(weight), zeros(weight[:, 0]))

    def add(self, rows: slice, grad: Tensor, grad_same: Tensor, grad_x: Tensor) -> None:
        """Take a piece.

        Args:
            rows: which of x.
            grad: [rows, N] of linear(norm(x)).
            grad_same: [T, D] of the second x.
            grad_x: [T, D], where the gradient of x goes.
        """
        x, shape = self.x[rows], self.x.shape[1:]
        grad_scale, grad_shift, grad_weight, grad_bias = self.sums
        normed, mean, deviation = torch.native_layer_norm(
            x, shape, self.scale, self.shift, self.eps
        )
        grad_weight.addmm_(grad.t(), normed)
        grad_bias += grad.sum(0)
        dx, dscale, dshift = torch.ops.aten.native_layer_norm_backward(
            grad @ self.weight, x, shape, mean, deviation, self.scale, self.shift, [True] * 3
        )
        torch.add(dx, grad_same[rows], out=grad_x[rows])
        grad_scale += dscale
        grad_shift += dshift


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
            gradient = NormLinearGradient(x, scale, shift, weight, ctx.eps)
            for rows in share:
                gradient.add(rows, grad[rows], grad_same, grad_x)
            return gradient.sums

        *sums, grad_bias = total(run_shares(work, row_pieces(x.shape[0])))
        return grad_x, *sums, grad_bias if ctx.has_bias else None, None


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, weight1: Tensor, bias1: Tensor,
        weight2: Tensor, bias2: Tensor, eps: float, probability: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        hidden = x.new_empty(x.shape[0], weight1.shape[0])  # before the GELU
        out = x.new_empty(x.shape[0], weight2.shape[0])
        keeps = torch.empty_like(hidden, dtype=torch.int8) if probability else None
        seed = draw_seed() if probability else 0
        factor = 1.0 / (1.0 - probability)

        def work(share: Sequence[slice]) -> None:
            for rows in share:
                normed = F.layer_norm(x[rows], x.shape[1:], scale, shift, eps)
                torch.addmm(bias1, normed, weight1.t(), out=hidden[rows])
                active = F.gelu(hidden[rows])
                if keeps is not None:
                    keep = keep_mask(active.shape, probability, seed + rows.start)
                    keeps[rows] = keep
                    active.mul_(keep.to(x.dtype).mul_(factor))
                torch.addmm(bias2, active, weight2.t(), out=out[rows])

        run_shares(work, row_pieces(x.shape[0]))
        ctx.save_for_backward(x, scale, shift, weight1, weight2, hidden, keeps)
        ctx.eps, ctx.factor = eps, factor
        return out, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_same: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight1, weight2, hidden, keeps = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)

        def work(share: Sequence[slice]) -> tuple[Tensor, ...]:
            gradient = NormLinearGradient(x, scale, shift, weight1, ctx.eps)
            grad_weight2, grad_bias2 = torch.zeros_like(weight2), torch.zeros_like(weight2[:, 0])
            for rows in share:
                active, grad_active = F.gelu(hidden[rows]), grad[rows] @ weight2
                if keeps is not None:
                    keep = keeps[rows].to(x.dtype).mul_(ctx.factor)
                    active.mul_(keep)
                    grad_active.mul_(keep)
                grad_weight2.addmm_(grad[rows].t(), active)
                grad_bias2 += grad[rows].sum(0)
                grad_hidden = torch.ops.aten.gelu_backward(grad_active, hidden[rows])
                gradient.add(rows, grad_hidden, grad_same, grad_x)
            return *gradient.sums, grad_weight2, grad_bias2

        return grad_x, *total(run_shares(work, row_pieces(x.shape[0]))), None, None


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
