"""`optuna.journal`: a study as Optuna and optuna-dashboard know it, written from the record.

It is made anew at the start of each session and never read: what decides is `journal.jsonl`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FixedTrial, create_trial

from dmx.runs.trial import OBJECTIVES, Trial, directions
from dmx.search.samplers import STATES, accuracies, accuracy_of
from dmx.search.space import SearchSpace

logger = logging.getLogger("dmx.study")


class OptunaView:
    """Writes the file. A storage that fails ends the view until the next session, not the study.

    Args:
        path: of the file; what is there is replaced. trials: those of earlier sessions.
        outcomes: how they ended.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        space: SearchSpace,
        objectives: Sequence[str],
        trials: Iterable[Trial],
        outcomes: Mapping[int, Mapping[str, Any]],
    ) -> None:
        self._space, self._objectives = space, objectives
        self._file = _ViewFile(path)
        self._storage = JournalStorage(self._file)
        self._ids: dict[int, int] = {}
        with warnings.catch_warnings(action="ignore"):
            self._study = optuna.create_study(
                study_name=name, storage=self._storage, directions=directions(objectives)
            )
            self._study.set_metric_names([OBJECTIVES[o].label for o in objectives])
        self._study_id = self._storage.get_study_id_from_name(name)
        for trial in trials:
            self.started(trial, outcomes.get(trial.number))
        self._file.open()

    def started(self, trial: Trial, outcome: Mapping[str, Any] | None = None) -> None:
        """A trial and all that is known of it."""
        fixed = FixedTrial(dict(trial.drawn))
        self._space.suggest(fixed)
        distributions: Mapping[str, BaseDistribution] = fixed.distributions
        frozen = create_trial(
            state=STATES[trial.status],
            params=fixed.params,
            distributions=dict(distributions),
            values=None if outcome is None else self._values(trial, outcome),
            intermediate_values=accuracies(trial) if len(self._objectives) == 1 else None,
            user_attrs={"error": trial.error} if trial.error else None,
        )
        self._ids[trial.number] = self._storage.create_new_trial(self._study_id, frozen)

    def reported(self, trial: Trial, step: int) -> None:
        """A point of its curve; Optuna has none for several objectives."""
        value = accuracy_of(trial.curve[step])
        if value is not None and len(self._objectives) == 1:
            self._storage.set_trial_intermediate_value(self._ids[trial.number], step, value)

    def ended(self, trial: Trial, outcome: Mapping[str, Any]) -> None:
        number = self._ids[trial.number]
        if trial.error:
            self._storage.set_trial_user_attr(number, "error", trial.error)
        values = self._values(trial, outcome)
        self._storage.set_trial_state_values(number, STATES[trial.status], values)

    def _values(self, trial: Trial, outcome: Mapping[str, Any]) -> list[float] | None:
        """Of a COMPLETE trial its best ones; of a PRUNED one the last, as Optuna has it itself."""
        if trial.status == "COMPLETE":
            return list(outcome.get("values") or (outcome["value"],))
        curve = accuracies(trial)
        pruned = trial.status == "PRUNED" and len(self._objectives) == 1
        return [curve[max(curve)]] if pruned and curve else None

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
        try:
            new.write_text("".join(map(_line, self._logs)), encoding="utf-8")
            new.replace(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            self._give_up(error)
        finally:
            new.unlink(missing_ok=True)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._logs.extend(logs)
        if self._file is None:
            return
        try:
            self._file.write("".join(map(_line, logs)))
            self._file.flush()
        except OSError as error:
            self.close()
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.warning(
            "%s cannot be written (%s); the next session writes it anew.",
            self._path,
            error.strerror,
        )

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                self._give_up(error)


def _line(log: dict[str, Any]) -> str:
    return json.dumps(log, separators=(",", ":")) + "\n"
