"""The typed values that travel between layers, and every metric key and file name, once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

# Metric keys. Flat on purpose: a nested key silently breaks Ray's keep-best (ray-notes.md, 5).
DEV_ACCURACY = "dev_accuracy"
DEV_LOSS = "dev_loss"
BEST_DEV_ACCURACY = "best_dev_accuracy"
BEST_STEP = "best_step"
TRAIN_LOSS = "train_loss"
TRAIN_ACCURACY = "train_accuracy"
TEST_ACCURACY = "test_accuracy"
TEST_LOSS = "test_loss"
LEARNING_RATE = "learning_rate"
GRADIENT_NORM = "gradient_norm"
STEPS = "steps"
SAMPLES = "samples"
SAMPLES_PER_SECOND = "samples_per_second"
SAMPLES_PER_SECOND_PER_WORKER = "samples_per_second_per_worker"
TOKENS_PER_SECOND = "tokens_per_second"
STEP_SECONDS = "step_seconds"
PROCESS_SECONDS = "process_seconds"
"""Seconds the run's process was busy with it: building, training, evaluating, saving."""
TRAIN_SECONDS = "train_seconds"
PEAK_MEMORY_MB = "peak_memory_mb"
PARAMETERS = "parameters"
MICRO_BATCH_SIZE = "micro_batch_size"
"""Sequences that go through the model at once; less than asked for after running out of memory."""
NUM_WORKERS = "num_workers"
"""Processes that train the run together; fewer than asked for after losing machines."""
WAITS = "waits"
"""The trial has ended a piece of its training and goes on in another (see pbt)."""
UNDER_WAY = "under_way"
"""No report yet: the run trains on, and could be stopped here without losing a step."""
FAILURE = "failure"
"""One line of why the trial cannot go on; a trial that reports it has FAILED."""
LOST = "lost"
"""Beside a failure: it is the machine's or the storage's; the run can be continued."""

REPORT_KEYS = (
    *(STEPS, SAMPLES, TRAIN_LOSS, TRAIN_ACCURACY, DEV_LOSS, DEV_ACCURACY, BEST_DEV_ACCURACY),
    *(BEST_STEP, LEARNING_RATE, GRADIENT_NORM, TRAIN_SECONDS, STEP_SECONDS, SAMPLES_PER_SECOND),
    *(TOKENS_PER_SECOND, PEAK_MEMORY_MB, PARAMETERS, PROCESS_SECONDS),
    *(SAMPLES_PER_SECOND_PER_WORKER, MICRO_BATCH_SIZE, NUM_WORKERS),
)
"""What a run reports at each evaluation."""

NUM_DEV = "num_dev"
DEV_MAJORITY = "dev_majority"
"""Of the dev split that chose a checkpoint: its examples, and the share of its largest class."""

# Files of a checkpoint directory.
MODEL_FILE = "model.pt"
TRAINING_STATE_FILE = "training_state.pt"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
SAMPLES_FILE = "samples.json"
"""Beside the best weights: what they say about a few dev examples."""
BEST_DIR = "best"
LAST_DIR = "last"

# Files of a run directory.
STUDY_FILE = "study.json"
SETTINGS_FILE = "settings.json"
"""Of a study of an earlier dmx; now the journal's first event."""
WARM_START_FILE = "warm_start.json"
TRIALS_FILE = "trials.csv"
OPTUNA_FILE = "optuna.journal"
JOURNAL_FILE = "journal.jsonl"
LINEAGE_FILE = "lineage.json"

Kind = Literal["study", "run", "curriculum"]
"""What a folder holds."""

SamplerKind = Literal["tpe", "random", "cmaes", "gp", "nsga2"]
SAMPLERS = get_args(SamplerKind)
"""How points are proposed; see dmx.search.sampling."""

SchedulerKind = Literal["asha", "hyperband", "pbt", "none"]
SCHEDULERS = get_args(SchedulerKind)
"""What happens to trials that do worse than others; see dmx.study.scheduler and dmx.study.pbt."""

TrialStatus = Literal["RUNNING", "COMPLETE", "PRUNED", "FAILED"]


@dataclass(frozen=True, kw_only=True)
class CheckpointRef:
    """A checkpoint on disk, with what is needed to choose among several.

    Attributes:
        path: the checkpoint directory.
        step: optimizer steps taken when it was written.
        dev_accuracy: accuracy on the whole dev split at that step, in 0..1, or None.
    """

    path: Path
    step: int
    dev_accuracy: float | None


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


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What a gate sees of a curriculum stage.

    Attributes:
        name: the stage.
        attempt: 0 for the first try, counting up with on_fail retries.
        dev_accuracies: dev accuracy at every evaluation, in order.
        steps: optimizer steps taken.
        seconds: wall time of the attempt.
        num_classes: classes of the stage's data; chance is 1 / num_classes.
        checkpoint: the best checkpoint.
    """

    name: str
    attempt: int
    dev_accuracies: tuple[float, ...]
    steps: int
    seconds: float
    num_classes: int
    checkpoint: CheckpointRef | None
    metrics: Mapping[str, float] = field(default_factory=dict)


def best_trial(trials: tuple[TrialResult, ...]) -> TrialResult | None:
    """The trial with the highest finite best dev accuracy; the earliest on a tie; or None."""
    scored = [t for t in trials if math.isfinite(t.best_dev_accuracy)]
    return max(scored, key=lambda t: (t.best_dev_accuracy, -t.number)) if scored else None
