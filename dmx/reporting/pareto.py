"""The Pareto front of accuracy against a cost: trials that no other beats on both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dmx import records as keys
from dmx.reporting.records import Trial


@dataclass(frozen=True)
class Costed:
    """A trial's number, its cost (less is better) and its accuracy (more is better)."""

    trial: int
    cost: float
    accuracy: float


def costed(trials: Sequence[Trial], key: str) -> list[Costed]:
    """Trials with a finite accuracy and cost: the median step time, or the highest memory."""
    found = []
    for trial in trials:
        cost = trial.highest(key) if key == keys.PEAK_MEMORY_MB else trial.median(key)
        if math.isfinite(cost) and math.isfinite(trial.best):
            found.append(Costed(trial.number, cost, trial.best))
    return found


def front(points: Sequence[Costed]) -> list[Costed]:
    """The points that no other point beats, cheapest first.

    A point is beaten by one that is no dearer and no less accurate, and better in one of the two;
    of equal points the earlier trial stays.
    """
    kept: list[Costed] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy, p.trial)):
        if not kept or point.accuracy > kept[-1].accuracy:
            kept.append(point)
    return kept
