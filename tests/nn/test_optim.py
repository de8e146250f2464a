"""AdamW with one cycle: the reference's losses, and the schedule's facts from its definition."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmx.errors import ConfigError
from dmx.nn.optim import OptimConfig, build_optimizer
from dmx.training.reference import load_model
from tests.golden_files import golden
from tests.tiny import one_sentence


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_trajectory_of_the_reference(packed):
    """12 optimizer steps: losses within 1e-4, and so the betas, eps and decay that nobody named."""
    data = golden("trajectory-butterfly")
    said = data["optimizer"]
    assert said["lr"] == 1e-3 and said["eps"] == 1e-6 and "pct_start=4/12" in said["schedule"]
    model = load_model(data["config"], data["state"], packed=packed).train()
    config = OptimConfig(
        learning_rate=1e-3, weight_decay=said["weight_decay"], warmup_steps=4, anneal="cos"
    )
    optimizer, schedule = build_optimizer(model.parameters(), config, num_steps=12)
    losses = []
    for ids, labels in zip(data["input_ids"], data["labels"], strict=True):
        loss = F.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    difference = max(abs(a - b) for a, b in zip(losses, data["losses"].tolist(), strict=True))
    assert difference <= 1e-4, json.dumps(losses)


def follow(config: OptimConfig, steps: int) -> list[tuple[float, float]]:
    """(learning rate, beta1) that each optimizer step uses."""
    optimizer, schedule = build_optimizer([nn.Parameter(torch.zeros(1))], config, steps)
    seen = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        assert group["betas"][1] == config.beta2 and group["eps"] == config.eps
        seen.append((group["lr"], group["betas"][0]))
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("warmup", [2, 7, 12])
def test_one_linear_cycle(warmup):
    """From peak/25 up to the peak in `warmup` steps, then down to peak/250,000; beta1 mirrors."""
    steps, peak = 20, 3e-3
    seen = follow(OptimConfig(learning_rate=peak, warmup_steps=warmup), steps)
    last_up = warmup - 1
    for step, (rate, beta1) in enumerate(seen):
        if step <= last_up:
            part = step / last_up
            expected = peak / 25 + part * (peak - peak / 25)
            expected_beta = 0.95 - part * 0.10
        else:
            part = (step - last_up) / (steps - 1 - last_up)
            expected = peak + part * (peak / 25 / 1e4 - peak)
            expected_beta = 0.85 + part * 0.10
        assert rate == pytest.approx(expected, rel=1e-9, abs=1e-15)
        assert beta1 == pytest.approx(expected_beta, rel=1e-9)
    assert seen[0] == (pytest.approx(peak / 25), pytest.approx(0.95))
    assert max(range(steps), key=lambda s: seen[s][0]) == last_up
    assert min(range(steps), key=lambda s: seen[s][1]) == last_up
    assert seen[-1][1] == pytest.approx(0.95)


def test_a_cosine_cycle_has_the_same_ends_and_another_middle():
    steps, warmup = 21, 11
    seen = follow(OptimConfig(learning_rate=1.0, warmup_steps=warmup, anneal="cos"), steps)
    assert seen[0][0] == pytest.approx(1 / 25) and seen[10][0] == pytest.approx(1.0)
    for step in range(11):
        expected = 1 + (1 / 25 - 1) * (1 + math.cos(math.pi * step / 10)) / 2
        assert seen[step][0] == pytest.approx(expected)


def test_weight_decay_is_decoupled_and_on_every_parameter():
    """One AdamW step by hand (Loshchilov and Hutter 2019), biases and norms included."""
    norm = nn.LayerNorm(3)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    config = OptimConfig(learning_rate=0.1, weight_decay=0.3, warmup_steps=2)
    optimizer, _ = build_optimizer(norm.parameters(), config, num_steps=5)
    before = {name: p.detach().clone() for name, p in norm.named_parameters()}
    gradient = {"weight": torch.tensor([1.0, -2.0, 0.5]), "bias": torch.tensor([0.1, 0.2, -3.0])}
    for name, parameter in norm.named_parameters():
        parameter.grad = gradient[name].clone()
    optimizer.step()
    rate = 0.1 / 25
    for name, parameter in norm.named_parameters():
        g = gradient[name]
        step = g / (g.abs() + 1e-6)  # m / (sqrt(v) + eps) after bias correction, at the first step
        expected = before[name] * (1 - rate * 0.3) - rate * step
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"warmup_steps": 1}, "warmup_steps is 1; it must be at least 2."),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"base_momentum": -0.1}, "base_momentum is -0.1"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"div_factor": math.nan}, "div_factor is nan"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        OptimConfig(**changes)
    assert one_sentence(caught.value).startswith(message)
