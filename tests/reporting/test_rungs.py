"""ASHA's rungs, worked out from reports, are those that Ray Tune's scheduler decided by."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from dmx.reporting.collect import collect
from dmx.reporting.rungs import Bracket, Entry, Rung, best_so_far, fill
from dmx.reporting.stopping import rung_plot
from tests.reporting.makers import make_study


@dataclass(frozen=True)
class _Trial:
    trial_id: str


@pytest.mark.parametrize("seed", range(20))
def test_decisions_are_rays(seed: int) -> None:
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.schedulers.async_hyperband import _Bracket

    draw = random.Random(seed)
    grace, factor = draw.choice([1, 2, 5]), draw.choice([2.0, 3.0, 4.0])
    max_steps = grace * draw.choice([1, 3, 9, 20, 100])
    theirs = _Bracket(grace, max_steps, factor, 0)
    ours = Bracket(grace_steps=grace, max_steps=max_steps, reduction_factor=factor)
    alive = dict.fromkeys(range(12), 0)
    while alive:
        number = draw.choice(sorted(alive))
        alive[number] += draw.choice([1, grace])
        step, accuracy = alive[number], draw.choice([draw.random(), 0.5])
        goes_on = ours.report(number, step, accuracy)
        if step >= max_steps:
            assert goes_on
            del alive[number]
            continue
        trial = _Trial(str(number))
        expected = theirs.on_result(trial, step, accuracy) == TrialScheduler.CONTINUE
        assert goes_on == expected, (number, step, accuracy)
        if not goes_on:
            del alive[number]
    recorded = {steps: {int(k): v for k, v in found.items()} for steps, found in theirs._rungs}
    assert recorded == {r.steps: {e.trial: e.accuracy for e in r.entries} for r in ours.rungs}


def test_cutoff_is_the_interpolated_quantile() -> None:
    import numpy as np

    rungs = fill(
        Bracket(grace_steps=1, max_steps=10, reduction_factor=3.0),
        [(n, 1, a) for n, a in enumerate([0.1, 0.9, 0.4, 0.7])],
    )
    expected = np.percentile([0.1, 0.9, 0.4, 0.7], 100 * (1 - 1 / 3))
    assert rungs[0].cutoff(3.0) == pytest.approx(expected)
    assert rungs[1].cutoff(3.0) is None


def test_no_trials_number_covers_another(tmp_path: Path) -> None:
    """Twenty trials of nearly one accuracy: each has its point, and few their numbers."""
    close = [Entry(n, 0.5 + n / 10_000, n % 3 == 0) for n in range(20)]
    apart = [Entry(n, n / 4, True) for n in range(4)]
    run = collect(make_study(tmp_path / "s"))
    drawn = str(rung_plot(run, [Rung(2, close), Rung(6, apart)]))
    number = r'<text x="([\d.]+)" y="([\d.]+)"[^>]*class="label note"[^>]*>#(\d+)<'
    found = [(float(x), float(y), int(n)) for x, y, n in re.findall(number, drawn)]
    assert drawn.count("<title>trial ") == 24
    assert 2 <= len(found) - 4 < 20 and {n for _, _, n in found[-4:]} == {0, 1, 2, 3}
    for (x, y, _), (u, v, _) in itertools.combinations(found, 2):
        assert abs(x - u) >= 22 or abs(y - v) >= 11


def test_best_so_far_counts_each_trials_steps_once() -> None:
    history = [(0, 2, 0.3), (1, 2, 0.2), (0, 4, 0.4), (1, 4, float("nan")), (2, 6, 0.5)]
    assert best_so_far(history) == [(2, 0.3), (4, 0.3), (6, 0.4), (8, 0.4), (14, 0.5)]


def test_repeated_reports_cost_nothing() -> None:
    assert best_so_far([(0, 4, 0.3), (0, 4, 0.3), (0, 2, 0.1)]) == [(4, 0.3)] * 3
