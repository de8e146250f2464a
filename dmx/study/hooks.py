"""What Ray Tune calls during a study: whence trials come, and where their ends are recorded."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dmx.data.store import Store
from dmx.errors import ConfigError, StorageError
from dmx.runs.metrics import DEV_ACCURACY, FAILURE, RESUMABLE, SEGMENT_ENDED, STEPS
from dmx.runs.study import TrialResult, TrialStatus
from dmx.search.ledger import Ledger, trial_folder
from dmx.search.population import apply
from dmx.storage.files import is_storage_error
from dmx.study.config import StudyConfig
from dmx.study.pbt import Population, copied
from dmx.study.scheduler import NUMBER_KEY, RecordingScheduler, is_report
from dmx.study.trainable import JOB_KEY, SLICE_SECONDS
from dmx.study.watchdog import Watchdog

from ray import tune  # isort: skip
from ray.tune.search import Searcher  # isort: skip

logger = logging.getLogger("dmx.study")


class StudyObserver(Protocol):
    """Whoever shows a study: terminal, TensorBoard. Called in the driver, in order."""

    def continues(self, trials: Sequence[TrialResult]) -> None:
        """A session begins; these trials are known from earlier ones."""

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """A trial was launched (again, after a crash)."""

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        """A trial reported; each step of a trial comes once."""

    def ended(self, result: TrialResult) -> None:
        """A trial ended."""


class LedgerSearcher(Searcher):
    """Hands the ledger's trials to Ray Tune."""

    def __init__(self, config: StudyConfig, ledger: Ledger, folder: Path, store: Store) -> None:
        super().__init__(metric=DEV_ACCURACY, mode="max")
        self._config, self._ledger, self._folder, self._store = config, ledger, folder, store

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The config of the next trial; None-like FINISHED when the study has no more."""
        while (found := self._ledger.next_trial()) is not None:
            number, point = found
            try:
                return self._trial(number, self._config.trial_config(point))
            except ConfigError as error:  # only corners were checked before
                logger.warning("trial %d cannot be built: %s", number, error)
                self._ledger.finish(number, "FAILED", str(error))
        return Searcher.FINISHED

    def _trial(self, number: int, run_config: dict[str, Any]) -> dict[str, Any]:
        return {
            NUMBER_KEY: number,
            JOB_KEY: {
                "run_config": run_config,
                "data_folder": str(self._store.folder),
                "folder": str(trial_folder(self._folder, number)),
                "places": self._config.places,
                "storage_timeout": self._config.storage_timeout,
                **self._config.workers.of_job(),
                "within": str(self._folder),
                "slice_seconds": SLICE_SECONDS,
                # The study's journal is ours, so whoever still works on a trial was given up.
                "takes_over": True,
            },
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Outcomes are recorded by the callback, which knows the trial."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""


class PopulationSearcher(LedgerSearcher):
    """Hands out a population's segments, each as a trial of Ray Tune."""

    def __init__(
        self,
        config: StudyConfig,
        ledger: Ledger,
        folder: Path,
        store: Store,
        population: Population,
    ) -> None:
        super().__init__(config, ledger, folder, store)
        self._population = population

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next segment; None while the others must catch up first."""
        while (segment := self._population.next_segment()) is not None:
            number = segment.number
            try:
                found = self._trial(number, self._config.trial_config(segment.point))
            except ConfigError as error:
                logger.warning("trial %d cannot be built: %s", number, error)
                self._ledger.finish(number, "FAILED", str(error))
                self._population.ended(number)
                continue
            found[JOB_KEY]["stop_at"] = segment.until
            if segment.adopt is not None:
                found[JOB_KEY]["adopt"] = str(copied(self._folder, number, segment.adopt))
            return found
        return Searcher.FINISHED if self._population.finished else None


class Recorder(tune.Callback):
    """Tells the ledger how trials end, and shows observers what happens.

    Args:
        max_failures: processes that a trial may lose without getting any further.
        watchdog: knows which processes were killed because they hung.
        population: hears that a segment has ended, where there is one.
    """

    def __init__(
        self,
        ledger: Ledger,
        scheduler: RecordingScheduler,
        observers: tuple[StudyObserver, ...],
        *,
        max_failures: int,
        watchdog: Watchdog,
        population: Population | None = None,
    ) -> None:
        self._ledger, self._scheduler, self._observers = ledger, scheduler, observers
        self._max_failures, self._watchdog = max_failures, watchdog
        self._population = population
        self._shown = {(n, s) for n, steps in ledger.reports.items() for s in steps}
        self._lost: dict[int, int] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial runs."""
        number = trial.config[NUMBER_KEY]
        run_config = trial.config[JOB_KEY]["run_config"]
        changes = self._ledger.record.exploits.get(number, {})
        point = apply(self._ledger.point(number), changes, math.inf)
        self._show("started", number, point, run_config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A report came in."""
        number, step = trial.config[NUMBER_KEY], int(result[STEPS])
        if result.get(RESUMABLE):  # the next trial would meet the same storage
            raise StorageError(str(result[FAILURE]))
        if not is_report(result):
            return
        self._ledger.report(number, step, result)
        if (number, step) not in self._shown:
            self._shown.add((number, step))
            self._lost.pop(number, None)
            trial.run_metadata.num_failures = 0  # it got further: what counts is a row of deaths
            self._show("reported", number, self._ledger.reports[number][step])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended by itself, was stopped by the scheduler, or by the end of the session."""
        number, result = trial.config[NUMBER_KEY], trial.last_result or {}
        if self._population is not None:
            self._population.ended(number)
        if result.get(FAILURE):
            self._finish(number, "FAILED", result[FAILURE])
        elif number in self._scheduler.stopped:
            self._finish(number, "PRUNED")
        elif result.get("done") and not result.get(SEGMENT_ENDED):
            self._finish(number, "COMPLETE")
        # else: cut off by the time budget; it stays RUNNING and is continued with --resume.

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune gives the trial up: its process died too often, or once while it was starting."""
        number = trial.config[NUMBER_KEY]
        self._lost[number] = self._lost.get(number, 0) + 1
        if self._population is not None:
            self._population.ended(number)
        if max(trial.run_metadata.num_failures, self._lost[number]) <= self._max_failures:
            self._ledger.requeue(number)
            return
        self._finish(number, "FAILED", self._watchdog.hung.get(number) or _reason(trial))

    def __reduce__(self) -> tuple[Any, ...]:
        return (tune.Callback, ())  # see Ledger.__reduce__

    def _finish(self, number: int, status: TrialStatus, error: str = "") -> None:
        self._ledger.finish(number, status, error)
        result = self._ledger.result(number)
        reason = self._scheduler.stopped.get(number, "")
        self._show("ended", dataclasses.replace(result, reason=reason))

    def _show(self, event: str, *values: Any) -> None:
        """Tell the observers; a view that cannot write its file must not end the study."""
        for observer in self._observers:
            try:
                getattr(observer, event)(*values)
            except OSError as error:
                if not is_storage_error(error):
                    raise
                logger.warning("%s cannot write: %s.", type(observer).__name__, error.strerror)


class OutOfTime(tune.Stopper):
    """Ends the session at a moment of the monotonic clock; Tune's own goes by the wall clock."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial by itself."""
        return False

    def stop_all(self) -> bool:
        """Everything, once the time is over."""
        return time.monotonic() >= self._deadline


def _reason(trial: Any) -> str:
    """The last line of a trial's error file: the exception itself."""
    try:
        lines = Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines()
        return lines[-1] if lines else "it failed without a message"
    except (OSError, TypeError, AttributeError):
        return "it failed without a message"
