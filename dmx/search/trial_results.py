"""A trial's result, from what Optuna, the journal and its checkpoint say of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from dmx.runs.metrics import BEST_STEP, STEPS, TRAIN_SECONDS
from dmx.runs.run import CheckpointRef
from dmx.runs.study import TrialResult, TrialStatus
from dmx.storage.files import put_back

STATUS: dict[TrialState, TrialStatus] = {
    TrialState.COMPLETE: "COMPLETE",
    TrialState.PRUNED: "PRUNED",
    TrialState.FAIL: "FAILED",
    TrialState.RUNNING: "RUNNING",
    TrialState.WAITING: "RUNNING",
}


def trial_result(
    frozen: FrozenTrial,
    *,
    folder: Path,
    params: Mapping[str, Any],
    reports: Mapping[int, Mapping[str, Any]],
    values: Mapping[str, float],
    error: str,
    changes: Mapping[int, Mapping[str, Any]],
) -> TrialResult:
    """Put them together.

    Args:
        folder: of its best checkpoint, if there is one. params: its searched values.
        reports: step -> metrics. values: of each objective, accuracy first.
        error, changes: see TrialResult.
    """
    last = reports[max(reports)] if reports else {}
    best = next(iter(values.values()))
    if frozen.state.is_finished():  # else its process may be at work there
        put_back(folder)
    checkpoint = None
    if folder.is_dir():
        checkpoint = CheckpointRef(path=folder, step=int(last.get(BEST_STEP, 0)), dev_accuracy=best)
    return TrialResult(
        trial_id=f"{frozen.number:04d}",
        number=frozen.number,
        status=STATUS[frozen.state],
        params=params,
        metrics=last,
        best_dev_accuracy=best,
        steps=int(last.get(STEPS, 0)),
        seconds=float(last.get(TRAIN_SECONDS, 0.0)),
        checkpoint=checkpoint,
        error=error,
        values=values,
        changes=changes,
    )
