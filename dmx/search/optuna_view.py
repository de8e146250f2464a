"""`optuna.journal`: a study as Optuna and optuna-dashboard know it, written from the record.

It is made anew at the start of each session and never read: what decides is `journal.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from dmx.runs import layout
from dmx.runs.study import Study
from dmx.runs.trial import OBJECTIVES, Trial, directions
from dmx.search.samplers import STATES, accuracy_at, frozen_trial, values_in
from dmx.search.space import SearchSpace

logger = logging.getLogger("dmx.study")


class OptunaView:
    """Writes the file, first what the record tells of earlier sessions.

    A storage that fails ends the view until the next session, not the study.
    """

    def __init__(self, record: Study, space: SearchSpace) -> None:
        self._space, self._ids = space, dict[int, int]()
        self._file = _ViewFile(record.folder / layout.OPTUNA_FILE)
        self._storage = JournalStorage(self._file)
        with warnings.catch_warnings(action="ignore"):
            study = optuna.create_study(
                study_name=record.name,
                storage=self._storage,
                directions=directions(record.objectives),
            )
            study.set_metric_names([OBJECTIVES[o].label for o in record.objectives])
        self._study_id = self._storage.get_study_id_from_name(record.name)
        for trial in record.trials:
            self.started(trial)
        self._file.open()

    def started(self, trial: Trial) -> None:
        """A trial and all that is known of it."""
        frozen = frozen_trial(self._space, trial)
        self._ids[trial.number] = self._storage.create_new_trial(self._study_id, frozen)

    def reported(self, trial: Trial, step: int) -> None:
        """A point of its curve; Optuna has none for several objectives."""
        if (value := accuracy_at(trial, step)) is not None:
            self._storage.set_trial_intermediate_value(self._ids[trial.number], step, value)

    def ended(self, trial: Trial) -> None:
        number, state = self._ids[trial.number], STATES[trial.status]
        if trial.error:
            self._storage.set_trial_user_attr(number, "error", trial.error)
        self._storage.set_trial_state_values(number, state, values_in(state, trial))

    def close(self) -> None:
        self._file.close()


class _ViewFile(BaseJournalBackend):
    """Optuna's log in memory, and line by line in a file that needs no fsync."""

    def __init__(self, path: Path) -> None:
        self._path, self._logs = path, list[dict[str, Any]]()
        self._file: Any = None

    def open(self) -> None:
        """Replace the file by what is known, and write on from there."""
        new = self._path.with_name(f".{self._path.name}.new")
        with self._or_give_up():
            try:
                new.write_text(_lines(self._logs), encoding="utf-8")
                new.replace(self._path)
                self._file = self._path.open("a", encoding="utf-8")
            finally:
                new.unlink(missing_ok=True)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._logs.extend(logs)
        if self._file is not None:
            with self._or_give_up():
                self._file.write(_lines(logs))
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with self._or_give_up():
                self._file.close()
            self._file = None

    @contextlib.contextmanager
    def _or_give_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            file, self._file = self._file, None
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
            logger.warning(
                "%s cannot be written (%s); the next session writes it anew.",
                self._path,
                error.strerror,
            )


def _lines(logs: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
