"""Packed execution is exact: logits and gradients of a whole model, against its dense path."""

import numpy as np
import pytest
import torch

from dmx.attention import AttentionConfig
from dmx.errors import ConfigError
from dmx.model import Classifier, ModelConfig
from tests.attention.cases import CASES, LENGTH, NAMES, PACKING, SHIPPED, masks, mixer, qkv
from tests.golden_files import FOLDERS

every = pytest.mark.parametrize("name", PACKING)


def models(
    attention, length, *, pooling="mean", layers=3, paired=False, executions=("dense", "packed")
):
    """The same model, dense and packed."""
    settings = AttentionConfig.parse(attention, "attention")
    pair = []
    for execution in executions:
        torch.manual_seed(0)
        config = ModelConfig(
            num_layers=layers,
            num_heads=2,
            head_dim=8,
            embedding_dim=16,
            hidden_dim=32,
            pooling=pooling,
            execution=execution,
            vocab_size=260,
            max_length=length,
            num_classes=3,
        )
        pair.append(Classifier(config, settings, paired=paired))
    for model in pair:  # larger than at the start of training, so that attention is not uniform
        for block in model.encoder.blocks():
            block.attention.query.weight.data *= 3
            block.attention.key.weight.data *= 3
    for model in pair[1:]:
        model.load_state_dict(pair[0].state_dict())
    return pair


def assert_same(pair, *inputs):
    results = []
    for model in pair:
        torch.manual_seed(1)
        logits = model(*inputs)
        weight = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        (logits * weight).sum().backward()
        results.append((logits.detach(), dict(model.named_parameters())))
    (dense, theirs), (packed, ours) = results
    assert dense.isfinite().all()
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-5)
    for name, parameter in theirs.items():
        expected, got = parameter.grad, ours[name].grad
        zero = torch.zeros_like(parameter)
        expected, got = (zero if g is None else g for g in (expected, got))
        assert expected.isfinite().all(), name
        limit = 1e-5 * max(1.0, expected.abs().max().item())
        assert (got - expected).abs().max() <= limit, name


def ids_of(mask, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, mask.shape, generator=generator) * mask


@every
@pytest.mark.parametrize("kind", list(masks()))
def test_on_random_masks(name, kind):
    assert_same(models(CASES[name], LENGTH), ids_of(masks()[kind]))


@every
def test_with_a_cls_token(name):
    assert_same(models(CASES[name], LENGTH, pooling="cls"), ids_of(masks()["holes"]))


@every
def test_on_padded_text(name):
    """Bytes with padded tails, lengths spread as IMDB's are."""
    length = 256
    generator = torch.Generator().manual_seed(4)
    lengths = (torch.randn(6, generator=generator).mul(0.6).exp() * 90).long().clamp(10, length)
    mask = torch.arange(length) < lengths[:, None]
    assert_same(models(stretched(name), length, layers=2), ids_of(mask))


@every
def test_on_pairs_of_texts(name):
    one, other = masks(1)["tails"], masks(2)["random"]
    pair = models(CASES[name], LENGTH, layers=2, paired=True)
    assert_same(pair, ids_of(one, 1), ids_of(other, 2))


@pytest.mark.parametrize("name", [n for n in PACKING if "/" not in n])
def test_on_pathfinder_images(name):
    for folder in FOLDERS:
        path = folder.parent / "pathfinder_images.npz"
        if path.is_file():
            break
    else:
        pytest.skip("pathfinder_images.npz is neither in tests/golden nor in ../shared/golden")
    with np.load(path, allow_pickle=False) as images:
        keys = [k for k in sorted(images.files) if k.startswith("pf32")]
        ids = torch.from_numpy(np.stack([images[k].reshape(-1) for k in keys])).long()
    assert ids.shape[1] == 1024 and (ids == 0).float().mean() > 0.5
    assert_same(models(stretched(name), 1024, layers=2), ids[2:4])


def stretched(name):
    """A case for longer sequences; only exact nystrom is tied to a length."""
    if name == "nystrom/exact":
        pytest.skip("as many landmarks as positions is softmax, which is tested")
    return CASES[name]


@every
def test_a_batch_of_nothing(name):
    dense, packed = models(CASES[name], LENGTH)
    empty = torch.zeros(2, LENGTH, dtype=torch.long)
    torch.manual_seed(1)
    expected = dense(empty)
    # Two equal rows, but a processor's BLAS may add them up in different orders (seen on a Xeon).
    torch.testing.assert_close(expected[0], expected[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(packed(empty), expected, rtol=0, atol=1e-6)


@every
def test_a_single_group_without_the_batch(name):
    """One bucket by itself, whatever the mixer implements."""
    if name.startswith("butterfly"):
        pytest.skip("butterfly hands its buckets to the inner mixer")
    q, k, v = qkv(batch=1)
    mask = masks()["random"][1:2]
    slot = mask.nonzero(as_tuple=True)[1][None]
    mix = mixer(name)
    torch.manual_seed(2)
    dense = mix(q, k, v, mask)[:, :, slot[0]]
    torch.manual_seed(2)
    (packed,) = mix.mix_buckets([(*(x[:, :, slot[0]] for x in (q, k, v)), slot)], LENGTH)
    torch.testing.assert_close(packed, dense, rtol=1e-5, atol=1e-6)


def test_every_attention_of_dmx_packs_on_a_cpu_without_being_told():
    ours = [n for n in NAMES if n.removeprefix("butterfly(").rstrip(")").split("/")[0] in SHIPPED]
    assert len(ours) >= 2 * len(SHIPPED) - 1
    for name in ours:
        assert name in PACKING
        assert models(CASES[name], LENGTH, executions=["auto"])[0].encoder.packs


def test_an_attention_that_does_not_pack_is_dense_and_says_so():
    """None of dmx's; docs/extending.md's window is one."""
    for name in set(NAMES) - set(PACKING):
        assert not models(CASES[name], LENGTH, executions=["auto"])[0].encoder.packs
        with pytest.raises(ConfigError, match="needs every position; use auto or dense"):
            models(CASES[name], LENGTH)


def test_an_attention_that_cannot_pack_runs_dense():
    class NeedsAll(type(AttentionConfig.parse("softmax", "attention"))):
        def build(self, context):
            mix = super().build(context)
            mix.packs = False
            return mix

    config = ModelConfig(vocab_size=9, max_length=8, num_classes=2, execution="auto")
    assert not Classifier(config, NeedsAll(), paired=False).encoder.packs
    config = ModelConfig(vocab_size=9, max_length=8, num_classes=2, execution="packed")
    with pytest.raises(ConfigError, match="needs every position"):
        Classifier(config, NeedsAll(), paired=False)


def test_the_comparison_can_fail():
    """A packed path that forgets masked tokens where they count is noticed."""
    dense, packed = models({"name": "performer", "num_features": 24}, LENGTH)
    for block in packed.encoder.blocks():
        mix = block.attention.mixer
        real = mix.mix_real
        mix.mix_real = lambda q, k, v, full, real=real: real(q, k, v, q.shape[2])
    with pytest.raises(AssertionError):
        assert_same((dense, packed), ids_of(masks()["random"]))
