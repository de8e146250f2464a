"""How many optimizer steps a study is expected to take, with its scheduler stopping trials."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

from dmx.search.rungs import Brackets

_DRAWS = 100


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
    scheduler: str = "asha",
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
    total = 0
    for _ in range(_DRAWS):
        brackets = Brackets(
            scheduler,
            grace_steps=min(grace_steps, max_steps),
            max_steps=max_steps,
            reduction_factor=reduction_factor,
        )
        qualities = [draw.random() for _ in range(num_trials)]
        total += _simulate(qualities, brackets, max_steps, eval_every_steps, slots)
    return ExpectedSteps(full=full, expected=total / _DRAWS)


def _simulate(
    qualities: list[float], brackets: Brackets, max_steps: int, every: int, slots: int
) -> int:
    """Steps that one study takes; every trial is equally fast."""
    # Only evaluations that fill a rung decide anything: the first at or after it.
    marks = sorted(
        {min(math.ceil(r.steps / every - 1e-9) * every, max_steps) for r in brackets.rungs}
        | {max_steps}
    )
    waiting = iter(range(len(qualities)))
    # (clock, trial, index of its next mark)
    running = [(marks[0], next(waiting), 0) for _ in range(min(slots, len(qualities)))]
    total = 0
    while running:
        clock, trial, mark = heapq.heappop(running)
        goes_on = brackets.report(trial, marks[mark], qualities[trial])
        if goes_on and marks[mark] < max_steps:
            heapq.heappush(running, (clock + marks[mark + 1] - marks[mark], trial, mark + 1))
            continue
        total += marks[mark]
        following = next(waiting, None)
        if following is not None:
            heapq.heappush(running, (clock + marks[0], following, 0))
    return total
