"""Token packing: which tokens are real, and how they lie in memory so that only they are computed.

A token whose mask is 0 is no attention key, its output is zeroed, and mean pooling divides by the
full length. It cannot influence the result, so a model may run on the real tokens only. Real
tokens are rows of a `[T, D]` matrix. A `Layout` orders them by group (a whole sequence, or a
butterfly group) with groups of equal size side by side, so that each `Bucket` of the matrix is, by
a plain view, a batch of equally long sequences: no padding and no mask inside. Where a call for
each length would be hundreds of small ones, groups of similar length run as one `Padded` batch,
padded by one gather, and back by another. All indices are computed where the layout is, once a
batch, without a copy from the host or a wait for the device.

Legend: B sequences, L full length, T real tokens, G groups, n positions of a group, w rows
of a padded group, D and N features.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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
    def rows(self) -> int:
        return self.count * self.length


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
    """

    grouping: Grouping
    order: Tensor
    inverse: Tensor
    slot: Tensor
    buckets: tuple[Bucket, ...]
    natural: bool
    lengths: Tensor

    @functools.cached_property
    def padded(self) -> list[Padded]:
        """The rows as few batches, in their order."""
        return list(_pad(self))


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

    def layout(self, grouping: Grouping) -> Layout:
        """The layout for a grouping; computed once per batch and kept."""
        if grouping not in self._layouts:
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
    sizes = torch.bincount(counts, minlength=grouping.size + 1).tolist()
    buckets, start = [], 0
    for length, count in enumerate(sizes):
        if length and count:
            buckets.append(Bucket(start, count, length))
            start += buckets[-1].rows
    in_order = len(buckets) <= 1 and torch.equal(order, ascending)
    lengths = counts[by_count][sizes[0] :]
    return Layout(grouping, order, inverse, slot, tuple(buckets), in_order, lengths)


def reorder(x: Tensor, current: Layout | None, wanted: Layout) -> Tensor:
    """Move the rows of x [T, D] from one layout (None: natural order) into another."""
    if current is wanted or (wanted.natural and (current is None or current.natural)):
        return x
    if current is None:
        return _Gather.apply(x, wanted.order, wanted.inverse, None)
    order = current.inverse[wanted.order]
    inverse = wanted.inverse[current.order]
    return _Gather.apply(x, order, inverse, None)


@dataclass(frozen=True)
class Padded:
    """Neighbouring buckets as one batch of `count` groups, each padded to `width` rows.

    Attributes:
        rows: how many of the layout's rows these are.
        index: [count * width] the row of each place, from 0; a place that pads has any row.
        place: [rows] the place of each row, the other way round.
        keep: [count, width] bool, True = a row and no padding; None where nothing is padded, and
            then `index` and `place` are None as well.
    """

    rows: int
    count: int
    width: int
    index: Tensor | None = None
    place: Tensor | None = None
    keep: Tensor | None = None


def padded_width(length: int) -> int:
    """To how many rows a group is padded: few different ones, a multiple of 16 or of an eighth of
    the power of two above.

    Torch's fused attention wants 16 of a mask. It makes padding of a large part of short groups: on
    Path-X 35 % of all rows (no gap) or 20 % (alpha 1.25), in groups of up to 128.
    """
    step = max(16, 1 << max((length - 1).bit_length() - 4, 0))
    return -(-length // step) * step


def _pad(layout: Layout) -> Iterator[Padded]:
    device = layout.order.device
    starts = layout.lengths.cumsum(0) - layout.lengths
    group = 0
    for width, members in itertools.groupby(layout.buckets, lambda b: padded_width(b.length)):
        same = list(members)
        first, count = same[0].start, sum(bucket.count for bucket in same)
        rows = sum(bucket.rows for bucket in same)
        mine = slice(group, group + count)
        group += count
        if len(same) == 1:
            yield Padded(rows, count, same[0].length)
            continue
        lengths, begin = layout.lengths[mine], starts[mine] - first
        column = torch.arange(width, device=device)
        index = (begin[:, None] + column).clamp_(max=rows - 1)
        # Where the padding before a row's group has moved it.
        moved = torch.arange(count, device=device) * width - begin
        moved = moved.repeat_interleave(lengths, output_size=rows)
        place = moved + torch.arange(rows, device=device)
        yield Padded(rows, count, width, index.flatten(), place, column < lengths[:, None])


def pad_rows(x: Tensor, padded: Padded) -> Tensor:
    """[rows, N] -> [count, width, N]; what pads is some row again, and gets no gradient."""
    if padded.index is not None:
        x = _Gather.apply(x, padded.index, padded.place, None)
    return x.view(padded.count, padded.width, -1)


def unpad_rows(x: Tensor, padded: Padded) -> Tensor:
    """[count, width, N] -> [rows, N], the inverse of `pad_rows`."""
    x = x.flatten(0, 1)
    if padded.index is None:
        return x
    return _Gather.apply(x, padded.place, padded.index, padded.keep)


def split_rows(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """The parts of x [T, N] that lie one after another.

    By `split`: the gradient of each slice would be a whole matrix of zeros. A split into one part
    would still cost a copy of its gradient.
    """
    return x.split(sizes) if len(sizes) > 1 else [x] * len(sizes)


def join_rows(parts: Sequence[Tensor], like: Tensor, width: int) -> Tensor:
    """The inverse of `split_rows`; [0, width] where there is no part."""
    if not parts:
        return like.new_zeros(0, width)
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


class _Gather(torch.autograd.Function):
    """x[index], whose gradient is a gather as well: torch's own would be a sum by atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, real: Tensor | None) -> Tensor:
        ctx.back, ctx.real = back, real
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grad.index_select(0, ctx.back)
        if ctx.real is not None:
            grad = grad.masked_fill_(~ctx.real.flatten()[:, None], 0.0)
        return grad, None, None, None
