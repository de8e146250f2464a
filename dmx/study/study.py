"""A study: one Ray Tune run over a search space, continued after any crash, -> StudyResult."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
import uuid
from pathlib import Path

from dmx.cluster import connection
from dmx.data.store import Store
from dmx.errors import DmxError
from dmx.process import own_signals
from dmx.runs import layout
from dmx.runs.objectives import pareto_front
from dmx.runs.study import StudyResult, TrialResult, best_trial
from dmx.search.ledger import Ledger, trial_folder
from dmx.search.population import boundaries
from dmx.search.rungs import Brackets
from dmx.search.study_settings import SETTINGS
from dmx.study.config import StudyConfig
from dmx.study.hooks import (
    LedgerSearcher,
    OutOfTime,
    PopulationSearcher,
    Recorder,
    StudyObserver,
)
from dmx.study.pbt import Population
from dmx.study.scheduler import RecordingScheduler
from dmx.study.trainable import TrialRoom, TrialTrainable, give_back_rooms
from dmx.study.watchdog import Watchdog

from ray import tune  # isort: skip

__all__ = ["StudyConfig", "StudyObserver", "run_study"]


def run_study(
    config: StudyConfig,
    store: Store,
    folder: Path,
    *,
    slots: int,
    observers: tuple[StudyObserver, ...] = (),
) -> StudyResult:
    """Run the trials that are still to run, in the Ray cluster that is connected.

    Args:
        config: the study. store: its data. folder: where all files go.
        slots: trials at once. observers: see StudyObserver.

    Raises:
        StageError: the study is damaged, or another process works on it.
        StorageError: its storage stayed full, read-only or away; it can be continued.
    """
    ledger = Ledger(
        folder,
        name=config.name,
        space=config.space,
        num_trials=config.num_trials,
        seed=config.seed,
        sampler=config.sampler,
        storage_timeout=config.storage_timeout,
        objectives=config.objectives,
    )
    try:
        scheduler = _scheduler(config, ledger)
        _catch_up(ledger, scheduler, observers)
        again = ledger.remaining() > 0
        if again:
            ledger.record.begin()
        deadline = time.monotonic() + (config.time_budget_seconds or math.inf)
        give_back_rooms(folder)
        while again:
            _fit(config, store, folder, slots, ledger, scheduler, observers, deadline)
            # Only what Tune gave up too soon is left: it is run in another round.
            again = 0 < ledger.num_interrupted == ledger.remaining()
            again = again and time.monotonic() < deadline
        trials = ledger.results()
        front = _front(config, trials)
        best = _best(trials, front)
        if best is not None and config.places.run_url is not None:  # it ran on any node
            config.places.pull(trial_folder(folder, best.number) / layout.BEST_DIR)
            trials = ledger.results()
            best = _best(trials, front)
        return StudyResult(
            name=config.name,
            folder=folder,
            trials=trials,
            best=best,
            complete=ledger.remaining() == 0,
            front=front,
        )
    finally:
        ledger.close()


def _front(config: StudyConfig, trials: tuple[TrialResult, ...]) -> tuple[int, ...]:
    """The Pareto front of a study with several objectives; () where there is one."""
    if len(config.objectives) == 1:
        return ()
    whole = [t for t in trials if t.status == "COMPLETE"]
    points = {t.number: [t.values[o] for o in config.objectives] for t in whole}
    return pareto_front(config.objectives, points)


def _best(trials: tuple[TrialResult, ...], front: tuple[int, ...]) -> TrialResult | None:
    """The most accurate trial; of the front, where there is one."""
    return best_trial(tuple(t for t in trials if t.number in front) or trials)


def _catch_up(
    ledger: Ledger,
    scheduler: RecordingScheduler,
    observers: tuple[StudyObserver, ...],
) -> None:
    """Carry out what was decided, and show what was recorded, when a crash came in between."""
    events = [e for e in ledger.record.journal.events if e.get("event") != SETTINGS]
    last = events[-1] if events else {}
    ended = [last["trial"]] if last.get("event") == "outcome" else []
    for number in sorted(scheduler.stopped.keys() - ledger.outcomes.keys()):
        ledger.finish(number, "PRUNED")
        ended.append(number)
    ledger.forget_ended()
    for observer in observers:
        observer.continues([r for r in ledger.results() if r.number not in ended])
        if last.get("event") == "report":
            observer.reported(last["trial"], last["metrics"])
        for result in ledger.results():
            if result.number in ended:
                reason = scheduler.stopped.get(result.number, "")
                observer.ended(dataclasses.replace(result, reason=reason))


def _scheduler(config: StudyConfig, ledger: Ledger) -> RecordingScheduler:
    if config.scheduler in ("none", "pbt"):
        return RecordingScheduler(ledger)
    brackets = Brackets(
        config.scheduler,
        grace_steps=min(config.grace_steps, config.max_steps),
        max_steps=config.max_steps,
        reduction_factor=config.reduction_factor,
    )
    return RecordingScheduler(ledger, brackets)


def _population(config: StudyConfig, ledger: Ledger) -> Population | None:
    """Who trains whom, for population based training."""
    if config.scheduler != "pbt":
        return None
    run = config.space.run_config(config.task, config.overrides, config.space.first())
    steps = boundaries(
        every=config.grace_steps,
        evaluation=run.train.eval_every_steps,
        max_steps=config.max_steps,
    )
    return Population(
        ledger,
        steps=steps,
        seed=config.seed,
        places=config.places,
        storage_timeout=config.storage_timeout,
    )


def _measures_process(config: StudyConfig) -> bool:
    """A process's peak memory never falls: without a GPU, each trial needs one of its own."""
    return "memory" in config.objectives and not config.gpus_per_trial


