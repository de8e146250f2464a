"""What every attention promises; it runs over the registry, so a new attention is tested, too."""

import pytest
import torch

from dmx.attention import AttentionConfig
from dmx.attention.base import MultiHead
from dmx.nn.packing import pack
from tests.attention.cases import (
    CASES,
    HEAD_DIM,
    HEADS,
    LENGTH,
    NAMES,
    base_name,
    config,
    context,
    masks,
    mixer,
    qkv,
)

every = pytest.mark.parametrize("name", NAMES)
every_mask = pytest.mark.parametrize("kind", list(masks()))


def run(name, q, k, v, mask, *, seed=0, layer=0):
    mix = mixer(name, layer=layer)
    torch.manual_seed(seed)  # reformer draws its hashes here
    return mix(q, k, v, mask)


@every
def test_config_survives_yaml(name):
    settings = config(name)
    assert AttentionConfig.parse(settings.to_plain(), "attention") == settings
    assert settings.name == CASES[name]["name"]


@every
def test_sized_name_sets_the_size_field(name):
    settings = config(name)
    if settings.size_field is None:
        assert settings.size is None
        return
    sized = AttentionConfig.parse(f"{settings.name}-16", "attention")
    assert getattr(sized, settings.size_field) == sized.size == 16


@every
@every_mask
def test_output_is_finite_and_shaped(name, kind):
    out = run(name, *qkv(), masks()[kind])
    assert out.shape == (4, HEADS, LENGTH, HEAD_DIM)
    assert out.isfinite().all()


@every
@pytest.mark.parametrize("layer", [0, 1])
def test_masked_tokens_do_not_influence_real_ones(name, layer):
    q, k, v = qkv()
    mask = masks()["holes"]
    real, hidden = mask[:, None, :, None], ~mask[:, None, :, None]
    before = run(name, q, k, v, mask, layer=layer)
    others = [x + 50 * hidden * torch.randn_like(x) for x in (q, k, v)]
    after = run(name, *others, mask, layer=layer)
    torch.testing.assert_close(after * real, before * real, rtol=1e-5, atol=1e-6)


@every
def test_real_tokens_do_influence_each_other(name):
    """So that the test above cannot pass by mixing nothing at all."""
    q, k, v = qkv()
    mask = masks()["full"]
    changed = v.clone()
    changed[:, :, 3] += 1
    difference = (run(name, q, k, changed, mask) - run(name, q, k, v, mask)).abs().amax((0, 1, 3))
    moved = int((difference > 1e-7).sum())
    assert moved == 1 if base_name(name) == "none" else moved > 1


@every
def test_gradients_stay_finite_and_masked_tokens_get_none(name):
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = masks()["holes"]
    mix = mixer(name)
    out = mix(q, k, v, mask)
    (out * mask[:, None, :, None]).square().sum().backward()
    for x in (q, k, v):
        if x.grad is not None:
            assert x.grad.isfinite().all()
            assert not (x.grad * ~mask[:, None, :, None]).any()
    for parameter in mix.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    out = mix(q, k, v, mask)
    out.sum().backward()  # masked rows included, which a model never does
    assert all(x.grad is None or x.grad.isfinite().all() for x in (q, k, v, *mix.parameters()))


@every
def test_gradients_match_finite_differences(name):
    """Along a random direction, in float64 where the mixer keeps it."""
    mix = mixer(name).double()
    leaves = [x.double().requires_grad_() for x in qkv(batch=4)]
    leaves += [p for p in mix.parameters()]
    mask = masks()["random"]
    weight = torch.randn(4, HEADS, LENGTH, HEAD_DIM, dtype=torch.float64)
    weight = weight * mask[:, None, :, None]
    steps = [torch.randn_like(x) / x.numel() ** 0.5 for x in leaves]

    def loss():
        torch.manual_seed(0)
        return (mix(*leaves[:3], mask).double() * weight).sum()

    grads = torch.autograd.grad(loss(), leaves, allow_unused=True)
    slope = sum((g * s).sum() for g, s in zip(grads, steps, strict=True) if g is not None)
    precise = mix(*leaves[:3], mask).dtype == torch.float64
    width = 1e-6 if precise else 1e-2
    with torch.no_grad():
        for x, step in zip(leaves, steps, strict=True):
            x += width * step
        ahead = loss()
        for x, step in zip(leaves, steps, strict=True):
            x -= 2 * width * step
        numeric = (ahead - loss()) / (2 * width)
    # Performer's stabiliser counts as a constant, as in the reference: exact up to its epsilon.
    tolerance = 5e-3 if not precise or "performer" in name else 1e-5
    torch.testing.assert_close(slope, numeric, rtol=tolerance, atol=tolerance)


