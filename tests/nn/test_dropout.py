"""Dropout's rate, mean, independence and seeds."""

from __future__ import annotations

import pytest
import torch

from dmx.nn.dropout import Dropout, dropout, keep_mask


@pytest.mark.parametrize("probability", [0.1, 0.37, 0.9])
def test_dropout_drops_at_its_rate_independently_and_keeps_the_mean(probability):
    torch.manual_seed(0)
    x = torch.ones(2000, 500)
    kept = dropout(x, probability, True)
    values = kept.unique()
    assert values.tolist() == [0.0, pytest.approx(1 / (1 - probability), rel=1e-6)]
    dropped = (kept == 0).double()
    error = (probability * (1 - probability) / x.numel()) ** 0.5
    assert abs(dropped.mean().item() - probability) < 5 * error
    assert kept.mean().item() == pytest.approx(1.0, abs=5 * error / (1 - probability))
    # Neighbours within and across 64-bit draws, rows, and pieces of 1024 rows: no correlation.
    flat = dropped.flatten() - probability
    for lag in (1, 2, 3, 4, 5, 500, 1024 * 500):
        correlation = (flat[lag:] * flat[:-lag]).mean() / (probability * (1 - probability))
        assert abs(correlation.item()) < 5 / (flat.numel() - lag) ** 0.5, lag
    by_column = dropped.mean(0) - probability
    assert by_column.abs().max() < 5 * (probability * (1 - probability) / 2000) ** 0.5


def test_dropout_of_nothing_and_in_evaluation():
    x = torch.randn(10, 10)
    state = torch.get_rng_state()
    assert dropout(x, 0.0, True) is x and Dropout(0.5).eval()(x) is x
    assert torch.equal(torch.get_rng_state(), state), "and nothing is drawn"
    assert keep_mask(torch.Size((5,)), 1e-9, 0).tolist() == [1] * 5


def test_dropout_repeats_under_a_seed_with_any_number_of_threads():
    x = torch.ones(5000, 7)
    results = []
    before = torch.get_num_threads()
    for number in (1, 2, 1):
        torch.set_num_threads(number)
        torch.manual_seed(5)
        results.append((dropout(x, 0.2, True), dropout(x, 0.2, True)))
    torch.set_num_threads(before)
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )
    assert not torch.equal(*results[0]), "each call draws its own"


def test_the_gradient_of_dropout_is_its_mask():
    x = torch.randn(3000, 4, requires_grad=True)
    out = dropout(x, 0.3, True)
    out.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), out.detach())
