"""The driver's record of a study: the fold that every reader has, and the only writer of it.

Ray's own experiment snapshots are not used: they lag, lose trials and forget ASHA's rungs. Each
event is in the journal before anything is decided from it, and a decision is a function of the
events before it. So a study that was killed continues as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmx.errors import StageError
from dmx.runs import layout
from dmx.runs.layout import REPORT_KEYS
from dmx.runs.trial import TrialStatus, missing
from dmx.search.optuna_view import OptunaView
from dmx.search.samplers import Proposer
from dmx.search.schedulers import Comparison, Record
from dmx.search.warm_start import read_prior
from dmx.storage.journal import Journal

if TYPE_CHECKING:
    from dmx.study.study import StudyConfig


class StudyLog(Record):
    """A study that is open for writing.

    Args:
        folder: the study's folder. config: what is searched.

    Raises:
        StageError: the study is damaged, or another process works on it.
    """

    def __init__(self, folder: Path, config: StudyConfig) -> None:
        super().__init__(folder, config.num_trials)
        self.study_config = config
        self._proposer = Proposer(config, read_prior(folder, config.space))
        self.journal = Journal(folder / layout.JOURNAL_FILE, storage_timeout=config.storage_timeout)
        try:
            for event in self.journal.events:
                self.add(event)
            self._check_points()
            self._optuna = OptunaView(self, config.space)
        except BaseException:
            self.journal.close()
            raise

    def _check_points(self) -> None:
        """See that every trial was started with a point of the search space.

        Raises:
            StageError: one was not.
        """
        for place, trial in enumerate(self.trials):
            if place != trial.number or self.study_config.space.point_from(trial.drawn) is None:
                raise StageError(
                    f"{self.journal.path} tells of trial {trial.number} without a point of the "
                    "search space, so dmx did not write it; restore the journal from a backup, or "
                    "start under a new name."
                )

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.study_config.objectives

    @property
    def complete(self) -> bool:
        return len(self.outcomes) >= self.num_trials

    def begin(self) -> None:
        """Record that a session begins."""
        self._append(event="session")

    def start(self, number: int) -> dict[str, Any]:
        """The searched values of a trial; a new one is proposed and recorded.

        A proposal is a function of the seed, the number and the record alone (see samplers), so
        that a restart changes nothing.
        """
        if number not in self.by_number:
            assert number == len(self.by_number)
            drawn = self._proposer.propose(self, number)
            self._append(event="started", trial=number, params=drawn)
            self._optuna.started(self.by_number[number])
        return self.by_number[number].params

    def report(self, number: int, step: int, metrics: Mapping[str, Any]) -> bool:
        """Record one report; False when this step of this trial is already known."""
        trial = self.by_number[number]
        if step in trial.curve:
            return False
        flat = {k: metrics[k] for k in REPORT_KEYS if k in metrics}
        self._append(event="report", trial=number, step=step, metrics=flat)
        self._optuna.reported(trial, step)
        return True

    def finish(self, number: int, status: TrialStatus, error: str = "") -> None:
        """Record how a trial ended. A second ending of the same trial is ignored."""
        if number in self.outcomes:
            return
        trial = self.by_number[number]
        if status != "FAILED" and (lacking := missing(trial.values)):
            status, error = "FAILED", error or lacking
        values = list(trial.values.values())
        several = {"values": values} if len(values) > 1 and status != "FAILED" else {}
        value = values[0] if math.isfinite(values[0]) else None
        self._append(
            event="outcome", trial=number, status=status, value=value, **several, error=error
        )
        self._optuna.ended(trial)

    def compare(self, comparison: Comparison) -> None:
        """Record which trials of a population take over others at a step."""
        made = [
            {"trial": t.trial, "source": t.source, "params": dict(t.params)}
            for t in comparison.takeovers
        ]
        self._append(event="compared", step=comparison.step, exploits=made)

    def _append(self, **event: Any) -> None:
        self.journal.append(**event, time=time.time())
        self.add(self.journal.events[-1])

    def close(self) -> None:
        """Release the study's folder."""
        self._optuna.close()
        self.journal.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Ray pickles all it is given into a snapshot that nothing reads: leave nothing there."""
        return (type(None), ())
