"""Reformer: against exact attention, against the library the reference uses, and its hashing."""

import pytest
import torch

from dmx.attention.reformer import ReformerConfig, bucket_factors
from tests.attention.cases import HEAD_DIM, HEADS, LENGTH, context, masks, qkv
from tests.attention.formulas import shared_qk_attention


def build(**settings):
    return ReformerConfig(**settings).build(context()).eval()


@pytest.mark.parametrize("kind", ["full", "random", "tails"])
@pytest.mark.parametrize("chunk", [LENGTH, LENGTH // 2])
def test_exact_when_every_query_sees_every_key(kind, chunk):
    """One chunk, or two of which each also sees the other: the hash makes no difference."""
    q, k, v = qkv()
    mask = masks()[kind]
    out = build(num_hashes=1, chunk_length=chunk)(q, k, v, mask).double()
    expected = shared_qk_attention(q, v, mask)
    enough = (mask.sum(1) > 1)[:, None, None, None] & mask[:, None, :, None]
    torch.testing.assert_close(
        out.where(enough, 0), expected.where(enough, 0), rtol=1e-4, atol=1e-5
    )


def test_a_token_alone_attends_to_itself():
    q, k, v = qkv()
    mask = masks()["single"]
    for chunk in (LENGTH, LENGTH // 4):
        out = build(chunk_length=chunk)(q, k, v, mask)
        real = mask[:, None, :, None]
        torch.testing.assert_close(out * real, v * real)


def test_more_rounds_come_closer_to_exact_attention():
    """Clustered tokens: what a query misses in one round, it finds in another."""
    torch.manual_seed(0)
    centres = torch.randn(8, HEAD_DIM) * 2
    q = centres[torch.randint(8, (2, HEADS, 256))] + 0.3 * torch.randn(2, HEADS, 256, HEAD_DIM)
    v = torch.randn(2, HEADS, 256, HEAD_DIM)
    mask = torch.ones(2, 256, dtype=torch.bool)
    exact = shared_qk_attention(q, v, mask)
    errors = [
        (build(num_hashes=rounds, chunk_length=16)(q, q, v, mask) - exact).square().mean().sqrt()
        for rounds in (1, 4, 16)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_rounds_are_weighted_by_their_normalisers(monkeypatch):
    """So that all rounds together are one softmax over every key that any of them shows.

    The orders are given here, in place of hashes. The chunk before a round's first one is the
    last of the round before, and a key shown twice counts twice, as in the library.
    """
    length, chunk, rounds = 12, 3, 2
    q, k, v = (x.double() for x in qkv(batch=1, length=length))
    order = torch.stack([torch.randperm(length) for _ in range(2 * rounds)]).view(1, 2, rounds, -1)
    mix = build(num_hashes=rounds, chunk_length=chunk)
    monkeypatch.setattr(mix, "_sorted", lambda *_: order)
    out = mix(q, k, v, torch.ones(1, length, dtype=torch.bool))
    for head in range(2):
        chunks = order[0, head].flatten().split(chunk)
        keys = q[0, head] / (q[0, head].square().mean(-1, keepdim=True) + 1e-6).sqrt()
        for token in range(length):
            shown = [
                other
                for i, members in enumerate(chunks)
                if token in members
                for other in torch.cat([chunks[i - 1], members])
                if other != token
            ]
            shown = torch.stack(shown)
            scores = keys[shown] @ q[0, head, token] / HEAD_DIM**0.5
            expected = scores.softmax(0) @ v[0, head][shown]
            torch.testing.assert_close(out[0, head, token], expected)


def test_tokens_far_apart_in_angle_do_not_meet():
    """Two opposite clusters of two chunks each: no weight crosses over but at chunk borders."""
    side = torch.ones(HEAD_DIM)
    q = torch.cat([side.expand(128, -1), -side.expand(128, -1)])
    q = q[torch.randperm(256)].expand(1, HEADS, 256, HEAD_DIM) + 0.01 * torch.randn(256, HEAD_DIM)
    sign = (q[..., :1] > 0).float() * 2 - 1
    out = build(num_hashes=1, chunk_length=16)(
        q, q, sign.expand_as(q), torch.ones(1, 256, dtype=torch.bool)
    )
    assert (out * sign).mean() > 0.9


def test_hashes_are_drawn_anew_and_follow_the_seed():
    q, k, v = qkv()
    mask = masks()["full"]
    mix = build(num_hashes=1, chunk_length=8)
    torch.manual_seed(3)
    one, two = mix(q, k, v, mask), mix(q, k, v, mask)
    torch.manual_seed(3)
    assert torch.equal(mix(q, k, v, mask), one)
    assert not torch.equal(one, two)


def test_queries_are_the_keys():
    q, k, v = (x.requires_grad_() for x in qkv())
    mix = build(chunk_length=8)
    assert mix.projection_bias is False
    mix(q, k, v, masks()["full"]).sum().backward()
    assert k.grad is None and q.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("length", "chunk", "factors"),
    [(128, 64, (4,)), (1024, 64, (32,)), (4096, 64, (128,)), (16384, 64, (16, 32))],
)
def test_number_of_buckets(length, chunk, factors):
    """Two per chunk, a power of two, in two factors above 128 (chunk_length 64)."""
    assert bucket_factors(length, chunk) == factors


@pytest.mark.parametrize("kind", ["full", "random", "tails", "holes"])
@pytest.mark.parametrize(
    ("length", "chunk", "rounds"),
    [(64, 64, 2), (128, 64, 1), (192, 32, 3), (256, 16, 2), (256, 4, 2), (512, 64, 4)],
)
def test_equals_the_library_under_a_shared_seed(kind, length, chunk, rounds):
    """Outputs and gradients of `transformers`' LSHSelfAttention; 256 / 4 has factored buckets."""
    library = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    from transformers import ReformerConfig as LibraryConfig

    torch.manual_seed(0)
    width = 12
    layer = library.LSHSelfAttention(
        LibraryConfig(
            attention_head_size=HEAD_DIM,
            num_attention_heads=HEADS,
            num_hashes=rounds,
            lsh_attn_chunk_length=chunk,
            attn_layers=["lsh"],
            is_decoder=False,
            max_position_embeddings=length,
            hidden_size=width,
        )
    ).eval()
    mask = masks(length=length)[kind]
    x = torch.randn(4, length, width, requires_grad=True)
    # A token alone has the score -1e5, where the library's float32 rounds weights by 0.6 %.
    real = (mask & (mask.sum(1, keepdim=True) > 1))[:, None, :, None]

    def heads(linear):
        return linear(x).unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)

    torch.manual_seed(9)
    expected = layer(x, attention_mask=mask.float()).hidden_states
    expected = expected.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
    torch.manual_seed(9)
    q, v = heads(layer.query_key), heads(layer.value)
    out = build(num_hashes=rounds, chunk_length=chunk)(q, q, v, mask)
    torch.testing.assert_close(out * real, expected * real, rtol=1e-4, atol=1e-5)
    probe = torch.randn_like(out) * real
    (ours,) = torch.autograd.grad((out * probe).sum(), x)
    (theirs,) = torch.autograd.grad((expected * probe).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