@every
@pytest.mark.parametrize("packed", [False, True])
def test_mixed_precision_ends_at_the_projections(name, packed):
    """Mixers get float32 outside of autocast; `none`, packed, hands on what it got."""
    torch.manual_seed(0)
    heads, mask = MultiHead(16, config(name), context()).eval(), masks()["random"]
    mix, seen = heads.mixer, []
    if packed and not mix.packs:
        return
    inner, kind = heads.output.register_forward_pre_hook, "mix_buckets" if packed else "forward"
    real = getattr(mix, kind)

    def look(*args):
        tensors = args[0][0][:3] if packed else args[:3]
        seen.append(torch.is_autocast_enabled("cpu"))
        assert all(x.dtype == torch.float32 for x in tensors)
        return real(*args)

    setattr(mix, kind, look)
    inner(lambda _, args: seen.append(args[0].dtype))
    x = torch.randn(4, LENGTH, 16)
    with torch.autocast("cpu", torch.bfloat16):
        if packed:
            packing = pack(mask)
            heads.packed(x[mask], packing.layout(mix.grouping(LENGTH)))
        else:
            heads(x, mask)
    rows = packed and base_name(name) in (
        "none",
        "softmax",
        "butterfly",
    )  # mix_rows, which widens for itself
    assert seen[:-1] == ([] if rows else [False])
    assert seen[-1] == (torch.bfloat16 if packed and base_name(name) == "none" else torch.float32)


@every
def test_same_seed_same_mixer(name):
    q, k, v = qkv()
    mask = masks()["random"]
    first, again, other = mixer(name, seed=1), mixer(name, seed=1), mixer(name, seed=2)
    states = [m.state_dict() for m in (first, again, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not states[0] or any(not torch.equal(states[0][n], states[2][n]) for n in states[0])
    outs = []
    for m in (first, again):
        torch.manual_seed(5)
        outs.append(m(q, k, v, mask))
    assert torch.equal(*outs)


@every
def test_an_example_does_not_depend_on_its_batch(name):
    q, k, v = qkv()
    mask = masks()["random"]
    together = run(name, q, k, v, mask)
    alone = torch.cat([run(name, *(x[i : i + 1] for x in (q, k, v, mask))) for i in range(4)])
    gap = ((alone - together) * mask[:, None, :, None]).abs().max()
    mixes = base_name(name) == "nystrom" and name not in ("nystrom/per_matrix", "nystrom/exact")
    assert mixer(name).mixes_examples == mixes, "its own word for it"
    if mixes:
        assert gap > 1e-6, "the original initialisation takes a maximum over the batch"
    else:
        assert gap < 1e-5


@pytest.mark.parametrize("name", ["none", "softmax", "linear", "performer", "performer/relu"])
def test_order_of_positions_does_not_matter(name):
    q, k, v = qkv()
    mask = masks()["random"]
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(3))
    moved = run(name, q[:, :, order], k[:, :, order], v[:, :, order], mask[:, order])
    real = mask[:, None, :, None]
    expected = (run(name, q, k, v, mask) * real)[:, :, order]
    torch.testing.assert_close(moved * real[:, :, order], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linformer", "nystrom", "butterfly", "reformer"])
def test_order_of_positions_matters_elsewhere(name):
    q, k, v = qkv()
    mask = masks()["full"]
    order = torch.arange(LENGTH).roll(3)
    moved = run(name, q[:, :, order], k[:, :, order], v[:, :, order], mask)
    assert (moved - run(name, q, k, v, mask)[:, :, order]).abs().max() > 1e-4


@every
def test_check_accepts_what_build_runs(name):
    settings = config(name)
    for layer in range(3):
        settings.check(context(layer))
        assert settings.build(context(layer)).grouping(LENGTH).size <= LENGTH
