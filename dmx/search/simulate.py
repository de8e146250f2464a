"""How many optimizer steps a study is expected to take, with its scheduler stopping trials."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dmx.runs.layout import DEV_ACCURACY
from dmx.runs.study import SchedulerKind
from dmx.search.schedulers import Scheduler, Segment, SuccessiveHalving


@dataclass(frozen=True, kw_only=True)
class ExpectedSteps:
    """Over all trials of a study. `full`: were none stopped. `expected`: with early stopping."""

    full: int
    expected: float

    @property
    def saved(self) -> float:
        """The share that early stopping saves, in 0..1."""
        return 1.0 - self.expected / self.full if self.full else 0.0


def expected_steps(
    *,
    num_trials: int,
    max_steps: int,
    grace_steps: int,
    reduction_factor: float,
    eval_every_steps: int,
    slots: int,
    scheduler: SchedulerKind = "asha",
) -> ExpectedSteps:
    """Simulate a study over trials of random quality whose order never changes.

    A better sampler sends trials that are harder to tell apart, and noise promotes some: a real
    study may save less. The first trials to reach a rung always go on, so short studies save
    little.
    """
    full = num_trials * max_steps
    if scheduler not in ("asha", "hyperband") or num_trials < 1:
        return ExpectedSteps(full=full, expected=float(full))
    draw = random.Random(0)
    draws = max(10, min(100, 3000 // num_trials))
    total = 0
    for _ in range(draws):
        decides = SuccessiveHalving(
            scheduler,
            grace_steps=grace_steps,
            max_steps=max_steps,
            reduction_factor=reduction_factor,
        )
        # Only evaluations that fill a rung decide anything: the first at or after it.
        marks = sorted(
            {_evaluation(r.steps, eval_every_steps, max_steps) for r in decides.brackets.rungs}
            | {max_steps}
        )
        total += _simulate(decides, [draw.random() for _ in range(num_trials)], marks, slots)
    return ExpectedSteps(full=full, expected=total / draws)


def _evaluation(step: float, every: int, max_steps: int) -> int:
    """The first evaluation at or after a step."""
    return min(math.ceil(step / every - 1e-9) * every, max_steps)


@dataclass
class _SimulatedStudy:
    """A schedulers.Record."""

    num_trials: int
    in_flight: set[int] = field(default_factory=set)
    by_number: dict[int, Any] = field(default_factory=dict)
    history: list[tuple[int, int, dict[str, float], float]] = field(default_factory=list)
    outcomes: set[int] = field(default_factory=set)
    compared: tuple[int, ...] = ()


def _simulate(
    scheduler: Scheduler, qualities: Sequence[float], marks: Sequence[int], slots: int
) -> int:
    """Steps that one study takes; every trial is equally fast.

    Args:
        qualities: of each trial, its accuracy at every step. marks: steps of its reports.
    """
    record = _SimulatedStudy(len(qualities))
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
        record.history.append((trial, step, {DEV_ACCURACY: qualities[trial]}, 0.0))
        if scheduler.keep_training(record, trial, step) and step < marks[-1]:
            heapq.heappush(running, (clock + marks[mark + 1] - step, trial, mark + 1))
            continue
        total += step
        record.in_flight.discard(trial)
        record.outcomes.add(trial)
