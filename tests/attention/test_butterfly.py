"""Softmax against its formula; butterfly's strides and groups, with any attention inside."""

import pytest
import torch

from dmx.attention import AttentionConfig
from dmx.attention.butterfly import butterfly_stride
from tests.attention.cases import CASES, HEAD_DIM, LENGTH, NAMES, context, masks, mixer, qkv
from tests.attention.formulas import softmax_attention


@pytest.mark.parametrize("kind", ["full", "random", "tails"])
def test_softmax_is_softmax(kind):
    q, k, v = qkv()
    mask = masks()[kind]
    real = mask[:, None, :, None]
    expected = softmax_attention(q, k, v, mask, HEAD_DIM**0.5)
    out = mixer("softmax")(q, k, v, mask)
    torch.testing.assert_close(out * real, expected * real, rtol=1e-4, atol=1e-5)


def test_softmax_drops_weights_in_training_only():
    q, k, v = qkv()
    mask = masks()["full"]
    mix = AttentionConfig.parse({"name": "softmax", "dropout": 0.5}, "a").build(context())
    exact = mix.eval()(q, k, v, mask)
    assert torch.equal(mix(q, k, v, mask), exact)
    mix.train()
    draws = torch.stack([mix(q, k, v, mask) for _ in range(400)])
    assert (draws[0] - exact).abs().max() > 0.1
    assert (draws.mean(0) - exact).abs().max() < 0.35, "weights that stay are scaled up"


@pytest.mark.parametrize(
    ("length", "block", "strides"),
    [
        (16384, 128, [1, 128, 1, 128]),
        (1024, 128, [1, 8, 1, 8]),  # 128 * 128 > 1024: cut to 1024 / 128
        (4096, 256, [1, 16, 1]),
        (2048, 64, [1, 32, 1]),
        (256, 16, [1, 16, 1]),
        (256, 32, [1, 8, 1]),  # 32 * 32 > 256: cut to 256 / 32
        (256, 64, [1, 4, 1]),
        (4096, 8, [1, 8, 64, 512, 1]),
        (125, 5, [1, 5, 25, 1]),  # log(125) / log(5) > 3 in floating point
        (243, 3, [1, 3, 9, 27, 81, 1]),
        (1000, 10, [1, 10, 100, 1]),
        (64, 64, [1, 1]),
    ],
)
def test_strides(length, block, strides):
    assert [butterfly_stride(length, block, i) for i in range(len(strides))] == strides


@pytest.mark.parametrize(("length", "block", "layers"), [(125, 5, 3), (1024, 32, 2), (64, 4, 3)])
def test_all_layers_together_connect_everything(length, block, layers):
    """After one round each position has heard of each: the reason for the strides."""
    reach = torch.eye(length)
    for layer in range(layers):
        reach = group_matrix(length, block, butterfly_stride(length, block, layer)) @ reach
    assert (reach > 0).all()


def group_matrix(length, block, stride):
    """1 where two positions share a group {base + j * stride, j < block}."""
    group = [
        (p // (block * stride), p % stride)  # which span of groups, and where in it
        for p in range(length)
    ]
    return torch.tensor([[float(a == b) for b in group] for a in group])


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", ["full", "random"])
def test_groups_are_softmax_within(layer, kind):
    """A mask over pairs of positions does the same as regrouping."""
    q, k, v = qkv()
    mask = masks()[kind]
    stride = butterfly_stride(LENGTH, 4, layer)
    pairs = group_matrix(LENGTH, 4, stride) * mask[:, None, :]
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / HEAD_DIM**0.5
    weights = scores.exp() * pairs[:, None]
    expected = (weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)) @ v
    out = AttentionConfig.parse("butterfly-4", "a").build(context(layer))(q, k, v, mask)
    real = mask[:, None, :, None]
    torch.testing.assert_close(out * real, expected * real, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("butterfly(")])
@pytest.mark.parametrize("layer", [0, 1])
def test_inner_attention_sees_its_group_alone(name, layer):
    """Group by group through the inner mixer; nystrom's batch-wide maximum is left out."""
    settings = dict(CASES[name])
    if settings["inner"]["name"] == "nystrom":
        settings["inner"] = {**settings["inner"], "inverse_init": "per_matrix"}
    torch.manual_seed(0)
    mix = AttentionConfig.parse(settings, "a").build(context(layer)).eval()
    q, k, v = qkv(batch=2)
    mask = masks()["random"][:2]
    torch.manual_seed(1)
    out = mix(q, k, v, mask)
    stride = butterfly_stride(LENGTH, 16, layer)
    for base in (0, 1, 16):
        start = base // (16 * stride) * 16 * stride + base % stride
        group = torch.arange(start, start + 16 * stride, stride)
        torch.manual_seed(1)
        inner = mix.inner(*(x[:, :, group] for x in (q, k, v)), mask[:, group])
        real = mask[:, group][:, None, :, None]
        torch.testing.assert_close(out[:, :, group] * real, inner * real, rtol=1e-4, atol=1e-6)


def test_dropout_reaches_the_inner_attention():
    settings = AttentionConfig.parse({"name": "butterfly", "dropout": 0.25}, "a")
    assert settings.inner.dropout == 0.25
    assert settings.build(context()).inner.dropout == 0.25
