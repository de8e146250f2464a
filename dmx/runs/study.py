"""A study and its trials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dmx.runs.run import CheckpointRef

SamplerKind = Literal["tpe", "random", "cmaes", "gp", "nsga2"]
SAMPLERS = get_args(SamplerKind)
"""How points are proposed; see dmx.search.samplers."""

SchedulerKind = Literal["asha", "hyperband", "pbt", "none"]
SCHEDULERS = get_args(SchedulerKind)
"""What happens to trials that do worse than others; see dmx.study.ray_tune and dmx.study.pbt."""

TrialStatus = Literal["RUNNING", "COMPLETE", "PRUNED", "FAILED"]


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One finished or stopped trial.

    Attributes:
        trial_id: unique in its study.
        number: the trial's number in the order of proposal, from 0.
        status: COMPLETE (full budget), PRUNED (stopped by the scheduler), FAILED, or RUNNING.
        params: the searched values, by dotted RunConfig path.
        metrics: the last reported metrics, flat.
        best_dev_accuracy: highest dev accuracy of the trial; NaN when it never reported one.
        steps: optimizer steps taken.
        seconds: wall time the trial used.
        checkpoint: its best checkpoint, if one exists on disk.
        error: one line of what failed, or "". reason: of an early stop, in this session: the rung.
        values: of each objective, by name; NaN where it was not measured.
        changes: step -> its searched values from then on, where it took over another trial.
    """

    trial_id: str
    number: int
    status: TrialStatus
    params: Mapping[str, Any]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    best_dev_accuracy: float = math.nan
    steps: int = 0
    seconds: float = 0.0
    checkpoint: CheckpointRef | None = None
    error: str = ""
    reason: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    changes: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a study ended with.

    Attributes:
        name: the study's name, its folder under the run root.
        folder: where everything lies.
        trials: all trials by number.
        best: the trial with the highest dev accuracy (the earlier one on a tie), or None.
        complete: False when the study was stopped before its last trial ended.
        front: with several objectives, the numbers of the trials that no other one beats.
    """

    name: str
    folder: Path
    trials: tuple[TrialResult, ...]
    best: TrialResult | None
    complete: bool
    front: tuple[int, ...] = ()


def best_trial(trials: tuple[TrialResult, ...]) -> TrialResult | None:
    """The trial with the highest finite best dev accuracy; the earliest on a tie; or None."""
    scored = [t for t in trials if math.isfinite(t.best_dev_accuracy)]
    return max(scored, key=lambda t: (t.best_dev_accuracy, -t.number)) if scored else None
