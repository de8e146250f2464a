"""What Optuna is told: values while a trial runs, and how it ended (ray-notes.md, 1b and 1c)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

from optuna import Study
from optuna.trial import Trial, TrialState

from dmx.runs.metrics import DEV_ACCURACY


def name_objectives(study: Study, labels: list[str]) -> None:
    """What optuna-dashboard writes at its axes, once."""
    if study.metric_names != labels:
        with warnings.catch_warnings(action="ignore"):
            study.set_metric_names(labels)


def is_value(value: object) -> TypeGuard[float]:
    """Whether Optuna can take it; it refuses NaN."""
    return isinstance(value, float) and math.isfinite(value)


def report(trial: Trial, value: float, step: int) -> None:
    """One point of a trial's curve."""
    with warnings.catch_warnings(action="ignore"):
        trial.report(value, step)


def tell(
    study: Study,
    trial: Trial,
    outcome: Mapping[str, Any],
    curve: Mapping[int, Mapping[str, Any]],
    reported: Collection[int],
) -> None:
    """COMPLETE with the best value; PRUNED and FAIL as what they are.

    Args:
        outcome: as the journal has it.
        curve: metrics by step, of which Optuna's copy may lack some.
        reported: the steps that it has.
    """
    for step, metrics in sorted(curve.items()):
        value = metrics.get(DEV_ACCURACY)
        if step not in reported and is_value(value):
            report(trial, value, step)
    if outcome.get("error"):
        trial.set_user_attr("error", outcome["error"])
    with warnings.catch_warnings(action="ignore"):
        if outcome["status"] == "COMPLETE":
            values = outcome.get("values") or outcome["value"]
            study.tell(trial, values, skip_if_finished=True)
        else:
            state = TrialState.PRUNED if outcome["status"] == "PRUNED" else TrialState.FAIL
            study.tell(trial, state=state, skip_if_finished=True)
