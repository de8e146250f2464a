"""The handwritten operations and their gradients against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmx.attention import softmax_rows
from dmx.attention.softmax_rows import Projections, attend_rows
from dmx.nn.ends import embed, norm_sum
from dmx.nn.functional import norm_linear, residual_linear, residual_mlp, small_linear
from dmx.nn.packing import Bucket, pack


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


def linear_of(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias
    return layer


def test_small_linear(threads):
    torch.manual_seed(0)
    inputs = [torch.randn(s) for s in ((5, 8), (3, 8), (3,))]
    fast = gradients(lambda x, w, b: [small_linear(x, linear_of(w, b))], inputs)
    assert_equal(fast, gradients(lambda x, w, b: [x @ w.T + b], inputs))


def fast_linear(x, mixed, weight, bias, drops=(0.0, 0.0)):
    return [residual_linear(x, mixed, linear_of(weight, bias), drops[1])]


def linear_inputs():
    torch.manual_seed(0)
    return [torch.randn(s) for s in ((1500, 6), (1500, 8), (6, 8), (6,))]


def test_residual_linear(threads):
    inputs = linear_inputs()
    plain = gradients(lambda x, mixed, w, b: [x + mixed @ w.T + b], inputs)
    assert_equal(gradients(fast_linear, inputs), plain, summands=2500)


def fast_mlp(x, scale, shift, w1, b1, w2, b2, drops=(0.0, 0.0)):
    norm = norm_of(scale, shift)
    return [residual_mlp(x, norm, linear_of(w1, b1), linear_of(w2, b2), drops)]


def mlp_inputs(rows=2500):
    torch.manual_seed(0)
    return [torch.randn(s) for s in ((rows, 8), (8,), (8,), (12, 8), (12,), (8, 12), (8,))]


def test_residual_mlp(threads):
    def plain(x, scale, shift, w1, b1, w2, b2):
        normed = F.layer_norm(x, (8,), scale, shift, 1e-5)
        return [x + F.linear(F.gelu(F.linear(normed, w1, b1)), w2, b2)]

    inputs = mlp_inputs()
    assert_equal(gradients(fast_mlp, inputs), gradients(plain, inputs), summands=50_000)


@pytest.mark.parametrize("size", [7, 3000, 40_000])
def test_embed(threads, size):
    """Two tables; 3000 rows are several pieces, and 40,000 sort as int64."""
    torch.manual_seed(0)
    one, two = torch.randint(size, (500,)), torch.randint(5, (500,))
    tables = [torch.randn(size, 4), torch.randn(5, 4)]
    fast = gradients(lambda a, b: [embed((a, b), (one, two), 0.0)], tables)
    assert_equal(fast, gradients(lambda a, b: [a[one] + b[two]], tables))


def test_norm_sum(threads):
    """Sums over permuted sequences, empty ones among them, against a loop."""
    torch.manual_seed(0)
    lengths = [3, 2, 0, 4, 0]
    inputs, order = [torch.randn(9, 4), torch.randn(4), torch.randn(4)], torch.randperm(9)
    packing = pack(torch.arange(4) < torch.tensor(lengths)[:, None])

    def plain(x, scale, shift):
        rows = F.layer_norm(x, (4,), scale, shift, 1e-5)[order]
        return [torch.stack([part.sum(0) for part in rows.split(lengths)])]

    def fast(x, scale, shift):
        return [norm_sum(x, norm_of(scale, shift), order, packing)]

    assert_equal(gradients(fast, inputs), gradients(plain, inputs))


BUCKETS = (Bucket(0, 5, 1), Bucket(5, 3, 2), Bucket(11, 7, 13), Bucket(102, 2, 40))


def attention_inputs():
    torch.manual_seed(0)
    shapes = ((182, 8), (8,), (8,), (24, 8), (24,), (8, 8), (8,))
    return [torch.randn(s) for s in shapes]


def fast_attention(x, scale, shift, weight, bias, weight_out, bias_out, drops=(0.0, 0.0)):
    output = linear_of(weight_out, bias_out)
    around = Projections(norm_of(scale, shift), weight, bias, output, 2, drops[1])
    return [attend_rows(x, around, BUCKETS, drops[0])]


def plain_attention(x, scale, shift, weight, bias, weight_out, bias_out):
    qkv = F.linear(F.layer_norm(x, (8,), scale, shift, 1e-5), weight, bias)
    outs = []
    for b in BUCKETS:
        q, k, v = qkv[b.start : b.stop].view(b.count, b.length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        out = torch.softmax(q @ k.mT / 2.0, -1) @ v
        outs.append(out.transpose(1, 2).reshape(-1, 8))
    return [x + F.linear(torch.cat(outs), weight_out, bias_out)]


@pytest.mark.parametrize(("longest_kept", "at_once"), [(256, 1 << 16), (4, 1 << 16), (4, 64)])
def test_attention_rows(threads, monkeypatch, longest_kept, at_once):
    """Weights kept, computed again, and computed again in blocks of queries."""
    monkeypatch.setattr(softmax_rows, "LONGEST_KEPT", longest_kept)
    monkeypatch.setattr(softmax_rows, "SCORES_AT_ONCE", at_once)
    inputs = attention_inputs()
    assert_equal(gradients(fast_attention, inputs), gradients(plain_attention, inputs))


@pytest.mark.parametrize("drops", [(0.4, 0.0), (0.0, 0.3), (0.4, 0.3)])
@pytest.mark.parametrize("part", ["attention", "attention in blocks", "mlp", "linear"])
def test_the_gradient_sees_the_same_dropout(threads, monkeypatch, part, drops):
    """A finite difference at fixed seed: a mask drawn anew in the backward pass would differ."""
    if part == "attention in blocks":
        monkeypatch.setattr(softmax_rows, "LONGEST_KEPT", 4)
        monkeypatch.setattr(softmax_rows, "SCORES_AT_ONCE", 64)
    if part == "linear" and not drops[1]:
        pytest.skip("it has no dropout of its own inside")
    function, inputs = {
        "mlp": (fast_mlp, mlp_inputs(1500)),
        "linear": (fast_linear, linear_inputs()),
    }.get(part, (fast_attention, attention_inputs()))

    def dropped(*leaves):
        torch.manual_seed(3)
        return function(*leaves, drops=drops)

    (out,), grads = gradients(dropped, inputs)
    assert not torch.allclose(out, function(*inputs)[0], atol=0.1)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out).double()
    for number, grad in enumerate(grads):  # each input apart, the weights too
        step = 1e-2 / inputs[number].numel() ** 0.5
        direction = torch.where(grad >= 0, 1.0, -1.0)
        ends = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[number] = inputs[number] + sign * step * direction
            ends.append((dropped(*moved)[0].double() * weight).sum())
        slope = float((grad * direction).double().sum())
        assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(slope, rel=0.02), number