def _fit(
    config: StudyConfig,
    store: Store,
    folder: Path,
    slots: int,
    ledger: Ledger,
    scheduler: RecordingScheduler,
    observers: tuple[StudyObserver, ...],
    deadline: float,
) -> None:
    storage = folder.absolute() / "ray"
    population = _population(config, ledger)
    parts = (config, ledger, folder.absolute(), store)
    search = PopulationSearcher(*parts, population) if population else LedgerSearcher(*parts)
    session = f"session-{uuid.uuid4().hex}"
    watchdog = Watchdog(config.trial_timeout_seconds)
    recorder = Recorder(
        ledger,
        scheduler,
        observers,
        max_failures=config.max_failures,
        watchdog=watchdog,
        population=population,
    )
    tuner = tune.Tuner(
        tune.with_resources(TrialTrainable, TrialRoom(_trial_resources(config), folder)),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=-1,  # the searcher says when it is over
            max_concurrent_trials=slots,
            reuse_actors=config.reuse_actors and not _measures_process(config),
        ),
        run_config=tune.RunConfig(
            name=session,
            storage_path=str(storage),
            stop=OutOfTime(deadline),
            callbacks=[recorder, watchdog],
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            verbose=0,
        ),
    )
    with connection.terminate_like_interrupt(), own_signals():  # Tune's swallows a later Ctrl-C
        try:
            tuner.fit()
        except Exception as error:
            raise _own_error(error) from None
    shutil.rmtree(storage, ignore_errors=True)  # Ray's own bookkeeping; ours is the journal


def _own_error(error: BaseException) -> BaseException:
    """What a hook of ours raised, from under Tune's wrapping; anything else as it is."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, DmxError):
        found = found.__cause__ or found.__context__
    return found or error


def _trial_resources(config: StudyConfig) -> dict[str, float]:
    """Of the trial's actor. Several workers reserve theirs themselves, and the actor only waits.

    A byte of memory stands for nothing, since Tune refuses a trial that asks for nothing.
    """
    if config.workers.count > 1:
        return {"memory": 1}
    return {"CPU": config.cpus_per_trial, "GPU": config.gpus_per_trial}
