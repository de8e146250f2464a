"""Nystrom: where it must be exact, its convolution, its initialisations, its landmarks."""

import pytest
import torch

from dmx.attention.nystrom import NystromConfig
from tests.attention.cases import HEAD_DIM, HEADS, LENGTH, context, masks, qkv
from tests.attention.formulas import softmax_attention


def build(**settings):
    torch.manual_seed(0)
    return NystromConfig(**settings).build(context()).eval()


@pytest.mark.parametrize("kind", ["full", "random", "tails"])
def test_as_many_landmarks_as_positions_is_softmax(kind):
    q, k, v = qkv()
    mask = masks()[kind]
    mix = build(num_landmarks=LENGTH, conv_kernel_size=None)
    expected = softmax_attention(q, k, v, mask, HEAD_DIM**0.5)
    real = mask[:, None, :, None]
    torch.testing.assert_close(mix(q, k, v, mask) * real, expected * real, rtol=1e-4, atol=1e-5)


def test_exact_where_segments_are_constant():
    """Equal q and k within each segment: the landmarks lose nothing, and the formula is softmax.

    softmax(q k^T) v = K1 (mean v), and the third factor is K2 (mean v), so K1 K2^-1 K2 (mean v).
    Landmarks are orthogonal, so that K2 is far from singular and 6 steps suffice.
    """
    landmarks = 4 * torch.eye(HEAD_DIM).expand(4, HEADS, 8, HEAD_DIM)
    q = k = landmarks.repeat_interleave(LENGTH // 8, dim=2)
    _, _, v = qkv()
    mask = masks()["full"]
    expected = softmax_attention(q, k, v, mask, HEAD_DIM**0.5)
    for init in ("original", "per_matrix"):
        mix = build(num_landmarks=8, conv_kernel_size=None, inverse_init=init)
        torch.testing.assert_close(mix(q, k, v, mask), expected, rtol=1e-3, atol=1e-4)


def test_landmarks_count_masked_positions_as_zeros():
    """One landmark: K1 and K2 are ones, so every query gets the landmark's own summary of v."""
    q, k, v = qkv()
    mask = masks()["random"]
    mix = build(num_landmarks=1, conv_kernel_size=None)
    out = mix(q, k, v, mask)
    for b in range(4):
        keep = mask[b]
        landmark = q[b][:, keep].sum(1) / LENGTH  # [H, Dh], over the full length
        scores = torch.einsum("hd,hld->hl", landmark, k[b][:, keep]) / HEAD_DIM**0.5
        summary = torch.einsum("hl,hld->hd", scores.softmax(-1), v[b][:, keep])
        expected = summary[:, None].expand(HEADS, LENGTH, HEAD_DIM)
        torch.testing.assert_close(out[b], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("taps", [1, 5, 35, 99])
@pytest.mark.parametrize("length", [8, LENGTH, 300])
def test_convolution_and_its_gradient(taps, length):
    """Against a loop over taps; F.conv2d's own weight gradient is wrong on some CPUs."""
    mix = build(num_landmarks=1, conv_kernel_size=taps)
    _, _, v = qkv(batch=3, length=length)
    weight = mix.conv.weight.detach().clone().requires_grad_()
    expected = torch.zeros_like(v)
    for tap in range(taps):
        shift = tap - taps // 2
        to = slice(max(0, -shift), min(length, length - shift))
        source = slice(max(0, shift), min(length, length + shift))
        if to.start < to.stop:
            part = weight[:, 0, tap].view(1, HEADS, 1, 1) * v[:, :, source]
            expected = expected.index_add(2, torch.arange(length)[to], part)
    probe = torch.randn_like(v)
    (expected * probe).sum().backward()
    out = mix.conv(v)
    (out * probe).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mix.conv.weight.grad, weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("share", [3, 8], ids=["by all", "by bands of its own"])
@pytest.mark.parametrize("length", [LENGTH, 300])
def test_convolution_of_real_tokens_only(length, share):
    mix = build(num_landmarks=1, conv_kernel_size=35)
    _, _, v = qkv(batch=2, length=length)
    slot = torch.stack([torch.randperm(length)[: length // share].sort().values for _ in range(2)])
    place = slot[:, None, :, None].expand(-1, HEADS, -1, HEAD_DIM)
    sparse = torch.zeros_like(v).scatter(2, place, v.gather(2, place))
    expected = mix.conv(sparse).gather(2, place)
    torch.testing.assert_close(mix.conv.at(v.gather(2, place), slot, length), expected)


@pytest.mark.parametrize("init", ["original", "per_matrix"])
def test_fully_masked_rows_do_not_change_others(init):
    """They enter the maximum of the original initialisation with 1, the least there can be."""
    q, k, v = qkv()
    mask = masks()["random"]
    mix = build(num_landmarks=8, inverse_init=init)
    out = mix(q, k, v, mask)
    wider = [torch.cat([x, x]) for x in (q, k, v)]
    padded = mix(*wider, torch.cat([mask, torch.zeros_like(mask)]))
    torch.testing.assert_close(padded[:4], out, rtol=1e-6, atol=1e-7)


def test_inverses_of_a_wide_kernel():
    """The iteration inverts, from both initialisations, what can be inverted."""
    landmarks = 2.5 * torch.eye(HEAD_DIM).expand(2, HEADS, HEAD_DIM, HEAD_DIM)
    kernel = (landmarks @ landmarks.transpose(-1, -2) * HEAD_DIM**-0.5).softmax(-1)
    for init in ("original", "per_matrix"):
        mix = build(num_landmarks=8, inverse_init=init)
        inverse = mix._inverse(landmarks, landmarks)
        torch.testing.assert_close(inverse, torch.linalg.inv(kernel), rtol=1e-2, atol=1e-2)
