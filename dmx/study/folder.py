"""The files a study leaves: its settings, study.json, trials.csv and the best checkpoint."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmx.errors import ConfigError, StorageError
from dmx.format import csv_text
from dmx.runs import layout
from dmx.runs.run import Run
from dmx.runs.study import Study
from dmx.runs.trial import Trial
from dmx.schema import finite
from dmx.search.study_settings import SETTINGS, changes, settings_event
from dmx.storage.files import copy_folder, fsync_path, write_atomic
from dmx.storage.journal import CLAIM_FILE, Claim, Journal, read_journal

MAY_CHANGE = frozenset({"num_trials"})
"""Settings that a later session may have otherwise."""


def check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """See that the folder holds the study with these settings; nothing is written.

    Raises:
        ConfigError: it holds none, or another one.
        StageError: its settings are damaged.
    """
    old = Run.read(folder).settings
    if not old:
        raise ConfigError(f"there is no study to resume in {folder}; leave --resume out.")
    changed = changes(old, settings, MAY_CHANGE)
    if changed:
        why = ""
        if any(text.startswith("--max-steps") for text in changed):
            why = "the learning rate's schedule and the rungs span all steps of a trial; "
        raise ConfigError(
            f"{folder} holds another study ({'; '.join(changed[:3])}); {why}repeat its settings "
            "or give --name."
        )


_OF_A_START = (
    *(layout.JOURNAL_FILE, f".{layout.JOURNAL_FILE}.lock", layout.SETTINGS_FILE),
    *(layout.WARM_START_FILE, layout.ERROR_FILE, CLAIM_FILE, "events.out.tfevents.*"),
)
"""What a run leaves that failed before it had trained anything."""


def check_free(folder: Path) -> None:
    """See that a new run may have the folder; what a failed start left there is no hindrance.

    Raises:
        ConfigError: it holds a run, or something else. StageError: a run is being started in it.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    begun = any(not any(fnmatch.fnmatch(name, p) for p in _OF_A_START) for name in names)
    if layout.JOURNAL_FILE in names and not begun:
        events, _ = read_journal(folder / layout.JOURNAL_FILE)
        begun = any(e.get("event") != SETTINGS for e in events)
    if begun:
        raise ConfigError(f"{folder} already exists; add --resume to continue it, or give --name.")
    if layout.JOURNAL_FILE in names:
        check_unused(folder)
    if CLAIM_FILE in names:
        Claim(folder, wait_seconds=0).release()


def clear(folder: Path) -> None:
    """Remove what a failed start left in a folder that is free."""
    for path in folder.iterdir() if folder.is_dir() else ():
        path.unlink()


def check_unused(folder: Path) -> None:
    """See that the study's journal is sound and that no other process works on it.

    Raises:
        StageError: it is not.
    """
    Journal(folder / layout.JOURNAL_FILE).close()


def open_folder(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    options: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Create the study's folder, or check that `resume` continues the same study.

    Args:
        settings: what must stay the same for the trials to belong together.
        options: of the command. files: name -> content of what a new study keeps beside them.

    Raises:
        ConfigError: the folder exists without `resume`, does not exist with it, cannot be written,
            or holds a study with other settings.
        StageError: the study is damaged, or another process works on it.
    """
    if not resume:
        check_free(folder)
    event = settings_event("study", settings, options)
    try:
        if resume:
            check_same(folder, settings)
            note_settings(folder, event)
            return
        new = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for name, content in (files or {}).items():
            write_atomic(new / name, content)
        note_settings(new, event)
        clear(folder)
        new.rename(folder)  # all of it at once; an empty folder may be there
        fsync_path(folder.parent)
    except (OSError, StorageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.__cause__ or error
        raise ConfigError(
            f"{folder} cannot be written ({reason}); give another --storage."
        ) from None


def note_settings(folder: Path, event: Mapping[str, Any]) -> None:
    """Write a session's settings down where they, its options or its environment are new.

    Raises:
        StageError: the journal is damaged, or another process works on the run.
        OSError, StorageError: it cannot be written.
    """
    with Journal(folder / layout.JOURNAL_FILE) as journal:
        append_settings(journal, event)


def append_settings(journal: Journal, event: Mapping[str, Any]) -> None:
    """note_settings, in a journal that is open."""
    known = [e for e in journal.events if e.get("event") == event["event"]]
    same = ("settings", "options", "environment")
    if not known or any(known[-1].get(key) != event[key] for key in same):
        journal.append(**event)


def write_trials(study: Study) -> None:
    """trials.csv: one row a trial, one column for every value that any trial had."""
    write_atomic(study.folder / layout.TRIALS_FILE, csv_text(study.trial_rows()))


def copy_best(folder: Path, best: Trial | None) -> Path | None:
    """Copy the best trial's checkpoint to best/; None when there is none."""
    if best is None or best.checkpoint is None:
        return None
    target = folder / layout.BEST_DIR
    copy_folder(best.checkpoint, target)
    return target


def write_study(folder: Path, summary: Mapping[str, Any]) -> None:
    """study.json, the study's result for machines."""
    write_atomic(folder / layout.STUDY_FILE, json.dumps(finite(summary), indent=2) + "\n")
