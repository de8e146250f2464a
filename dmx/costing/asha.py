"""How many optimizer steps a study is expected to take, with ASHA stopping trials early."""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from dataclasses import dataclass

from dmx.reporting.rungs import Bracket
from dmx.search.brackets import bracket_of, num_brackets

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
    early_stopping: bool = True,
    hyperband: bool = False,
) -> ExpectedSteps:
    """Simulate ASHA over trials of random quality whose order never changes.

    A better sampler sends trials that are harder to tell apart, and noise promotes some: a real
    study may save less. The first trials to reach a rung always go on, so short studies save
    little. Hyperband's brackets are simulated one after another.
    """
    full = num_trials * max_steps
    if not early_stopping or num_trials < 1:
        return ExpectedSteps(full=full, expected=float(full))
    grace = min(grace_steps, max_steps)
    brackets = 1
    if hyperband:
        brackets = num_brackets(
            grace_steps=grace, max_steps=max_steps, reduction_factor=reduction_factor
        )
    members = Counter(bracket_of(n, brackets, reduction_factor) for n in range(num_trials))
    draw = random.Random(0)
    total = sum(
        _simulate(
            [draw.random() for _ in range(count)],
            max_steps=max_steps,
            grace_steps=grace * reduction_factor**bracket,
            reduction_factor=reduction_factor,
            eval_every_steps=eval_every_steps,
            slots=slots,
        )
        for bracket, count in sorted(members.items())
        for _ in range(_DRAWS)
    )
    return ExpectedSteps(full=full, expected=total / _DRAWS)


def _simulate(
    qualities: list[float],
    *,
    max_steps: int,
    grace_steps: float,
    reduction_factor: float,
    eval_every_steps: int,
    slots: int,
) -> int:
    """Steps that one study takes; every trial is equally fast."""
    bracket = Bracket(
        grace_steps=grace_steps, max_steps=max_steps, reduction_factor=reduction_factor
    )
    # Only evaluations that fill a rung decide anything: the first at or after it.
    marks = sorted(
        {
            min(math.ceil(r.steps / eval_every_steps - 1e-9) * eval_every_steps, max_steps)
            for r in bracket.rungs
        }
        | {max_steps}
    )
    waiting = iter(range(len(qualities)))
    # (clock, trial, index of its next mark, steps it has taken)
    running: list[tuple[int, int, int]] = []
    for _ in range(min(slots, len(qualities))):
        heapq.heappush(running, (marks[0], next(waiting), 0))
    total = 0
    while running:
        clock, trial, mark = heapq.heappop(running)
        goes_on = bracket.report(trial, marks[mark], qualities[trial])
        if goes_on and marks[mark] < max_steps:
            heapq.heappush(running, (clock + marks[mark + 1] - marks[mark], trial, mark + 1))
            continue
        total += marks[mark]
        following = next(waiting, None)
        if following is not None:
            heapq.heappush(running, (clock + marks[0], following, 0))
    return total
