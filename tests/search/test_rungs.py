"""Rungs and brackets: their shares, and that they decide as Ray Tune's scheduler does."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from dmx.runs.study import Search
from dmx.search.rungs import Rung, SuccessiveHalving, deal, describe_rungs, num_brackets
from dmx.search.simulate import expected_steps


def settings(grace, max_steps, factor=3.0, scheduler="hyperband"):
    return Search(
        searched={},
        scheduler=scheduler,
        sampler="tpe",
        seed=1,
        num_trials=27,
        max_steps=max_steps,
        grace_steps=grace,
        reduction_factor=factor,
    )


def test_how_many():
    """81 units and eta 3 give s_max = 4 in the paper."""
    assert num_brackets(settings(1, 81)) == 5
    assert num_brackets(settings(40, 320)) == 3
    assert num_brackets(settings(7, 7)) == 1
    assert num_brackets(settings(2, 20)) == 4
    assert num_brackets(settings(1, 81, scheduler="asha")) == 1


def test_shares_are_hyperbands():
    """ceil(5 / (s + 1) * 3^s) for s = 4, 3, 2, 1, 0: 81, 33.75, 15, 7.5 and 5."""
    assert Counter(islice(deal(5, 3), 143)) == {0: 81, 1: 34, 2: 15, 3: 8, 4: 5}
    assert list(islice(deal(1, 3), 5)) == [0] * 5
    assert list(islice(deal(3, 3), 6)) == [0, 1, 0, 2, 0, 1]


def reports_of(seed: int, max_steps: int, grace: int) -> list[tuple[int, int, float]]:
    """(trial, step, accuracy) in an order that four workers could produce; ties are common."""
    draw = random.Random(seed)
    examples = draw.choice([8, 60, 10_000])
    waiting, running, found = list(range(30)), dict[int, int](), []
    while waiting or running:
        while waiting and len(running) < 4:
            running[waiting.pop(0)] = 0
        trial = draw.choice(sorted(running))
        running[trial] += draw.choice([1, grace])
        accuracy = draw.choice([draw.randint(0, examples) / examples] * 30 + [math.nan])
        found.append((trial, running[trial], accuracy))
        if running[trial] >= max_steps:
            del running[trial]
    return found


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("scheduler", ["asha", "hyperband"])
@pytest.mark.parametrize("seed", range(20))
def test_decisions_are_rays(seed, scheduler):
    """Ray's own rules, bit for bit; it deals trials to brackets at random, so each has its own."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

    draw = random.Random(seed)
    grace, factor = draw.choice([1, 2, 5]), draw.choice([1.5, 2.0, 3.0, 4.0])
    max_steps = grace * draw.choice([1, 3, 9, 20, 50])
    where = settings(grace, max_steps, factor, scheduler)
    ours, count = SuccessiveHalving(where), num_brackets(where)
    dealt = list(islice(deal(count, factor), 30))
    theirs = AsyncHyperBandScheduler(
        time_attr="steps",
        metric="accuracy",
        mode="max",
        max_t=max_steps,
        grace_period=grace,
        reduction_factor=factor,
        brackets=count,
    )
    ours = pickle.loads(pickle.dumps(ours))  # as Ray does
    stopped: set[int] = set()
    for trial, step, accuracy in reports_of(seed, max_steps, grace):
        if trial in stopped:
            continue
        goes_on = ours.report(trial, step, accuracy)
        if step >= max_steps:
            assert goes_on, "a trial with a full budget ends by itself"
            continue
        known = SimpleNamespace(trial_id=str(trial))
        theirs._trial_info[known.trial_id] = theirs._brackets[dealt[trial]]
        result = {"steps": step, "accuracy": accuracy}
        expected = theirs.on_trial_result(None, known, result) == TrialScheduler.CONTINUE
        assert goes_on == expected, (trial, step, accuracy)
        stopped.update(() if goes_on else (trial,))
    assert stopped == ours.fill([]).keys()
    assert stopped or max_steps < 9 * grace, "the script is one in which something is stopped"
    last = {t for t in range(30) if dealt[t] == count - 1}
    assert count == 1 or not stopped & last, "the last bracket stops nothing"


def test_the_cutoff_is_numpys_quantile_to_the_last_digit():
    draw = random.Random(0)
    for _ in range(3000):
        factor = draw.choice([1.1, 1.5, 2.0, 3.0, 4.0, 7.3])
        values = [draw.randint(0, 50) / 50 for _ in range(draw.randint(1, 40))]
        rung = Rung(1.0)
        for trial, value in enumerate(values):
            rung.enter(trial, value, factor)
        assert rung.cutoff(factor) == np.nanpercentile(values, (1 - 1 / factor) * 100)
    assert Rung(1.0).cutoff(3.0) is None
    rung = Rung(1.0)
    rung.enter(0, math.nan, 3.0)
    assert rung.cutoff(3.0) is None, "what is not known is no bar"


def test_expected_steps_lie_between_asha_and_none():
    common = {"eval_every_steps": 3, "slots": 2}
    asha_steps = expected_steps(settings(3, 81, scheduler="asha"), **common).expected
    hyperband = expected_steps(settings(3, 81), **common).expected
    assert asha_steps < hyperband < 27 * 81


@pytest.mark.parametrize(
    ("scheduler", "grace", "steps", "factor", "said"),
    [
        ("asha", 10, 90, 3.0, "asha, rungs at 10, 30 steps, the best 1/3 go on"),
        ("asha", 90, 90, 3.0, "asha, no rung before the end, the best 1/3 go on"),
        ("hyperband", 1, 81, 3.0, "hyperband, 5 brackets with rungs from 1 steps, factor 3"),
        ("pbt", 10, 90, 3.0, "pbt, a comparison every 10 steps"),
        ("none", 10, 90, 3.0, "none, every trial runs its full budget"),
    ],
)
def test_rungs_in_words(scheduler, grace, steps, factor, said):
    assert describe_rungs(settings(grace, steps, factor, scheduler)) == said
