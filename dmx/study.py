"""A study: one Ray Tune run over a search space, continued after any crash, -> StudyResult."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from dmx import cluster  # sets Ray's environment before Ray is imported
from dmx import records as keys
from dmx.data.store import Store
from dmx.errors import ConfigError
from dmx.ledger import Ledger, trial_folder
from dmx.scheduler import NUMBER_KEY, DurableAsha, RecordingFifo
from dmx.schema import to_dict
from dmx.space import SearchSpace
from dmx.trainable import JOB_KEY, TrialTrainable

from ray import tune  # isort: skip
from ray.tune.search import Searcher  # isort: skip

logger = logging.getLogger("dmx.study")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What a study searches, and with what means.

    Attributes:
        name: folder below the run root. task: what is trained.
        space: what is searched, with overridden values already fixed.
        overrides: dotted values that hold for every trial.
        num_trials: trials in all. max_steps: optimizer steps of a full trial.
        grace_steps: steps before ASHA may stop a trial. reduction_factor: of ASHA.
        cpus_per_trial, gpus_per_trial: resources of one trial; fractions of a GPU are allowed.
        time_budget_seconds: stop then, continuable; None has no limit.
        max_failures: restarts of one trial after a dead worker or node.
        reuse_actors: keep a worker process for the next trial (saves its start of seconds).
        init_from, reinit: weights that every trial starts from (see runner.Job).
    """

    name: str
    task: str
    space: SearchSpace
    overrides: Mapping[str, Any] = field(default_factory=dict)
    num_trials: int
    max_steps: int
    grace_steps: int
    reduction_factor: float = 3.0
    scheduler: Literal["asha", "none"] = "asha"
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = 0
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    time_budget_seconds: float | None = None
    max_failures: int = 3
    reuse_actors: bool = True
    init_from: str | None = None
    reinit: tuple[str, ...] = ()

    def trial_config(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The plain RunConfig of the trial at `point`."""
        plain = to_dict(self.space.run_config(self.task, self.overrides, point))
        assert isinstance(plain, dict)
        return plain


class StudyObserver(Protocol):
    """Whoever shows a study: terminal, TensorBoard. Called in the driver, in order."""

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """A trial was launched (again, after a crash)."""

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        """A trial reported; each step of a trial comes once."""

    def ended(self, result: keys.TrialResult) -> None:
        """A trial ended."""


class _LedgerSearcher(Searcher):
    """Hands the ledger's trials to Ray Tune."""

    def __init__(self, config: StudyConfig, ledger: Ledger, folder: Path, store: Store) -> None:
        super().__init__(metric=keys.DEV_ACCURACY, mode="max")
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
                "threads": max(int(self._config.cpus_per_trial), 1),
                "init_from": self._config.init_from,
                "reinit": self._config.reinit,
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


class _Recorder(tune.Callback):
    """Tells the ledger how trials end, and shows observers what happens."""

    def __init__(
        self,
        ledger: Ledger,
        scheduler: DurableAsha | RecordingFifo,
        observers: tuple[StudyObserver, ...],
    ) -> None:
        self._ledger, self._scheduler, self._observers = ledger, scheduler, observers
        self._shown = {(n, s) for n, steps in ledger.reports.items() for s in steps}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial runs."""
        number = trial.config[NUMBER_KEY]
        point = next((r.params for r in self._ledger.results() if r.number == number), {})
        for observer in self._observers:
            observer.started(number, point, trial.config[JOB_KEY]["run_config"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A report came in."""
        number, step = trial.config[NUMBER_KEY], int(result[keys.STEPS])
        if keys.FAILURE in result:
            return
        self._ledger.report(number, step, result)
        if (number, step) not in self._shown:
            self._shown.add((number, step))
            for observer in self._observers:
                observer.reported(number, self._ledger.reports[number][step])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended by itself, was stopped by the scheduler, or by the end of the session."""
        number, result = trial.config[NUMBER_KEY], trial.last_result or {}
        if result.get(keys.FAILURE):
            self._finish(number, "FAILED", result[keys.FAILURE])
        elif number in self._scheduler.stopped:
            self._finish(number, "PRUNED")
        elif result.get("done"):
            self._finish(number, "COMPLETE")
        # else: cut off by the time budget; it stays RUNNING and is continued with --resume.

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process died again and again."""
        self._finish(trial.config[NUMBER_KEY], "FAILED", _reason(trial))

    def __reduce__(self) -> tuple[Any, ...]:
        return (tune.Callback, ())  # see Ledger.__reduce__

    def _finish(self, number: int, status: keys.TrialStatus, error: str = "") -> None:
        self._ledger.finish(number, status, error)
        result = next(r for r in self._ledger.results() if r.number == number)
        for observer in self._observers:
            observer.ended(result)


def _reason(trial: Any) -> str:
    """The last line of a trial's error file: the exception itself."""
    try:
        lines = Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines()
        return lines[-1] if lines else "it failed without a message"
    except (OSError, TypeError, AttributeError):
        return "it failed without a message"


def run_study(
    config: StudyConfig,
    store: Store,
    folder: Path,
    *,
    slots: int,
    observers: tuple[StudyObserver, ...] = (),
) -> keys.StudyResult:
    """Run the trials that are still to run, in the Ray cluster that is connected.

    Args:
        config: the study. store: its data. folder: where all files go.
        slots: trials at once. observers: see StudyObserver.
    """
    ledger = Ledger(
        folder,
        name=config.name,
        space=config.space,
        num_trials=config.num_trials,
        seed=config.seed,
        sampler=config.sampler,
    )
    try:
        scheduler = _scheduler(config, ledger)
        _catch_up(ledger, scheduler, observers)
        if ledger.remaining():
            _fit(config, store, folder, slots, ledger, scheduler, observers)
        trials = ledger.results()
        return keys.StudyResult(
            name=config.name,
            folder=folder,
            trials=trials,
            best=keys.best_trial(trials),
            complete=ledger.remaining() == 0,
        )
    finally:
        ledger.close()


def _catch_up(
    ledger: Ledger,
    scheduler: DurableAsha | RecordingFifo,
    observers: tuple[StudyObserver, ...],
) -> None:
    """Carry out what was decided, and show what was recorded, when a crash came in between."""
    last = ledger.journal.events[-1] if ledger.journal.events else {}
    ended = [last["trial"]] if last.get("event") == "outcome" else []
    for number in sorted(scheduler.stopped - ledger.outcomes.keys()):
        ledger.finish(number, "PRUNED")
        ended.append(number)
    ledger.forget_ended()
    for observer in observers:
        if last.get("event") == "report":
            observer.reported(last["trial"], last["metrics"])
        for result in ledger.results():
            if result.number in ended:
                observer.ended(result)


def _scheduler(config: StudyConfig, ledger: Ledger) -> DurableAsha | RecordingFifo:
    if config.scheduler == "none":
        return RecordingFifo(ledger)
    return DurableAsha(
        ledger,
        max_steps=config.max_steps,
        grace_steps=min(config.grace_steps, config.max_steps),
        reduction_factor=config.reduction_factor,
    )


def _fit(
    config: StudyConfig,
    store: Store,
    folder: Path,
    slots: int,
    ledger: Ledger,
    scheduler: DurableAsha | RecordingFifo,
    observers: tuple[StudyObserver, ...],
) -> None:
    storage = folder.absolute() / "ray"
    session = f"session-{int(time.time() * 1000)}"
    tuner = tune.Tuner(
        tune.with_resources(
            TrialTrainable, {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
        ),
        tune_config=tune.TuneConfig(
            search_alg=_LedgerSearcher(config, ledger, folder.absolute(), store),
            scheduler=scheduler,
            num_samples=ledger.remaining(),
            max_concurrent_trials=slots,
            time_budget_s=config.time_budget_seconds,
            reuse_actors=config.reuse_actors,
        ),
        run_config=tune.RunConfig(
            name=session,
            storage_path=str(storage),
            callbacks=[_Recorder(ledger, scheduler, observers)],
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            verbose=0,
        ),
    )
    with cluster.terminate_like_interrupt(), _own_interrupt_handler():
        tuner.fit()
    shutil.rmtree(storage, ignore_errors=True)  # Ray's own bookkeeping; ours is the journal


@contextlib.contextmanager
def _own_interrupt_handler() -> Iterator[None]:
    """Afterwards Ctrl-C means what it meant before: Ray Tune leaves a handler that swallows it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
