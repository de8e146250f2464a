"""The handwritten operations and their gradients against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmx.attention import softmax_rows
from dmx.attention.softmax import SoftmaxMixer
from dmx.attention.softmax_rows import attend_rows
from dmx.functional import lookup, mlp, norm_linear, segment_sum
from dmx.packing import Bucket


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def gradients(function, inputs):
    """Outputs of a function and the gradients of a fixed weighted sum of them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = function(*leaves)
    weights = [torch.linspace(-1, 1, o.numel()).view_as(o) for o in outs]
    sum((o * w).sum() for o, w in zip(outs, weights, strict=True)).backward()
    return [o.detach() for o in outs], [x.grad for x in leaves]


def assert_equal(fast, plain, summands=1):
    """Within 1e-5 of the size; long sums that cancel round at the size of their summands."""
    for got, expected in zip(fast[0] + fast[1], plain[0] + plain[1], strict=True):
        scale = max(1.0, expected.abs().max().item(), summands / 25)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * scale)


def norm_of(scale, shift):
    norm = nn.LayerNorm(len(scale))
    norm.weight, norm.bias = None, None
    del norm.weight, norm.bias
    norm.weight, norm.bias = scale, shift  # plain tensors, so that gradients reach the leaves
    return norm


@pytest.mark.parametrize("rows", [0, 1, 1024, 2500])
@pytest.mark.parametrize("with_bias", [True, False])
def test_norm_linear(threads, rows, with_bias):
    torch.manual_seed(0)
    inputs = [torch.randn(rows, 8), torch.randn(8), torch.randn(8), torch.randn(12, 8)]
    if with_bias:
        inputs.append(torch.randn(12))
    if rows == 0:
        out, same = norm_linear(inputs[0], norm_of(*inputs[1:3]), inputs[3], None)
        assert out.shape == (0, 12) and same.shape == (0, 8)
        return

    def fast(x, scale, shift, weight, bias=None):
        return norm_linear(x, norm_of(scale, shift), weight, bias)

    def plain(x, scale, shift, weight, bias=None):
        return F.linear(F.layer_norm(x, (8,), scale, shift, 1e-5), weight, bias), x * 1

    assert_equal(gradients(fast, inputs), gradients(plain, inputs), summands=2500)


def test_mlp(threads):
    torch.manual_seed(0)
    shapes = [(2500, 8), (8,), (8,), (12, 8), (12,), (6, 12), (6,)]
    inputs = [torch.randn(s) for s in shapes]

    def linear(weight, bias):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias
        return layer

    def fast(x, scale, shift, w1, b1, w2, b2):
        return mlp(x, norm_of(scale, shift), linear(w1, b1), linear(w2, b2), 0.5, False)

    def plain(x, scale, shift, w1, b1, w2, b2):
        normed = F.layer_norm(x, (8,), scale, shift, 1e-5)
        return F.linear(F.gelu(F.linear(normed, w1, b1)), w2, b2), x * 1

    assert_equal(gradients(fast, inputs), gradients(plain, inputs), summands=50_000)


@pytest.mark.parametrize("size", [7, 40_000], ids=["int16-sort", "int64-sort"])
def test_lookup(size):
    torch.manual_seed(0)
    index = torch.randint(size, (500,))
    table = [torch.randn(size, 4)]
    fast = gradients(lambda t: [lookup(t, index)], table)
    assert_equal(fast, gradients(lambda t: [t[index]], table))


def test_segment_sum():
    """A permuted sum with an empty segment, against a loop."""
    torch.manual_seed(0)
    x, order = [torch.randn(9, 4)], torch.randperm(9)
    segment = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3])  # none in 2 and 4

    def plain(x):
        rows = x[order]
        return [torch.stack([rows[segment == s].sum(0) for s in range(5)])]

    fast = gradients(lambda x: [segment_sum(x, order, segment, 5)], x)
    assert_equal(fast, gradients(plain, x))


BUCKETS = (Bucket(0, 5, 1), Bucket(5, 3, 2), Bucket(11, 7, 13), Bucket(102, 2, 40))


def attention_inputs():
    torch.manual_seed(0)
    return [torch.randn(s) for s in ((182, 8), (8,), (8,), (24, 8), (24,))]


def fast_attention(x, scale, shift, weight, bias, p=0.0):
    return attend_rows(x, norm_of(scale, shift), weight, bias, BUCKETS, 2, p)


def plain_attention(x, scale, shift, weight, bias):
    qkv = F.linear(F.layer_norm(x, (8,), scale, shift, 1e-5), weight, bias)
    outs = []
    for b in BUCKETS:
        q, k, v = qkv[b.start : b.stop].view(b.count, b.length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        out = torch.softmax(q @ k.mT / 2.0, -1) @ v
        outs.append(out.transpose(1, 2).reshape(-1, 8))
    return torch.cat(outs), x * 1


@pytest.mark.parametrize(("longest_kept", "at_once"), [(256, 1 << 16), (4, 1 << 16), (4, 64)])
def test_attention_rows(threads, monkeypatch, longest_kept, at_once):
    """Weights kept, computed again, and computed again in blocks of queries."""
    monkeypatch.setattr(softmax_rows, "LONGEST_KEPT", longest_kept)
    monkeypatch.setattr(softmax_rows, "SCORES_AT_ONCE", at_once)
    inputs = attention_inputs()
    assert_equal(gradients(fast_attention, inputs), gradients(plain_attention, inputs))


@pytest.mark.parametrize(("longest_kept", "at_once"), [(256, 1 << 16), (4, 64)])
def test_the_gradient_sees_the_same_dropout(monkeypatch, longest_kept, at_once):
    """A finite difference at fixed seed: a mask drawn anew in the backward pass would differ."""
    monkeypatch.setattr(softmax_rows, "LONGEST_KEPT", longest_kept)
    monkeypatch.setattr(softmax_rows, "SCORES_AT_ONCE", at_once)
    inputs = attention_inputs()

    def dropped(*leaves):
        torch.manual_seed(3)
        return fast_attention(*leaves, p=0.4)

    (out, _), (grad, *_) = gradients(dropped, inputs)
    assert not torch.allclose(out, fast_attention(*inputs)[0])
    direction, step = torch.randn(182, 8), 1e-2
    ends = [
        gradients(dropped, [inputs[0] + sign * step * direction, *inputs[1:]])[0]
        for sign in (1, -1)
    ]
    weights = [torch.linspace(-1, 1, o.numel()).view_as(o) for o in ends[0]]
    up, down = (sum((o * w).sum() for o, w in zip(e, weights, strict=True)) for e in ends)
    assert float((up - down) / (2 * step)) == pytest.approx(
        float((grad * direction).sum()), rel=0.01
    )


def test_padded_buckets_equal_exact_ones():
    """The path for accelerators, on the CPU."""
    torch.manual_seed(0)
    buckets = []
    for count, length in ((4, 1), (3, 9), (2, 16), (5, 17), (1, 40)):
        q, k, v = torch.randn(3, count, 2, length, 4)
        buckets.append((q, k, v, torch.arange(length).expand(count, -1)))
    mixer = SoftmaxMixer(0.0)
    exact, padded = mixer.mix_buckets(buckets, 40), mixer.mix_padded(buckets)
    for one, other in zip(exact, padded, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
