"""The best accuracy so far against the steps of all trials."""

from __future__ import annotations

import math
from collections.abc import Iterable


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
