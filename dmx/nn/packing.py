"""Token packing: which tokens are real, and how they lie in memory so that only they are computed.

A token whose mask is 0 is no attention key, its output is zeroed, and mean pooling divides by the
full length. It cannot influence the result, so a model may run on the real tokens only. Real
tokens are rows of a `[T, D]` matrix. A `Layout` orders them by group (a whole sequence, or a
butterfly group) with groups of equal size side by side, so that each `Bucket` of the matrix is, by
a plain view, a batch of equally long sequences: no padding and no mask inside.

Legend: B sequences, L full length, T real tokens, G groups, n positions of a group, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dmx.nn.parallel import row_pieces, run_shares, single_thread


@dataclass(frozen=True)
class Grouping:
    """How a sequence of L positions splits into groups of `size` positions.

    A group holds the positions {base + j * stride, j < size}; `stride=1, size=L` is the whole
    sequence. `size * stride` divides L.
    """

    size: int
    stride: int = 1


@dataclass(frozen=True)
class Bucket:
    """Rows `start : start + count * length` of a layout: `count` groups of `length` real tokens."""

    start: int
    count: int
    length: int

    @property
    def stop(self) -> int:
        """The first row after the bucket."""
        return self.start + self.count * self.length


@dataclass(frozen=True)
class Layout:
    """An order of the real tokens in which equally long groups are neighbours.

    Attributes:
        grouping: what a group is.
        order: [T] for each row, the token's number in natural (sequence, position) order.
        inverse: [T] the inverse permutation.
        slot: [T] for each row, the token's position within its group, in 0..size-1.
        buckets: cover the rows; longest groups last.
        natural: whether the order is the natural one, as for stride 1 without a masked token.
        lengths: [G] real tokens of each group with any, ascending.
        kept: what others compute from a layout once (see dmx.nn.padding).
    """

    grouping: Grouping
    order: Tensor
    inverse: Tensor
    slot: Tensor
    buckets: tuple[Bucket, ...]
    natural: bool
    lengths: Tensor
    kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Packing:
    """The real tokens of a batch, in natural order.

    Attributes:
        mask: [B, L] bool, True = real.
        sequence: [T] the sequence of each real token.
        position: [T] its position, in 0..L-1.
    """

    mask: Tensor
    sequence: Tensor
    position: Tensor
    _layouts: dict[Grouping, Layout] = field(default_factory=dict, repr=False, compare=False)

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each sequence."""
        with single_thread(self.mask):
            return torch.bincount(self.sequence, minlength=self.mask.shape[0]).tolist()

    @property
    def num_tokens(self) -> int:
        """T, the number of real tokens."""
        return self.sequence.shape[0]

    def layout(self, grouping: Grouping) -> Layout:
        """The layout for a grouping; computed once per batch and kept."""
        if grouping not in self._layouts:
            with single_thread(self.mask):
                self._layouts[grouping] = _lay_out(self, grouping)
        return self._layouts[grouping]


def pack(mask: Tensor) -> Packing:
    """Pack the real tokens of a [B, L] bool mask."""
    sequence, position = mask.nonzero(as_tuple=True)
    return Packing(mask=mask, sequence=sequence, position=position)


def to_groups(x: Tensor, grouping: Grouping) -> Tensor:
    """[B, L, ...] -> [B * L / size, size, ...]: the groups of each sequence, as rows."""
    batch, length, *rest = x.shape
    size, stride = grouping.size, grouping.stride
    x = x.reshape(batch, length // (size * stride), size, stride, *rest).transpose(2, 3)
    return x.reshape(-1, size, *rest)


def from_groups(x: Tensor, grouping: Grouping, length: int) -> Tensor:
    """The inverse of `to_groups`: [B * L / size, size, ...] -> [B, L, ...]."""
    size, stride = grouping.size, grouping.stride
    rest = x.shape[2:]
    x = x.reshape(-1, length // (size * stride), stride, size, *rest).transpose(2, 3)
    return x.reshape(-1, length, *rest)


def _lay_out(packing: Packing, grouping: Grouping) -> Layout:
    mask = packing.mask
    natural = (mask.flatten().cumsum(0) - 1).view_as(mask)  # dense place -> token number
    groups = to_groups(mask, grouping)  # [G, n]
    counts = groups.sum(1)
    by_count = torch.argsort(counts, stable=True)
    groups = groups[by_count]
    numbers = to_groups(natural, grouping)[by_count]
    group, slot = groups.nonzero(as_tuple=True)
    order = numbers[group, slot]  # numbers[groups] would search them again
    inverse = torch.empty_like(order)
    ascending = torch.arange(order.shape[0], device=order.device)
    inverse[order] = ascending
    buckets = []
    start = 0
    sizes = torch.bincount(counts, minlength=grouping.size + 1).tolist()
    for length, count in enumerate(sizes):
        if length and count:
            buckets.append(Bucket(start, count, length))
            start += count * length
    in_order = len(buckets) <= 1 and torch.equal(order, ascending)
    lengths = counts[by_count][sizes[0] :]
    return Layout(grouping, order, inverse, slot, tuple(buckets), in_order, lengths)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """x[order], by shares on a CPU."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.index_select(0, order)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)

    def work(share: Sequence[slice]) -> None:
        for rows in share:
            torch.index_select(x, 0, order[rows], out=out[rows])

    run_shares(work, row_pieces(x.shape[0]))
    return out


class _Permute(torch.autograd.Function):
    """Rows of x in another order; the gradient is the inverse permutation, not a scatter-add."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor
    ) -> Tensor:
        ctx.inverse = inverse  # type: ignore[attr-defined]
        return _take(x, order)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return _take(grad, ctx.inverse), None, None  # type: ignore[attr-defined]


def reorder(x: Tensor, current: Layout | None, wanted: Layout) -> Tensor:
    """Move the rows of x [T, D] from one layout (None: natural order) into another."""
    if current is wanted or (wanted.natural and (current is None or current.natural)):
        return x
    if current is None:
        return _Permute.apply(x, wanted.order, wanted.inverse)
    with single_thread(x):
        order = current.inverse[wanted.order]
        inverse = wanted.inverse[current.order]
    return _Permute.apply(x, order, inverse)
