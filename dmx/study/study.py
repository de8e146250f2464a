"""A study: one Ray Tune run over a search space, continued after any crash."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmx.data.store import Store
from dmx.runs import layout
from dmx.runs.objectives import DEFAULT, pareto_front
from dmx.runs.study import SamplerKind, SchedulerKind, StudyResult, TrialResult, best_trial
from dmx.schema import to_dict
from dmx.search.rungs import Brackets
from dmx.search.schedulers import boundaries
from dmx.search.space import SearchSpace
from dmx.search.study_settings import SETTINGS
from dmx.storage.files import STORAGE_TIMEOUT
from dmx.storage.layout import SHARED_FILESYSTEM, StorageLayout
from dmx.study.views import StudyObserver
from dmx.training.job import Workers, share_out

if TYPE_CHECKING:  # both take seconds to import
    from dmx.search.ledger import Ledger
    from dmx.study.pbt import Population
    from dmx.study.ray_tune import RecordingScheduler


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What a study searches, and with what means.

    Attributes:
        name: folder below the run root. task: what is trained.
        space: what is searched, with overridden values already fixed.
        overrides: dotted values that hold for every trial.
        num_trials: trials in all. max_steps: optimizer steps of a full trial.
        grace_steps: steps before ASHA may stop a trial. reduction_factor: of ASHA.
        objectives: names, accuracy first (see objectives.OBJECTIVES).
        cpus_per_trial, gpus_per_trial: resources of one trial; fractions of a GPU are allowed.
        workers_per_trial: processes that share a trial's work; as many as it has whole GPUs.
        time_budget_seconds: stop then, continuable; None has no limit.
        max_failures: restarts of one trial after a dead worker or node, without getting further.
        trial_timeout_seconds: without a report for so long a trial's process is killed; None:
            see watchdog.patience.
        storage_timeout: how long to wait for a storage that is full, read-only or gone.
        reuse_actors: keep a worker process for the next trial (saves its start of seconds).
        places: object storage and local copies (see training.job.Job).
    """

    name: str
    task: str
    space: SearchSpace
    overrides: Mapping[str, Any] = field(default_factory=dict)
    num_trials: int
    max_steps: int
    grace_steps: int
    reduction_factor: float = 3.0
    scheduler: SchedulerKind = "asha"
    sampler: SamplerKind = "tpe"
    objectives: tuple[str, ...] = DEFAULT
    seed: int = 0
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    workers_per_trial: int = 1
    time_budget_seconds: float | None = None
    max_failures: int = 3
    trial_timeout_seconds: float | None = None
    storage_timeout: float = STORAGE_TIMEOUT
    reuse_actors: bool = True
    places: StorageLayout = SHARED_FILESYSTEM

    @property
    def workers(self) -> Workers:
        """The processes of one trial, and what each of them has."""
        return share_out(
            cpus=self.cpus_per_trial, gpus=self.gpus_per_trial, workers=self.workers_per_trial
        )

    def trial_config(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The plain RunConfig of the trial at `point`."""
        plain = to_dict(self.space.run_config(self.task, self.overrides, point))
        assert isinstance(plain, dict)
        return plain


def train_trials(
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
    from dmx.search.ledger import Ledger, trial_folder
    from dmx.study import ray_tune

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
        ray_tune.give_back_rooms(folder)
        while again:
            population = _population(config, ledger)
            ray_tune.fit(
                config, store, folder, slots, ledger, scheduler, observers, deadline, population
            )
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
    from dmx.study.ray_tune import RecordingScheduler

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
    from dmx.study.pbt import Population

    return Population(
        ledger,
        steps=steps,
        seed=config.seed,
        places=config.places,
        storage_timeout=config.storage_timeout,
    )
