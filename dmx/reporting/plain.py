"""A run as JSON (everything) and as CSV (one row a trial, or a stage, or an evaluation)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dmx.reporting import stopping
from dmx.reporting.caveats import caveats, comparable
from dmx.reporting.importance import importances
from dmx.reporting.pareto import costed, front, study_front
from dmx.reporting.published import column_of, load
from dmx.reporting.records import RunReport
from dmx.reporting.text import train_command
from dmx.runs.metrics import (
    BEST_DEV_ACCURACY,
    DEV_ACCURACY,
    PEAK_MEMORY_MB,
    STEP_SECONDS,
    STEPS,
    TEST_ACCURACY,
)
from dmx.runs.objectives import evaluate
from dmx.schema import finite


def to_json(run: RunReport) -> str:
    """Everything the report knows, with what it worked out. Accuracies lie in 0..1."""
    content = finite(run)
    content["caveats"] = finite(caveats(run))
    content["comparable_with_published"] = comparable(run)
    content["command"] = train_command(run)
    content["importances"] = finite(importances(run))
    content["pareto"] = {
        key: finite(front(costed(run, key))) for key in (STEP_SECONDS, PEAK_MEMORY_MB)
    }
    content["front"] = finite(study_front(run))
    content["rungs"] = finite(stopping.filled_rungs(run))
    column = column_of(run.task)
    content["published"] = finite(load().of(column)) if column else []
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with every column that any of them has; missing cells are empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if _missing(v) else v for k, v in row.items()})
    return buffer.getvalue()


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def to_csv(run: RunReport) -> str:
    """Trials of a study, stages of a curriculum, evaluations of a single run."""
    common = {"run": run.name, "attention": run.attention, "task": run.task, "data": run.data}
    if run.kind == "run":
        reports = run.trials[0].reports if run.trials else ()
        return write_csv([{**common, **r} for r in reports])
    if run.kind == "curriculum":
        return write_csv(
            [
                {
                    "run": run.name,
                    "stage": s.name,
                    "task": s.task,
                    "data": s.data,
                    "status": s.status,
                    "parent": s.parent,
                    "attempts": len(s.attempts),
                    DEV_ACCURACY: s.dev_accuracy,
                    TEST_ACCURACY: s.test_accuracy,
                    STEPS: s.steps,
                    "test_accuracy_on_last_stage": s.test_on_last,
                    "attention": s.attention,
                    "all_steps": s.all_steps,
                    "all_train_seconds": s.seconds,
                }
                for s in run.stages
            ]
        )
    rows = []
    front = study_front(run)
    for trial in run.trials:
        last = dict(trial.reports[-1]) if trial.reports else {}
        last.pop(BEST_DEV_ACCURACY, None)
        scores = {"trial": trial.number, "status": trial.status, BEST_DEV_ACCURACY: trial.best}
        if run.several:
            values = zip(run.several, evaluate(run.several, trial.reports), strict=True)
            several: dict[str, Any] = {"front": "yes" if trial.number in front else "no"}
            several |= {f"objective.{name}": value for name, value in values}
            scores |= several
        rows.append({**common, **scores, **last, **trial.params, "error": trial.error})
    return write_csv(rows)
