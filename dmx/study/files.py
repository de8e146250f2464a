"""The files a study leaves: its settings, study.json, trials.csv and the best checkpoint."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dmx import __version__
from dmx import records as keys
from dmx.data.files import copy_folder
from dmx.errors import ConfigError
from dmx.schema import finite
from dmx.search.study_settings import read_settings
from dmx.storage.journal import Journal

MAY_CHANGE = frozenset({"num_trials"})
"""Settings that a later session may have otherwise."""


def write_text(path: Path, text: str) -> None:
    """Replace a file's content at once: a reader sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _as_text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=1, sort_keys=True)


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """settings.json: what the trials of a study have in common."""
    write_text(folder / keys.SETTINGS_FILE, _as_text(settings))


def check_same(folder: Path, settings: Mapping[str, Any]) -> bool:
    """See that the folder holds the study with these settings; nothing is written.

    Returns:
        Whether it has them to the letter: those that may change are as they were.

    Raises:
        ConfigError: it holds none, or another one.
        StageError: its settings are damaged.
    """
    if not (folder / keys.SETTINGS_FILE).exists():
        raise ConfigError(f"there is no study to resume in {folder}; leave --resume out.")
    old, new = read_settings(folder), json.loads(_as_text(settings))
    changed = sorted(k for k in {*old, *new} - MAY_CHANGE if old.get(k) != new.get(k))
    if changed:
        was = "; ".join(f"{k} was {old.get(k)!r}, now {settings.get(k)!r}" for k in changed[:3])
        raise ConfigError(
            f"{folder} holds another study ({was}); repeat its settings or give --name."
        )
    return old == new


def open_folder(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    files: Mapping[str, str] | None = None,
) -> None:
    """Create the study's folder, or check that `resume` continues the same study.

    Args:
        settings: what must stay the same for the trials to belong together.
        files: name -> content of what a new study keeps beside them.

    Raises:
        ConfigError: the folder exists without `resume`, does not exist with it, cannot be written,
            or holds a study with other settings.
        StageError: the study is damaged, or another process works on it.
    """
    text = _as_text(settings)
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} already exists; add --resume to continue it, or give --name.")
    try:
        if resume:
            unchanged = check_same(folder, settings)
            Journal(folder / keys.JOURNAL_FILE).close()  # damaged, or in use: said before Ray
            if not unchanged:
                write_settings(folder, settings)
            return
        new = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for name, content in {**(files or {}), keys.SETTINGS_FILE: text}.items():
            write_text(new / name, content)
        new.rename(folder)  # all of it at once; an empty folder may be there
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); give another --storage."
        ) from None


def environment() -> dict[str, Any]:
    """What the numbers were measured with."""
    import optuna
    import ray
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "dmx": __version__,
        "code": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "optuna": optuna.__version__,
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "argv": sys.argv,
    }


def code_version() -> str:
    """The git commit of the checkout dmx runs from (with + when changed), or its version."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return __version__
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return __version__
    return done.stdout.strip()


def trial_row(
    trial: keys.TrialResult, data: str, front: Collection[int] | None = None
) -> dict[str, Any]:
    """One row of trials.csv; `front`: the Pareto front of a study with several objectives."""
    several: dict[str, Any] = {}
    if front is not None:
        several = {"front": "yes" if trial.number in front else "no"}
        several |= {f"objective.{k}": _number(v) for k, v in trial.values.items()}
    return {
        "trial": trial.number,
        "status": trial.status,
        keys.BEST_DEV_ACCURACY: _number(trial.best_dev_accuracy),
        **several,
        **{k: trial.metrics.get(k, "") for k in keys.REPORT_KEYS if k != keys.BEST_DEV_ACCURACY},
        **{k: trial.params[k] for k in sorted(trial.params)},
        **({"changes": json.dumps(trial.changes)} if trial.changes else {}),
        "data": data,
        "error": trial.error,
    }


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else ""


def write_trials(
    folder: Path,
    trials: tuple[keys.TrialResult, ...],
    data: str,
    front: Collection[int] | None = None,
) -> None:
    """trials.csv: one row a trial, one column for every value that any trial had."""
    rows = [trial_row(trial, data, front) for trial in trials]
    columns: list[str] = []
    for row in rows:
        columns.extend(key for key in row if key not in columns)
    for last in ("data", "error"):
        if last in columns:
            columns.remove(last)
            columns.append(last)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / keys.TRIALS_FILE, buffer.getvalue())


def copy_best(folder: Path, best: keys.TrialResult | None) -> Path | None:
    """Copy the best trial's checkpoint to best/; None when there is none."""
    if best is None or best.checkpoint is None:
        return None
    target = folder / keys.BEST_DIR
    copy_folder(best.checkpoint.path, target)
    return target


def write_study(folder: Path, summary: Mapping[str, Any]) -> None:
    """study.json, the study's result for machines."""
    write_text(folder / keys.STUDY_FILE, json.dumps(finite(summary), indent=2) + "\n")
