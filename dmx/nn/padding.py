"""Groups of similar length as one batch: padded by one gather, and back by another.

For accelerators, where a call for each length would be hundreds of small kernels. All indices are
computed where the layout is, once a batch, without a copy from the host or a wait for the device.

Legend: T rows, n groups, w rows of a padded group, N features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dmx.nn.packing import Layout


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


def padded_batches(layout: Layout) -> list[Padded]:
    """The rows of a layout as few batches, in their order; computed once and kept."""
    if "padded" not in layout.kept:
        layout.kept["padded"] = list(_pad(layout))
    batches: list[Padded] = layout.kept["padded"]
    return batches


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
        rows = same[-1].stop - first
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
    if padded.index is None:
        return x.view(padded.count, padded.width, -1)
    out = _Gather.apply(x, padded.index, padded.place, None)
    return out.view(padded.count, padded.width, -1)


def unpad_rows(x: Tensor, padded: Padded) -> Tensor:
    """[count, width, N] -> [rows, N], the inverse of `pad_rows`."""
    x = x.flatten(0, 1)
    if padded.index is None:
        return x
    return _Gather.apply(x, padded.place, padded.index, padded.keep)


class _Gather(torch.autograd.Function):
    """x[index], whose gradient is a gather as well: torch's own would be a sum by atomics."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        index: Tensor,
        back: Tensor,
        real: Tensor | None,
    ) -> Tensor:
        ctx.back, ctx.real = back, real  # type: ignore[attr-defined]
        return x.index_select(0, index)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor, None, None, None]:
        grad = grads[0].index_select(0, ctx.back)  # type: ignore[attr-defined]
        real = ctx.real  # type: ignore[attr-defined]
        if real is not None:
            grad = grad.masked_fill_(~real.flatten()[:, None], 0.0)
        return grad, None, None, None
