"""Every file, folder and metric name of a run, once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

# Files of a checkpoint directory.
MODEL_FILE = "model.safetensors"
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
CURRICULUM_FILE = "curriculum.yaml"
RESULT_FILE = "result.json"
"""A single run's test, when it is over."""
ERROR_FILE = "error.txt"
TRIALS_DIR = "trials"
STAGES_DIR = "stages"

Kind = Literal["study", "run", "curriculum"]
"""What a folder holds."""


def trial_folder(study: Path, number: int) -> Path:
    """Where a trial keeps its checkpoints and its TensorBoard events."""
    return study / TRIALS_DIR / f"{number:04d}"


def attempt_folder(curriculum: Path, stage: str, number: int) -> Path:
    """Where an attempt keeps its checkpoints: `best` and `last`."""
    return curriculum / STAGES_DIR / stage / f"attempt-{number}"


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
SEGMENT_ENDED = "segment_ended"
"""The trial has ended a segment of its training and goes on in another (see pbt)."""
UNDER_WAY = "under_way"
"""No report yet: the run trains on, and could be stopped here without losing a step."""
FAILURE = "failure"
"""One line of why the trial cannot go on; a trial that reports it has FAILED."""
RESUMABLE = "resumable"
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
