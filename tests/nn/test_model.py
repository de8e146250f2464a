"""The whole model: packed against dense, repeatable training, initial weights, the reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dmx.attention import AttentionConfig
from dmx.errors import DataError
from dmx.model import Classifier, ModelConfig


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def model(execution="auto", attention="butterfly", **settings):
    torch.manual_seed(11)
    sizes = dict(num_layers=3, num_heads=2, head_dim=4, embedding_dim=8, hidden_dim=16)
    sizes |= dict(vocab_size=40, max_length=64, num_classes=3)
    config = ModelConfig(**sizes, execution=execution, **settings)
    mapping = {"name": attention, "dropout": 0.2}
    if attention == "butterfly":
        mapping["block_size"] = 8
    parsed = AttentionConfig.parse(mapping, "attention")
    return Classifier(config, parsed, paired=False)


def masked_ids(kind):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 39, (6, 64), generator=generator)
    if kind == "sparse":
        ids *= torch.rand(6, 64, generator=generator) < 0.25
        ids[2] = 0
        ids[4, 1:] = 0
    return ids * 0 if kind == "nothing" else ids


@pytest.mark.parametrize("attention", ["butterfly", "softmax"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("mask", ["nonzero", "none"])
@pytest.mark.parametrize("kind", ["sparse", "nothing", "full"])
def test_packed_equals_dense(threads, attention, pooling, mask, kind):
    ids, results = masked_ids(kind), []
    for execution in ("dense", "packed"):
        net = model(execution, attention, pooling=pooling, mask=mask).eval()
        logits = net(ids)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        results.append((logits.detach(), {n: p.grad for n, p in net.named_parameters()}))
    (dense, theirs), (packed, ours) = results
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-5)
    for name, expected in theirs.items():
        expected = torch.zeros(()) if expected is None else expected
        got = torch.zeros(()) if ours[name] is None else ours[name]
        limit = 1e-5 * max(1.0, expected.abs().max().item())
        assert (got - expected).abs().max() <= limit, name


def test_training_repeats_bit_for_bit(threads):
    ids, runs = masked_ids("sparse"), []
    for _ in range(2):
        net = model(embedding_dropout=0.1, mlp_dropout=0.1, dropout=0.1)
        optimizer = torch.optim.AdamW(net.parameters())
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            net(ids).square().sum().backward()
            optimizer.step()
        runs.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_dropout_is_on_in_training_only_and_averages_out():
    """Over many draws the mean of a single dropped layer is the undropped result."""
    net = model(embedding_dropout=0.2)
    ids = masked_ids("sparse")
    embed = net.encoder.embeddings
    tokens, position = ids[ids != 0], torch.nonzero(ids)[:, 1]
    expected = embed.eval()(tokens, position)
    assert torch.equal(expected, embed.eval()(tokens, position))
    embed.train()
    draws = torch.stack([embed(tokens, position).detach() for _ in range(3000)])
    bound = 5 * (expected.abs() * (0.2 / 0.8 / 3000) ** 0.5) + 1e-7
    assert ((draws.mean(0) - expected).abs() <= bound).float().mean() > 0.9999


def test_an_autocast_forward_is_close():
    net, ids = model().eval(), masked_ids("sparse")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = net(ids).float()
    torch.testing.assert_close(rough, net(ids), rtol=0, atol=0.05)


def test_the_initial_weights_are_the_reference_order():
    """`seed_model`: the parameters are drawn in the order in which the reference draws them."""
    state = model().state_dict()
    torch.manual_seed(11)
    token = nn.Embedding(40, 8)
    nn.init.normal_(token.weight, std=0.02)
    position = nn.Embedding(64, 8)
    nn.init.normal_(position.weight, std=0.02)
    query, key, value, output = (nn.Linear(8, 8) for _ in range(4))
    assert torch.equal(state["encoder.embeddings.token.weight"], token.weight)
    assert torch.equal(state["encoder.embeddings.position.weight"], position.weight)
    for name, layer in (("query", query), ("key", key), ("value", value), ("output", output)):
        assert torch.equal(state[f"encoder.layers.0.attention.{name}.weight"], layer.weight)
    assert torch.equal(state["encoder.layers.0.mlp.0.weight"], nn.Linear(8, 16).weight)


@pytest.mark.parametrize("execution", ["dense", "packed"])
def test_more_positions_than_the_model_has_are_refused(execution):
    """Before any table is looked up, where a GPU would only say `device-side assert`."""
    made = model(execution)
    assert made(torch.ones(2, 64, dtype=torch.long)).shape == (2, 3)
    with pytest.raises(DataError, match="have 128 positions, but the model reads 64"):
        made(torch.ones(2, 128, dtype=torch.long))
