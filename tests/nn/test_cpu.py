"""Attention with dropout on a CPU: the formula, its gradient, the rate and the seeds of dropout."""

from __future__ import annotations

import pytest
import torch

from dmx.nn import cpu
from dmx.nn.cpu import dropout_attention

WAYS = {"kept": (256, 1 << 16), "in pieces": (256, 200), "computed again": (4, 64)}
"""LONGEST_KEPT and SCORES_AT_ONCE."""


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    longest_kept, at_once = WAYS[request.param]
    monkeypatch.setattr(cpu, "LONGEST_KEPT", longest_kept)
    monkeypatch.setattr(cpu, "SCORES_AT_ONCE", at_once)


def inputs(count=5, length=13):
    torch.manual_seed(0)
    return [torch.randn(count, 2, length, 4).requires_grad_() for _ in range(3)]


def keys(count=5, length=13):
    keep = torch.rand(count, 1, 1, length) < 0.7
    keep[..., 0] = True
    return keep


def plain(q, k, v, keep, factor=1.0):
    """`factor` is what dropout multiplies the weights by."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    return (scores.softmax(-1) * factor) @ v


def assert_same(out, leaves, expected, other):
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    for x, y in zip(leaves, other, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_the_formula_and_its_gradient(way, masked):
    keep = keys() if masked else None
    leaves, other = inputs(), inputs()
    assert_same(dropout_attention(*leaves, keep, 0.0), leaves, plain(*other, keep), other)


def dropped_weights(shape, dropout, keep=None):
    """[n, H, l, l], the weights after dropout: values that are unit vectors show them."""
    q, k, _ = inputs(*shape)
    eye = torch.eye(shape[1]).expand(shape[0], 2, -1, -1)
    q, k = (torch.nn.functional.pad(x, (0, shape[1] - 4)) for x in (q, k))
    torch.manual_seed(3)
    return dropout_attention(q, k, eye, keep, dropout).detach()


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_sees_the_same_dropout(way, masked):
    """A mask that is drawn anew in the backward pass would differ."""
    keep = keys() if masked else None
    factor = (dropped_weights((5, 13), 0.4, keep) > 0) / 0.6
    assert 0.3 < (factor == 0).float().mean() < 0.7
    leaves, other = inputs(), inputs()
    torch.manual_seed(3)
    out = dropout_attention(*leaves, keep, 0.4)
    assert_same(out, leaves, plain(*other, keep, factor), other)


@pytest.mark.parametrize("probability", [0.1, 0.37, 0.9])
def test_dropout_drops_at_its_rate_independently(probability):
    """Over more weights than a piece has."""
    weights = dropped_weights((40, 100), probability)
    assert weights.numel() > 3 * cpu.SCORES_AT_ONCE
    dropped = (weights == 0).double().flatten() - probability
    variance = probability * (1 - probability)
    assert abs(dropped.mean()) < 5 * (variance / len(dropped)) ** 0.5
    # Neighbours within and across 64-bit draws, rows, heads and pieces: no correlation.
    for lag in (1, 2, 3, 4, 5, 100, 10_000, 260_000):
        correlation = (dropped[lag:] * dropped[:-lag]).mean() / variance
        assert abs(correlation) < 5 / (len(dropped) - lag) ** 0.5, lag
    by_column = dropped.view(-1, 100).mean(0)
    assert by_column.abs().max() < 5 * (variance / 8000) ** 0.5


def test_dropout_keeps_the_mean():
    q, k, v = inputs(1, 6)
    many = [x.detach().expand(20_000, -1, -1, -1) for x in (q, k, v)]
    torch.manual_seed(1)
    out = dropout_attention(*many, None, 0.3)
    error = out.std(0) / len(out) ** 0.5
    assert ((out.mean(0) - plain(q, k, v, None)).abs() < 5 * error).all()


@pytest.mark.parametrize("longest", [256, 8], ids=["torch's threads", "own threads"])
def test_draws_repeat_under_a_seed_with_any_number_of_threads(monkeypatch, longest):
    monkeypatch.setattr("dmx.nn.cpu.LONGEST_KEPT", longest)
    results = []
    before = torch.get_num_threads()
    for number in (1, 2, 1):
        torch.set_num_threads(number)
        q, k, v = inputs(50, 60)
        torch.manual_seed(5)
        results.append([dropout_attention(q, k, v, None, 0.2) for _ in range(2)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a == 0, b == 0) for a, b in zip(results[0], other, strict=True))
        torch.testing.assert_close(results[0], other)
    assert not torch.equal(*results[0]), "each call draws its own"


def test_no_memory_in_proportion_to_the_square_of_long_rows():
    """Only q, k, v and the result are kept for the gradient."""
    q, k, v = inputs(1, 1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel() if isinstance(x, torch.Tensor) else 0) or x, lambda x: x
    ):
        dropout_attention(q, k, v, None, 0.1)
    assert sum(kept) <= 4 * q.numel()
