"""On a GPU: the reference's outputs, packed equals dense, mixed precision stays close."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from dmx.nn.optim import OptimConfig, build_optimizer
from dmx.training.reference import load_model
from dmx.training.transfer import transfer
from tests.attention.cases import CASES, LENGTH, masks
from tests.attention.cases import NAMES as ATTENTIONS
from tests.attention.test_packed_equals_dense import ids_of, models
from tests.golden_files import NAMES, golden

BOUND = 1e-5
"""Of the golden files, on every device."""
GRADIENT_BOUND = 3e-5
"""Of the largest entry: sums over tokens in another order. TF32 would be ten times above it."""

paths = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


@paths
@pytest.mark.parametrize("name", NAMES)
def test_golden_outputs(device, name, packed):
    data = golden(name)
    model = load_model(data["config"], data["state"], packed=packed).to(device)
    keys = ("input_ids_0", "input_ids_1") if model.paired else ("input_ids",)
    with torch.no_grad():
        logits = model(*(data[key].to(device) for key in keys)).cpu()
    assert (logits - data["logits"]).abs().max() <= BOUND


@paths
def test_the_trajectory_of_the_reference(device, packed):
    """Its losses over twelve optimizer steps; the bound is the golden file's own."""
    content = golden("trajectory-butterfly")
    model = load_model(content["config"], content["state"], packed=packed).to(device).train()
    config = OptimConfig(learning_rate=1e-3, weight_decay=0.01, warmup_steps=4, anneal="cos")
    optimizer, schedule = build_optimizer(model.parameters(), config, 12)
    for ids, labels, expected in zip(
        content["input_ids"], content["labels"], content["losses"], strict=True
    ):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids.to(device)), labels.long().to(device))
        assert loss.item() == pytest.approx(float(expected), abs=1e-4)
        loss.backward()
        optimizer.step()
        schedule.step()


def test_transfer_to_a_larger_image(device):
    data = golden("transfer-16to32")
    source = load_model(data["config_source"], data["state"])
    random = {
        name: torch.randn((1024, 64) if "position_embeddings" in name else value.shape)
        for name, value in data["state"].items()
    }
    target = load_model(data["config_target"], random).to(device)
    weights = {name: value.to(device) for name, value in source.state_dict().items()}
    transfer(target, weights)
    with torch.no_grad():
        logits = target(data["input_ids"].to(device)).cpu()
    assert (logits - data["logits"]).abs().max() <= BOUND


def outcome(model, ids, device):
    """Logits and gradients of a weighted sum, on the CPU."""
    model.zero_grad()
    torch.manual_seed(1)  # reformer draws its hashes where it runs
    logits = model(ids.to(device)).cpu()
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    zero = torch.zeros(1)
    grads = {n: zero if p.grad is None else p.grad.cpu() for n, p in model.named_parameters()}
    return logits.detach(), grads


@pytest.mark.parametrize("kind", ["full", "holes", "tails", "single"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_packed_and_dense_equal_the_dense_formula_on_a_cpu(device, name, kind):
    """Forward and backward. Reformer's hashes are the GPU's own: its two paths are compared."""
    ids = ids_of(masks()[kind])
    pair = models(CASES[name], LENGTH)
    on_device = [copy.deepcopy(model).to(device) for model in pair]
    draws = "reformer" in name and "one_chunk" not in name
    expected = outcome(on_device[0], ids, device) if draws else outcome(pair[0], ids, "cpu")
    for model in on_device:
        logits, grads = outcome(model, ids, device)
        assert (logits - expected[0]).abs().max() <= BOUND
        for key, theirs in expected[1].items():
            limit = GRADIENT_BOUND * max(1.0, theirs.abs().max().item())
            assert (grads[key] - theirs).abs().max() <= limit, key


@pytest.mark.parametrize("name", ATTENTIONS)
def test_bf16_is_close_to_fp32_and_finite(device, name):
    """Relative error of the logits within bf16's 8 bits through three layers; gradients agree."""
    ids = ids_of(masks()["tails"])
    for model in models(CASES[name], LENGTH):
        model.to(device)
        exact, gradients = outcome(model, ids, device)
        with torch.autocast(device, dtype=torch.bfloat16):
            rounded, found = outcome(model, ids, device)
        assert rounded.isfinite().all() and all(g.isfinite().all() for g in found.values())
        if "reformer" in name:
            continue  # its hashes turn with rounding, and so who meets whom
        assert (rounded.float() - exact).norm() <= 0.03 * exact.norm()
        one, other = (
            torch.cat([g[key].flatten().float() for key in gradients]) for g in (gradients, found)
        )
        # Nystrom's pseudo-inverse multiplies the rounding of q and k through six iterations.
        wanted = 0.97 if "nystrom" in name else 0.99
        assert F.cosine_similarity(one, other, dim=0) > wanted


def test_more_groups_than_a_grid_has(gpu):
    """66,000 groups of 4, with and without dropout: torch alone would fail or refuse."""
    from dmx.attention.base import fused_attention

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 66_000, 1, 4, 8, device=gpu)
    keep = torch.ones(66_000, 1, 1, 4, dtype=torch.bool, device=gpu)
    keep[::3, ..., 3] = False
    q.requires_grad_()
    out = fused_attention(q, k, v, keep)
    scores = (q.detach() @ k.transpose(-1, -2) / 8**0.5).masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=0, atol=1e-5)
    fused_attention(q, k, v, keep, 0.1).sum().backward()
    assert q.grad.isfinite().all()
