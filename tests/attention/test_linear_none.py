"""Linear attention against its double loop; no attention at all."""

import torch

from dmx.attention.linear import LinearConfig, NoneConfig
from tests.attention.cases import HEADS, LENGTH, context, masks, qkv


def phi(x):
    return torch.where(x > 0, x + 1, x.exp())


def test_linear_sums_over_real_tokens():
    q, k, v = qkv(batch=4)
    mask = masks()["random"]
    out = LinearConfig().build(context())(q, k, v, mask)
    for b, h, i in ((0, 0, 0), (1, 1, 17), (3, HEADS - 1, LENGTH - 1)):
        expected = torch.zeros(q.shape[-1])
        for j in range(LENGTH):
            if mask[b, j]:
                expected += (phi(q[b, h, i]) @ phi(k[b, h, j])) * v[b, h, j]
        torch.testing.assert_close(out[b, h, i], expected / LENGTH**0.5, rtol=1e-4, atol=1e-5)


def test_none_returns_the_values():
    q, k, v = qkv()
    out = NoneConfig().build(context())(q, k, v, masks()["random"])
    assert torch.equal(out, v)
