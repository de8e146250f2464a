"""How many optimizer steps a study is expected to take, with its scheduler stopping trials."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmx.runs.layout import DEV_ACCURACY
from dmx.runs.study import Report
from dmx.search.rungs import SuccessiveHalving
from dmx.search.schedulers import Record, Segment, Settings

_MOST_TRIALS = 300
"""A part of a longer study stands for the rest: the time grows with the square of the trials, and
the share that is saved hardly changes any more."""


@dataclass(frozen=True, kw_only=True)
class ExpectedSteps:
    """Over all trials of a study. `full`: were none stopped. `expected`: with early stopping."""

    full: int
    expected: float

    @property
    def saved(self) -> float:
        """The share that early stopping saves, in 0..1."""
        return 1.0 - self.expected / self.full if self.full else 0.0


def expected_steps(settings: Settings, *, eval_every_steps: int, slots: int) -> ExpectedSteps:
    """Simulate a study over trials of random quality whose order never changes.

    A better sampler sends trials that are harder to tell apart, and noise promotes some: a real
    study may save less. The first trials to reach a rung always go on, so short studies save
    little.
    """
    num_trials, max_steps, every = settings.num_trials, settings.max_steps, eval_every_steps
    full = num_trials * max_steps
    if settings.scheduler not in ("asha", "hyperband") or num_trials < 1:
        return ExpectedSteps(full=full, expected=float(full))
    simulated = min(num_trials, _MOST_TRIALS)
    draw = random.Random(0)
    draws = max(10, min(100, 3000 // simulated))
    total = 0
    for _ in range(draws):
        scheduler = SuccessiveHalving(settings)
        # Only evaluations that fill a rung decide anything: the first at or after it.
        marks = {math.ceil(rung.steps / every - 1e-9) * every for rung in scheduler.rungs}
        qualities = [draw.random() for _ in range(simulated)]
        total += _simulate(
            scheduler, qualities, [*sorted(m for m in marks if m < max_steps), max_steps], slots
        )
    return ExpectedSteps(full=full, expected=total / draws * (num_trials / simulated))


def _simulate(
    scheduler: SuccessiveHalving, qualities: Sequence[float], marks: Sequence[int], slots: int
) -> int:
    """Steps that one study takes; every trial is equally fast.

    Args:
        qualities: of each trial, its accuracy at every step. marks: steps of its reports.
    """
    record = Record(Path(), len(qualities))
    running: list[tuple[int, int, int]] = []  # (clock, trial, index of its next mark)
    clock = total = 0
    while True:
        while len(running) < slots and isinstance(
            segment := scheduler.next_segment(record), Segment
        ):
            record.in_flight.add(segment.trial)
            heapq.heappush(running, (clock + marks[0], segment.trial, 0))
        if not running:
            return total
        clock, trial, mark = heapq.heappop(running)
        step = marks[mark]
        record.history.append(Report(trial, step, {DEV_ACCURACY: qualities[trial]}, 0.0))
        if scheduler.keep_training(record, trial, step) and step < marks[-1]:
            heapq.heappush(running, (clock + marks[mark + 1] - step, trial, mark + 1))
            continue
        total += step
        record.in_flight.discard(trial)
        record.outcomes[trial] = {}
