"""Linformer: exact with the identity as projection; one projection per model."""

import copy

import torch

from dmx.attention import AttentionConfig
from dmx.attention.linformer import LinformerConfig
from dmx.model import Classifier, ModelConfig
from tests.attention.cases import HEAD_DIM, HEADS, LENGTH, context, masks, qkv
from tests.attention.formulas import softmax_attention


def test_the_identity_as_projection_is_softmax():
    q, k, v = qkv()
    mix = LinformerConfig(projection_dim=LENGTH).build(context())
    mix.E.data = torch.eye(LENGTH).expand(HEADS, LENGTH, LENGTH)
    mask = masks()["full"]
    expected = softmax_attention(q, k, v, mask, HEAD_DIM**0.5)
    torch.testing.assert_close(mix(q, k, v, mask), expected, rtol=1e-4, atol=1e-5)


def test_masked_tokens_are_zeros_and_projected_keys_are_not_masked():
    """With the identity, a masked token is a key of score 0 and value 0."""
    q, k, v = qkv()
    mask = masks()["random"]
    mix = LinformerConfig(projection_dim=LENGTH).build(context())
    mix.E.data = torch.eye(LENGTH).expand(HEADS, LENGTH, LENGTH)
    real = mask[:, None, :, None]
    everyone = torch.ones_like(mask)
    expected = softmax_attention(q, k * real, v * real, everyone, HEAD_DIM**0.5)
    torch.testing.assert_close(mix(q, k, v, mask), expected, rtol=1e-4, atol=1e-5)


def model():
    config = ModelConfig(vocab_size=9, max_length=LENGTH, num_classes=2, num_layers=3)
    attention = AttentionConfig.parse("linformer-16", "attention")
    return Classifier(config, attention, paired=False)


def projections(m):
    return [block.attention.mixer.E for block in m.encoder.blocks()]


def test_layers_of_a_model_share_one_projection_and_models_do_not():
    one, other = model(), model()
    first, *rest = projections(one)
    assert first.shape == (2, 16, LENGTH)
    assert all(e is first for e in rest)
    assert all(e is not first for e in projections(other))
    assert sum(p is first for p in one.parameters()) == 1
    assert len([n for n in one.state_dict() if n.endswith("attention.mixer.E")]) == 3


def test_sharing_survives_copying_moving_and_loading():
    one = model()
    clone = copy.deepcopy(one).double()
    clone.load_state_dict(model().state_dict())
    first, *rest = projections(clone)
    assert all(e is first for e in rest) and first is not projections(one)[0]
    assert first.dtype == torch.float64


def test_all_layers_train_it():
    """Its gradient is the sum over layers: more than the last layer's alone."""
    one = model()
    ids = torch.randint(1, 9, (2, LENGTH))
    one(ids).sum().backward()
    (shared,) = {id(e): e for e in projections(one)}.values()
    assert shared.grad is not None and shared.grad.abs().max() > 0
