"""ASHA's rungs (Li et al. 2020, arXiv 1810.05934) as Ray Tune runs them, from a list of reports."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """A trial that reached a rung: its dev accuracy there, and whether it went on."""

    trial: int
    accuracy: float
    promoted: bool


@dataclass
class Rung:
    """One rung. `steps`: where it lies. `bracket`: of Hyperband; ASHA has one only."""

    steps: float
    entries: list[Entry] = field(default_factory=list)
    bracket: int = 0

    def cutoff(self, reduction_factor: float) -> float | None:
        """The accuracy that the next trial must reach to go on; None before the first."""
        values = sorted(e.accuracy for e in self.entries if not math.isnan(e.accuracy))
        if not values:
            return None
        place = (1 - 1 / reduction_factor) * (len(values) - 1)
        low = math.floor(place)
        high = min(low + 1, len(values) - 1)
        return values[low] + (values[high] - values[low]) * (place - low)


class Bracket:
    """The rungs of one study, filled report by report.

    Rungs lie at grace * factor^k up to max_steps. A report fills the highest rung that its step
    has reached and that its trial has not filled, and the trial stops there when it is below the
    top 1/factor of those that came before it.
    """

    def __init__(self, *, grace_steps: float, max_steps: float, reduction_factor: float) -> None:
        ratio = math.log(max_steps / grace_steps) / math.log(reduction_factor)
        count = max(int(ratio + 1), 1)
        self.factor = reduction_factor
        self.max_steps = max_steps
        self.rungs = [Rung(grace_steps * reduction_factor**k) for k in range(count)]

    def report(self, trial: int, step: float, accuracy: float) -> bool:
        """Record a report; False when ASHA stops the trial."""
        if step >= self.max_steps:
            return True  # it ends by itself, as COMPLETE
        for rung in reversed(self.rungs):
            if step < rung.steps or any(e.trial == trial for e in rung.entries):
                continue
            cutoff = rung.cutoff(self.factor)
            goes_on = cutoff is None or not accuracy < cutoff
            rung.entries.append(Entry(trial, accuracy, goes_on))
            return goes_on
        return True


def best_so_far(history: Iterable[tuple[int, float, float]]) -> list[tuple[float, float]]:
    """(optimizer steps of all trials together, best accuracy so far) after each report.

    Args:
        history: (trial, step, accuracy) in the order of recording; steps count within a trial.
    """
    reached: dict[int, float] = {}
    points: list[tuple[float, float]] = []
    best, total = -math.inf, 0.0
    for trial, step, accuracy in history:
        total += max(step - reached.get(trial, 0.0), 0.0)
        reached[trial] = max(step, reached.get(trial, 0.0))
        best = max(best, accuracy) if math.isfinite(accuracy) else best
        if math.isfinite(best):
            points.append((total, best))
    return points


def fill(bracket: Bracket, history: Iterable[tuple[int, float, float]]) -> list[Rung]:
    """The rungs after all (trial, step, accuracy) reports, in the order they were recorded."""
    for trial, step, accuracy in history:
        bracket.report(trial, step, accuracy)
    return bracket.rungs
