"""A tiny study: its search space, its command, and its files read back."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dmx.search.schedulers import Idle, Scheduler
from dmx.search.space import SearchSpace, load_space
from dmx.search.study_log import StudyLog
from dmx.study.study import StudyConfig
from tests.tiny import SETTINGS, TASK

ROOT = Path(__file__).resolve().parents[2]
CORES = len(os.sched_getaffinity(0))
NUM_TRIALS = 6

SPACE_YAML = """
attention: butterfly
space:
  attention.block_size: {choice: [16, 32]}
  attention.inner: {choice: [softmax, linear]}
  optim.learning_rate: {loguniform: [1.0e-4, 3.0e-2]}
  model.dropout: {uniform: [0.0, 0.3]}
when:
  - if: {attention.inner: linear}
    then: {model.mlp_dropout: {uniform: [0.0, 0.2]}}
initial_points:
  - {attention.block_size: 16, attention.inner: softmax, optim.learning_rate: 5.0e-3, model.dropout: 0.0}
"""  # noqa: E501
SEARCHED = [
    "attention.block_size",
    "attention.inner",
    "optim.learning_rate",
    "model.dropout",
    "model.mlp_dropout",
]
FIXED = {k: v for k, v in SETTINGS.items() if k not in (*SEARCHED, "train.num_steps")} | {
    "train.eval_every_steps": 2,
    "attention.dropout": 0.1,
}
MAX_STEPS = 12


def space(folder: Path) -> SearchSpace:
    """The space, loaded from a file."""
    path = folder / "tiny.yaml"
    path.write_text(SPACE_YAML, encoding="utf-8")
    return load_space(str(path), TASK)


def open_log(folder: Path, **changes: Any) -> StudyLog:
    """A study of that space, open for writing; what else of a StudyConfig is to be otherwise."""
    chosen = changes.pop("space", None) or space(folder.parent)
    values = {"num_trials": 4, "max_steps": MAX_STEPS, "grace_steps": 2, "seed": 1, **changes}
    return StudyLog(folder, StudyConfig(name=folder.name, task=TASK, space=chosen, **values))


def next_trial(log: StudyLog) -> tuple[int, dict[str, Any]] | None:
    """(number, values) of the trial that a study hands out next; None where none is left."""
    segment = Scheduler(log.study_config).next_segment(log)
    if isinstance(segment, Idle):
        return None
    log.in_flight.add(segment.trial)
    return segment.trial, log.start(segment.trial)


def remaining(log: StudyLog) -> int:
    """Trials that have not ended."""
    return log.num_trials - len(log.outcomes)


def command(folder: Path, data_root: Path, *more: str, name: str = "study") -> list[str]:
    """`python -m dmx.tune` for the tiny study, one trial at a time."""
    space(folder)
    words = [sys.executable, "-m", "dmx.tune", "--attention", "butterfly", "--task", TASK]
    words += ["--data-root", str(data_root), "--storage", "runs", "--name", name]
    words += ["--space", "tiny.yaml", "--seed", "4", "--num-trials", str(NUM_TRIALS)]
    words += ["--max-steps", str(MAX_STEPS), "--cpus-per-trial", str(CORES)]
    for key, value in FIXED.items():
        words += ["--set", f"{key}={value}"]
    return [*words, *more]


def environment() -> dict[str, str]:
    """Of a command: the checkout's dmx, on a terminal as most are."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def run(words: list[str], folder: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def rows(study: Path) -> list[dict[str, str]]:
    """trials.csv."""
    with (study / "trials.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def journal(study: Path) -> list[dict[str, Any]]:
    """Whole lines of the journal, without the checksum's help."""
    path = study / "journal.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


CLOCKED = {
    "train_seconds",
    "step_seconds",
    "samples_per_second",
    "samples_per_second_per_worker",
    "tokens_per_second",
    "peak_memory_mb",
    "process_seconds",
}


def facts(study: Path) -> list[dict[str, str]]:
    """What must be equal of two studies: the rows without those columns that a clock decides."""
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows(study)]
