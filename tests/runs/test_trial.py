"""What a study optimises is measured as it is described, and its front is Optuna's."""

from __future__ import annotations

import math
import random

import optuna
import pytest

from dmx.errors import ConfigError
from dmx.runs.trial import OBJECTIVES, Trial, directions, pareto_front, parse_objectives
from tests.tiny import one_sentence


def test_objectives_are_measured_as_they_are_described():
    reports = [
        {"best_dev_accuracy": 0.5, "samples_per_second": 100.0, "peak_memory_mb": 7.0},
        {"best_dev_accuracy": 0.8, "samples_per_second": 50.0, "peak_memory_mb": 9.0},
        {"best_dev_accuracy": 0.8, "samples_per_second": 40.0, "peak_memory_mb": 8.0},
    ]
    trial = Trial(number=0, curve=dict(enumerate({**r, "parameters": 1234} for r in reports)))
    found = {"accuracy": 0.8, "latency": 20.0, "memory": 9.0, "parameters": 1234}
    assert trial.values_of(OBJECTIVES) == found, "latency: the median of 10, 20 and 25 ms"
    for curve in ({}, {1: {"parameters": None}}, {1: {"samples_per_second": 0.0}}):
        values = Trial(number=0, curve=curve).values_of(OBJECTIVES)
        assert all(map(math.isnan, values.values()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("accuracy,speed", "'speed' is unknown; choices: accuracy, latency, memory, parameters"),
        ("accuracy,accuracy", "names one twice"),
        ("latency,memory", "leaves accuracy out"),
        ("", "'' is unknown"),
        ("accuracy,latency,memory,parameters", "names 4"),
    ],
)
def test_bad_objectives(text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_objectives(text)
    one_sentence(caught.value)
    assert parse_objectives("latency, accuracy") == ("accuracy", "latency")


def test_the_front_is_optunas():
    names = ("accuracy", "latency", "memory")
    for seed in range(20):
        draw = random.Random(seed)
        points = {n: tuple(float(draw.randint(0, 4)) for _ in names) for n in range(15)}
        study = optuna.create_study(directions=directions(names))
        for values in points.values():
            study.add_trial(optuna.trial.create_trial(values=list(values)))
        assert pareto_front(names, points) == tuple(sorted(t.number for t in study.best_trials))
    assert pareto_front(names, {0: (math.nan, 1.0, 1.0), 1: (0.1, 2.0, 2.0)}) == (1,)
    assert pareto_front(names, {}) == ()
