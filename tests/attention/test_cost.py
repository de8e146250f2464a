"""Counted floating-point operations: how they grow with the length, and what packing saves."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dmx.attention import AttentionConfig, MixerContext
from dmx.model import Classifier, ModelConfig
from tests.attention.cases import SHIPPED

SIZES = {
    "butterfly": {"block_size": 32},
    "nystrom": {"num_landmarks": 16},
    "linformer": {"projection_dim": 16},
    "performer": {"num_features": 32},
    "reformer": {"num_hashes": 1, "chunk_length": 32},
}
QUADRATIC = {"softmax"}


def settings_of(name):
    return AttentionConfig.parse({"name": name, **SIZES.get(name, {})}, "attention")


def flops(run):
    # The math kernel is made of matrix products, which the counter knows on every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops()


def mixing_flops(name, length):
    mixer = settings_of(name).build(MixerContext(length=length, num_heads=2, head_dim=8))
    q = torch.randn(1, 2, length, 8)
    return flops(lambda: mixer(q, q, q, torch.ones(1, length, dtype=torch.bool)))


@pytest.mark.parametrize("name", SHIPPED)
def test_growth_with_the_length(name):
    small, large = mixing_flops(name, 1024), mixing_flops(name, 2048)
    if name == "none":
        assert small == large == 0
    elif name in QUADRATIC:
        assert large == 4 * small
    else:
        # Reformer doubles its buckets with the length, which shows in the hashing.
        assert 1.7 * small < large <= (2.5 if name == "reformer" else 2.0) * small


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - {"none"} - QUADRATIC))
def test_cheaper_than_softmax_when_long(name):
    assert mixing_flops(name, 4096) < 0.35 * mixing_flops("softmax", 4096)


def test_butterfly_counts_its_blocks():
    """Two products of L x block_size x Dh, per head, at two operations each."""
    assert mixing_flops("butterfly", 1024) == 2 * 2 * 2 * 1024 * 32 * 8


@pytest.mark.parametrize("name", SHIPPED)
def test_packing_saves_in_proportion(name):
    """One token in eight is real: a packed model does about an eighth of the work, or less."""
    ids = torch.zeros(2, 1024, dtype=torch.long)
    ids[:, ::8] = 5
    counts = []
    for execution in ("dense", "packed"):
        config = ModelConfig(vocab_size=9, max_length=1024, num_classes=2, execution=execution)
        model = Classifier(config, settings_of(name), paired=False).eval()
        counts.append(flops(lambda model=model: model(ids)))
    dense, packed = counts
    # Nystrom's pseudo-inverses are the same; its convolution's bands become narrower.
    assert packed < (0.2 if name == "nystrom" else 0.15) * dense
