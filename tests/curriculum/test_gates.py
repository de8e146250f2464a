"""Every gate decides from the record alone, and says which numbers decided."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dmx.curriculum.gates.base import GATES, Gate
from dmx.errors import ConfigError
from dmx.runs.curriculum import Attempt


def attempt(*accuracies: float, num_classes: int = 2) -> Attempt:
    """100 steps in 10 seconds, with these dev accuracies on the way."""
    last = {"best_dev_accuracy": max(accuracies, default=math.nan), "train_loss": 0.3}
    steps = [100 - len(accuracies) + 1 + i for i in range(len(accuracies))]
    reports = {s: {"dev_accuracy": a} for s, a in zip(steps, accuracies, strict=True)}
    reports[100].update(last, train_seconds=10.0)
    return Attempt(
        number=0,
        retry=0,
        config={"model": {"num_classes": num_classes}},
        source={},
        spec={},
        data={},
        curve=reports,
    )


def gate(**settings: Any) -> Gate:
    return Gate.parse(settings, "gate")


@pytest.mark.parametrize(
    ("settings", "accuracies", "passes"),
    [
        ({"name": "threshold", "at_least": 0.6}, (0.5, 0.6, 0.55), True),
        ({"name": "threshold", "at_least": 0.601}, (0.5, 0.6, 0.55), False),
        ({"name": "threshold", "metric": "train_loss", "at_most": 0.3}, (0.5,), True),
        ({"name": "threshold", "metric": "train_loss", "at_most": 0.29}, (0.5,), False),
        ({"name": "threshold", "metric": "dev_loss", "at_most": 9}, (0.5,), False),  # not reported
        ({"name": "above_chance", "margin": 0.1}, (0.6,), True),
        ({"name": "above_chance", "margin": 0.11}, (0.6,), False),
        ({"name": "above_chance"}, (math.nan,), False),
        ({"name": "plateau", "evaluations": 2, "min_gain": 0.01}, (0.5, 0.7, 0.7, 0.705), True),
        ({"name": "plateau", "evaluations": 2, "min_gain": 0.01}, (0.5, 0.7, 0.7, 0.72), False),
        ({"name": "plateau", "evaluations": 2, "min_gain": 0.01}, (0.7, 0.7), False),  # too short
        ({"name": "budget", "max_steps": 100}, (0.5,), True),
        ({"name": "budget", "max_steps": 99}, (0.5,), False),
        ({"name": "budget", "max_seconds": 9.9}, (0.5,), False),
        ({"name": "always"}, (0.1,), True),
    ],
)
def test_decisions(settings: dict[str, Any], accuracies: tuple[float, ...], passes: bool) -> None:
    decision = gate(**settings).decide(attempt(*accuracies))
    assert decision.passed is passes
    assert decision.reason.startswith(settings["name"])


def test_chance_is_one_over_the_classes() -> None:
    ten = gate(name="above_chance", margin=0.05)
    assert ten.decide(attempt(0.16, num_classes=10)).passed
    assert not ten.decide(attempt(0.16, num_classes=8)).passed  # 0.125 + 0.05


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, False)])
def test_combinations(first: bool, second: bool) -> None:
    parts = [
        {"name": "threshold", "at_least": 0.5 if first else 0.9},
        {"name": "budget", "max_steps": 1000 if second else 1},
    ]
    seen = attempt(0.6)
    assert gate(name="all", gates=parts).decide(seen).passed is (first and second)
    assert gate(name="any", gates=parts).decide(seen).passed is (first or second)
    refused = gate(name="all", gates=parts).decide(seen).reason
    assert ("budget" in refused) is (not second or first)


def test_every_gate_survives_yaml() -> None:
    examples: dict[str, dict[str, Any]] = {
        "threshold": {"at_least": 0.5},
        "budget": {"max_steps": 5},
        "all": {"gates": ["always"]},
        "any": {"gates": [{"name": "all", "gates": ["always"]}]},
    }
    for name in GATES.names():
        made = gate(name=name, **examples.get(name, {}))
        assert Gate.parse(made.to_plain(), "gate") == made


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("thresh", ("gate: gate 'thresh' is unknown", "threshold")),
        ({"name": "threshold"}, ("gate", "at_least")),
        ({"name": "threshold", "metric": "dev_acuracy", "at_least": 1}, ("dev_acuracy", "dev_acc")),
        ({"name": "plateau", "evaluation": 3}, ("gate.evaluation", "gate.evaluations")),
        ({"name": "above_chance", "margin": 2.0}, ("margin is 2.0",)),
        ({"name": "all", "gates": []}, ("gates is empty",)),
        ({"name": "all", "gates": ["nope"]}, ("gate.gates[0]", "nope")),
        (3, ("gate must be",)),
    ],
)
def test_bad_gates_are_refused(value: object, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        Gate.parse(value, "gate")
    assert all(word in str(error.value) for word in words), str(error.value)
