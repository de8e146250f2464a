"""Groups of similar length in one batch: every row comes back, and gradients do too."""

from __future__ import annotations

import pytest
import torch

from dmx.attention.softmax import SoftmaxMixer
from dmx.nn.packing import (
    Grouping,
    pack,
    pad_rows,
    padded_width,
    unpad_rows,
)


def layout_of(lengths, size):
    """Whole sequences of these lengths, as a batch of `size` positions has them."""
    return pack(torch.arange(size) < torch.tensor(lengths)[:, None]).layout(Grouping(size))


@pytest.mark.parametrize("length", [*range(1, 300), 1000, 4095, 4096, 4097, 65536])
def test_widths_hold_the_group_and_waste_little(length):
    width = padded_width(length)
    assert width >= length and width % 16 == 0
    assert width - length < max(16, length / 8), "an eighth at most"


def test_there_are_few_widths():
    assert len({padded_width(n) for n in range(1, 129)}) == 8
    assert len({padded_width(n) for n in range(2049, 4097)}) == 8


@pytest.mark.parametrize(
    "lengths",
    [[3, 0, 40, 16, 17, 9, 9, 39, 1], [5, 5, 5], [40], [0, 0], [40, 40, 2], list(range(1, 41))],
    ids=str,
)
def test_rows_and_gradients_come_back(lengths):
    layout = layout_of(lengths, 40)
    total = sum(lengths)
    x = torch.arange(total * 2.0).view(total, 2).requires_grad_()
    batches = layout.padded
    assert layout.padded is batches, "computed once"
    assert sum(b.rows for b in batches) == total
    start, backs = 0, []
    for batch in batches:
        rows = x[start : start + batch.rows]
        wide = pad_rows(rows, batch)
        assert wide.shape == (batch.count, batch.width, 2)
        if batch.keep is not None:
            kept = wide[batch.keep]  # groups lie one after another, so real rows are in order
            assert torch.equal(kept, rows)
            wide = wide.masked_fill(~batch.keep[..., None], torch.nan)  # padding must not count
        backs.append(unpad_rows(wide, batch))
        start += batch.rows
    back = torch.cat(backs) if backs else x
    assert torch.equal(back, x)
    weight = torch.linspace(-1, 1, total * 2).view(total, 2)
    (back * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_attention_over_padded_groups_equals_the_exact_one():
    """`mix_rows` against `mix_real` bucket by bucket, forward and backward."""
    torch.manual_seed(0)
    layout = layout_of([1, 9, 9, 16, 17, 40, 38, 33], 40)
    qkv = torch.randn(163, 3 * 2 * 4)
    found = []
    for padded in (True, False):
        leaf, mixer = qkv.clone().requires_grad_(), SoftmaxMixer(0.0)
        if padded:
            out = mixer.mix_rows(leaf, layout, 2)
        else:
            parts = []
            for bucket in layout.buckets:
                rows = leaf[bucket.start :][: bucket.rows].view(
                    bucket.count, bucket.length, 3, 2, 4
                )
                q, k, v = rows.permute(2, 0, 3, 1, 4)
                mixed = mixer.mix_real(q, k, v, 40)
                parts.append(mixed.transpose(1, 2).reshape(-1, 8))
            out = torch.cat(parts)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append((out.detach(), leaf.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_projections_of_mixed_precision():
    """q, k and v in bf16, as autocast leaves them: attention is float32, as the reference's."""
    layout = layout_of([1, 9, 40, 38], 40)
    qkv = torch.randn(88, 24).bfloat16().requires_grad_()
    out = SoftmaxMixer(0.0).mix_rows(qkv, layout, 2)
    assert out.dtype == torch.float32
    exact = SoftmaxMixer(0.0).mix_rows(qkv.float(), layout, 2)
    assert torch.equal(out, exact)
    out.sum().backward()
    assert qkv.grad.dtype == torch.bfloat16 and qkv.grad.isfinite().all()


def test_a_batch_of_nothing():
    assert SoftmaxMixer(0.0).mix_rows(torch.zeros(0, 24), layout_of([0, 0], 8), 2).shape == (0, 8)
