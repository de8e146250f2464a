"""Find out what a folder holds (a study, a single run, a curriculum), and load it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from dmx.errors import ConfigError, DataError, DmxError, StageError
from dmx.runs import layout
from dmx.runs.curriculum import Curriculum
from dmx.runs.layout import Kind
from dmx.runs.run import Run
from dmx.runs.study import Study
from dmx.storage.journal import decode

_FILES: dict[Kind, tuple[str, ...]] = {
    "curriculum": (layout.CURRICULUM_FILE, layout.LINEAGE_FILE, layout.STAGES_DIR),
    "study": (layout.STUDY_FILE, layout.OPTUNA_FILE, layout.SETTINGS_FILE),
    "run": (layout.RESULT_FILE, layout.BEST_DIR, layout.LAST_DIR, layout.ERROR_FILE),
}
"""What only that kind leaves."""


def kind_of(folder: Path) -> Kind | None:
    """What the folder holds, by the first lines of its journal or its files; None for no run."""
    with contextlib.suppress(OSError), (folder / layout.JOURNAL_FILE).open("rb") as journal:
        for line in itertools.islice(journal, 3):
            event = decode(line) or {}
            if event.get("event") == "settings" and event.get("kind") in _FILES:
                return cast(Kind, event["kind"])
    for kind, names in _FILES.items():
        if any((folder / name).exists() for name in names):
            return kind
    return None


def runs_below(folder: Path) -> list[Path]:
    """The run folders directly in a folder, sorted by name."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return sorted(p for p in found if kind_of(p) is not None)


def load_all(folders: Sequence[Path]) -> tuple[list[Run], list[DmxError]]:
    """(The runs, why others could not be read): each is read on its own."""
    found: list[Run] = []
    errors: list[DmxError] = []
    for folder in folders:
        try:
            found.append(load(folder))
        except ConfigError:
            raise
        except Exception as error:  # a foreign file may be anything; it must not hide the others
            foreign = DataError(f"{folder} cannot be read ({type(error).__name__}: {error}).")
            errors.append(error if isinstance(error, DmxError) else foreign)
    return found, errors


def load(folder: str | Path) -> Run:
    """A run's folder as a Study, a Curriculum or a Run.

    Raises:
        ConfigError: there is no run in the folder; says what is there.
        DataError: its journal or one of its files is damaged; names it.
    """
    folder = Path(folder).absolute()
    kind = kind_of(folder) if folder.is_dir() else None
    if kind is None:
        raise _no_run(folder)
    try:
        run = {"study": Study, "curriculum": Curriculum, "run": Run}[kind].read(folder)
    except StageError as error:
        raise DataError(str(error)) from None
    if kind != "run" and run.empty:
        raise DataError(
            f"{folder / layout.JOURNAL_FILE} is missing or empty, and nothing else tells how the "
            "run went."
        )
    for _ in (run.trials, run.config, run.environment, run.complete):
        pass  # a damaged file is said now
    return run


def _no_run(folder: Path) -> ConfigError:
    if not folder.is_dir():
        what = "is a file, not a run's folder" if folder.exists() else "does not exist"
        near = [p.name for p in runs_below(folder.parent)][:8]
        hint = f"; runs there: {', '.join(near)}" if near else "; give a folder such as runs/NAME"
        return ConfigError(f"{folder} {what}{hint}.")
    if (folder / layout.CONFIG_FILE).exists():
        return ConfigError(
            f"{folder} is a checkpoint; give the run it belongs to: {folder.parent}."
        )
    inside = [p.name for p in runs_below(folder)]
    if inside:
        return ConfigError(
            f"{folder} holds several runs; give one: {', '.join(inside)}. (Without --format and "
            "--out each gets its page.)"
        )
    return ConfigError(
        f"{folder} holds no run; a run's folder has {layout.JOURNAL_FILE} or {layout.BEST_DIR}/."
    )
