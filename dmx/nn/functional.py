"""Handwritten operations on packed rows for CPUs, with their gradients; exact up to rounding.

On a CPU a training step of these small models is bound by memory traffic, page faults and waiting
threads more than by arithmetic. So a thread takes pieces of the rows through several operations
while they are in cache, and what is cheap to compute again is not kept. Under autocast, on other
devices and for other types each function is its plain torch formula.

Legend: T rows (tokens), B sequences, D and N features of input and output, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dmx.nn.dropout import Keeps, dropout
from dmx.nn.parallel import is_fast, row_pieces, run_shares, single_thread


def small_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """linear(x) for a few rows, where torch's own threads would cost more than they save."""
    return _SmallLinear.apply(x, linear.weight, linear.bias) if is_fast(x) else linear(x)


def norm_linear(
    x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[T, D] -> [T, N], linear(norm(x)), and x for the residual sum; keeps but x for the gradient.

    The two gradients of x meet in one pass when the residual branch takes the returned x.
    """
    if not is_fast(x):
        return F.linear(norm(x), weight, bias), x
    return _NormLinear.apply(x, norm.weight, norm.bias, weight, bias, norm.eps)


def residual_linear(x: Tensor, mixed: Tensor, linear: nn.Linear, drop: float) -> Tensor:
    """[T, D], [T, N] -> [T, D], x + drop(linear(mixed))."""
    if not (is_fast(x) and is_fast(mixed)):
        return dropout(linear(mixed), drop, True) + x
    return _ResidualLinear.apply(x, mixed.contiguous(), linear.weight, linear.bias, drop)


def residual_mlp(
    x: Tensor,
    norm: nn.LayerNorm,
    first: nn.Linear,
    second: nn.Linear,
    drops: tuple[float, float],
) -> Tensor:
    """[T, D] -> [T, D], x + drop_1(second(drop_0(gelu(first(norm(x))))))."""
    if not is_fast(x):
        hidden = dropout(F.gelu(first(norm(x))), drops[0], True)
        return dropout(second(hidden), drops[1], True) + x
    layers = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias)
    return _Mlp.apply(x, *layers, norm.eps, drops)


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


class _SmallLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with single_thread(x):
            return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        with single_thread(x):
            return grad @ weight, grad.t() @ x, grad.sum(0)


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


class _ResidualLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mixed: Tensor, weight: Tensor, bias: Tensor, drop: float
    ) -> Tensor:
        out, keeps = torch.empty_like(x), Keeps(x.shape, drop)

        def work(share: Sequence[slice]) -> None:
            for rows in share:
                torch.addmm(bias, mixed[rows], weight.t(), out=out[rows])
                keeps.draw_and_apply(out[rows], rows).add_(x[rows])

        run_shares(work, row_pieces(x.shape[0]))
        ctx.save_for_backward(mixed, weight, *keeps.saved)
        ctx.keeps = keeps.settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mixed, weight, *saved = ctx.saved_tensors
        keeps, grad_mixed = Keeps.restore(ctx.keeps, saved), torch.empty_like(mixed)

        def work(share: Sequence[slice]) -> tuple[Tensor, ...]:
            grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight[:, 0])
            for rows in share:
                grad_out = keeps.applied(grad[rows], rows)
                grad_weight.addmm_(grad_out.t(), mixed[rows])
                grad_bias += grad_out.sum(0)
                torch.mm(grad_out, weight, out=grad_mixed[rows])
            return grad_weight, grad_bias

        sums = total(run_shares(work, row_pieces(mixed.shape[0])))
        return grad, grad_mixed, *sums, None


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, weight1: Tensor, bias1: Tensor,
        weight2: Tensor, bias2: Tensor, eps: float, drops: tuple[float, float],
    ) -> Tensor:  # fmt: skip
        hidden = x.new_empty(x.shape[0], weight1.shape[0])  # before the GELU
        out = torch.empty_like(x)
        keeps, keeps_out = Keeps(hidden.shape, drops[0]), Keeps(out.shape, drops[1])

        def work(share: Sequence[slice]) -> None:
            for rows in share:
                normed = F.layer_norm(x[rows], x.shape[1:], scale, shift, eps)
                torch.addmm(bias1, normed, weight1.t(), out=hidden[rows])
                active = keeps.draw_and_apply(F.gelu(hidden[rows]), rows)
                torch.addmm(bias2, active, weight2.t(), out=out[rows])
                keeps_out.draw_and_apply(out[rows], rows).add_(x[rows])

        run_shares(work, row_pieces(x.shape[0]))
        ctx.save_for_backward(
            x, scale, shift, weight1, weight2, hidden, *keeps.saved, *keeps_out.saved
        )
        ctx.eps, ctx.keeps = eps, (keeps.settings, keeps_out.settings)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight1, weight2, hidden, *saved = ctx.saved_tensors
        keeps, keeps_out = (Keeps.restore(settings, saved) for settings in ctx.keeps)
        grad, grad_x = grad.contiguous(), torch.empty_like(x)

        def work(share: Sequence[slice]) -> tuple[Tensor, ...]:
            gradient = NormLinearGradient(x, scale, shift, weight1, ctx.eps)
            grad_weight2, grad_bias2 = torch.zeros_like(weight2), torch.zeros_like(weight2[:, 0])
            for rows in share:
                grad_out = keeps_out.applied(grad[rows], rows)
                grad_weight2.addmm_(grad_out.t(), keeps.apply(F.gelu(hidden[rows]), rows))
                grad_bias2 += grad_out.sum(0)
                grad_active = keeps.apply(grad_out @ weight2, rows)
                grad_hidden = torch.ops.aten.gelu_backward(grad_active, hidden[rows])
                gradient.add(rows, grad_hidden, grad, grad_x)
            return *gradient.sums, grad_weight2, grad_bias2

        return grad_x, *total(run_shares(work, row_pieces(x.shape[0]))), None, None
