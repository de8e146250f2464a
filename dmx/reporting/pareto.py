"""Pareto fronts: of accuracy against a cost, and of what a study optimised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dmx.reporting.records import RunReport
from dmx.runs.metrics import PEAK_MEMORY_MB
from dmx.runs.objectives import OBJECTIVES, evaluate, pareto_front


@dataclass(frozen=True)
class Costed:
    """A trial's number, its cost (less is better) and its accuracy (more is better)."""

    trial: int
    cost: float
    accuracy: float


def costed(run: RunReport, key: str) -> list[Costed]:
    """Whole trials with a finite accuracy and cost: the median step time, or the highest memory.

    A trial that was stopped early has another accuracy than it would have reached.
    """
    found = []
    for trial in run.whole:
        cost = trial.highest(key) if key == PEAK_MEMORY_MB else trial.median(key)
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


def against(run: RunReport, objective: str) -> list[Costed]:
    """Whole trials with their accuracy and another objective of the study."""
    found = [Costed(t.number, OBJECTIVES[objective].of(t.reports), t.best) for t in run.whole]
    return [c for c in found if math.isfinite(c.cost) and math.isfinite(c.accuracy)]


def study_front(run: RunReport) -> dict[int, dict[str, float]]:
    """{trial: {objective: value}} of a study's own front; empty where it has one objective."""
    if not run.several:
        return {}
    values = {t.number: evaluate(run.several, t.reports) for t in run.whole}
    on = pareto_front(run.several, values)
    return {number: dict(zip(run.several, values[number], strict=True)) for number in on}
