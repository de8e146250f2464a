"""Every file and folder name of a run, once."""

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
