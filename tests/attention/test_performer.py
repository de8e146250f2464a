"""Performer: it approaches softmax with more features; its directions; its redraws."""

import itertools

import pytest
import torch

from dmx.attention.performer import PerformerConfig, orthogonal_directions
from tests.attention.cases import HEAD_DIM, context, masks, qkv
from tests.attention.formulas import softmax_attention


def build(seed=0, **settings):
    torch.manual_seed(seed)
    return PerformerConfig(**settings).build(context()).eval()


def test_error_against_softmax_falls_with_the_number_of_features():
    """It approximates softmax(q k^T / Dh); seeds are averaged, so that the order is no luck."""
    q, k, v = (x[:1] for x in qkv())
    mask = masks()["full"][:1]
    exact = softmax_attention(q, k, v, mask, HEAD_DIM)

    def error(size):
        outs = [build(seed, num_features=size)(q, k, v, mask) for seed in range(8)]
        return torch.stack([(o - exact).square().mean().sqrt() for o in outs]).mean()

    errors = [error(size) for size in (8, 32, 128, 512)]
    assert all(b < 0.8 * a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.2 * exact.square().mean().sqrt()
    other = softmax_attention(q, k, v, mask, HEAD_DIM**0.5)
    assert errors[-1] < 0.2 * (exact - other).square().mean().sqrt(), "the scale is Dh"


@pytest.mark.parametrize("num_features", [1, 24])
@pytest.mark.parametrize("kind", ["random", "single"])
@pytest.mark.parametrize("kernel", ["softmax", "relu", "exp"])
def test_formula_with_masked_keys_in_the_normaliser(kernel, kind, num_features):
    """Example by example in float64, with the zero vectors of masked keys written out."""
    q, k, v = (
        x.mul(scale).double().requires_grad_() for x, scale in zip(qkv(), (3, 3, 1), strict=True)
    )
    mask = masks()[kind]
    mix = build(num_features=num_features, kernel=kernel).double()
    w = mix.projection
    real = mask[:, None, :, None].double()
    queries, keys = q / HEAD_DIM**0.5, k * real / HEAD_DIM**0.5
    if kernel == "relu":
        phi_q, phi_k = ((x @ w.T).clamp(min=0) + 1e-3 for x in (queries, keys))
    else:
        norms = [x.square().sum(-1, keepdim=True) / 2 for x in (queries, keys)]
        dots = [queries @ w.T, keys @ w.T]
        # Constants to the gradient; a masked key takes part with its 0.
        tops = [dots[0].amax(-1, keepdim=True).detach(), dots[1].amax((-1, -2), True).detach()]
        used = [n if kernel == "softmax" else 0 * n for n in norms]
        phi_q, phi_k = ((d - n - t).exp() + 1e-4 for d, n, t in zip(dots, used, tops, strict=True))
    weights = phi_q @ phi_k.transpose(-1, -2)
    expected = (weights / weights.sum(-1, keepdim=True)) @ (v * real)
    probe = torch.randn_like(expected) * real
    grads = torch.autograd.grad((expected * probe).sum(), (q, k, v))

    out = mix(q, k, v, mask)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad((out * probe).sum(), (q, k, v))
    torch.testing.assert_close(ours, grads, rtol=1e-6, atol=1e-9)
    for row in range(4):
        slot = mask[row].nonzero()[:, 0]
        part = (x[row : row + 1, :, slot] for x in (q, k, v))
        packed = mix.mix_real(*part, mask.shape[1])
        torch.testing.assert_close(packed[0], expected[row][:, slot])


def test_large_inputs_do_not_overflow():
    q, k, v = (x * 100 for x in qkv())
    for kernel in ("softmax", "relu", "exp"):
        assert build(num_features=24, kernel=kernel)(q, k, v, masks()["holes"]).isfinite().all()


def test_directions_are_orthogonal_in_blocks_with_gaussian_lengths():
    torch.manual_seed(0)
    rows = orthogonal_directions(20, 8)
    assert rows.shape == (20, 8)
    for block in rows.split(8):
        gram = block @ block.T
        off = gram - torch.diag(gram.diagonal())
        assert off.abs().max() < 1e-4
    many = torch.cat([orthogonal_directions(8, 8) for _ in range(500)])
    covariance = many.T @ many / len(many)
    assert (covariance - torch.eye(8)).abs().max() < 0.1
    assert many.mean(0).abs().max() < 0.06  # LAPACK's signs would bias single entries
    squares = many.square().sum(1)
    assert abs(squares.mean() - 8) < 0.3 and abs(squares.var() - 16) < 2.5  # chi-square of 8


def drawn(step, *, seed=7, layer=0, **settings):
    """The directions before a step, of a mixer that sees that step only."""
    torch.manual_seed(3)
    mix = PerformerConfig(num_features=8, redraw_every_steps=2, **settings).build(context(layer))
    mix.at_step(step, seed)
    return mix.projection


def test_redraws_are_a_function_of_seed_layer_and_step():
    """Whatever steps a mixer has seen, in which order, and how often."""
    first = drawn(0)
    assert torch.equal(drawn(1), first), "the ones it was built with"
    second, third = drawn(2), drawn(4)
    assert torch.equal(drawn(3), second) and torch.equal(drawn(5), third)
    torch.manual_seed(99)
    mix = PerformerConfig(num_features=8, redraw_every_steps=2).build(context())
    own = mix.projection
    for step in (0, 0, 1, 1):
        mix.at_step(step, 7)
        assert mix.projection is own
    for step, expected in ((2, second), (2, second), (3, second), (4, third), (2, second)):
        mix.at_step(step, 7)
        assert torch.equal(mix.projection, expected), step
    others = [first, second, third, drawn(2, seed=8), drawn(2, layer=1)]
    for one, other in itertools.combinations(others, 2):
        assert not torch.equal(one, other)
    gram = second @ second.T
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-4, "still orthogonal"


def test_no_pass_redraws_and_no_redraw_moves_the_generator():
    q, k, v = qkv()
    mix = build(num_features=8, redraw_every_steps=1).train()
    mix.at_step(3, 0)
    before, state = mix.projection, torch.get_rng_state()
    for _ in range(3):
        mix(q, k, v, masks()["full"])
    mix.at_step(4, 0)
    assert not torch.equal(mix.projection, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_redraw_between_two_passes_keeps_both_differentiable():
    q, k, v = (x.requires_grad_() for x in qkv())
    mix = build(num_features=8, redraw_every_steps=1).train()
    mask = masks()["full"]
    total = mix(q, k, v, mask)
    mix.at_step(1, 0)
    (total + mix(q, k, v, mask)).sum().backward()
    assert q.grad.isfinite().all()


def test_back_at_the_start_the_loaded_directions_stay():
    mix = build(num_features=8, redraw_every_steps=2)
    first = {"projection": mix.projection.clone()}
    mix.at_step(6, 0)
    mix.load_state_dict(first)
    mix.at_step(0, 0)
    assert torch.equal(mix.projection, first["projection"])


@pytest.mark.parametrize("every", [0, 5])
def test_state_holds_nothing_but_the_directions(every):
    assert list(build(redraw_every_steps=every).state_dict()) == ["projection"]
