"""A study: what is searched and by what means, what is trained next, and its run on Ray."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmx.data.store import Manifest, Store
from dmx.errors import ConfigError
from dmx.format import settings_text
from dmx.runs import layout
from dmx.runs.study import SamplerKind, SchedulerKind, Study, Takeover
from dmx.runs.trial import DEFAULT
from dmx.schema import to_dict
from dmx.search.rungs import SuccessiveHalving
from dmx.search.schedulers import Comparison, Idle, PopulationBasedTraining, Scheduler
from dmx.search.space import SearchSpace
from dmx.storage.files import STORAGE_TIMEOUT, copy_folder, persist, put_back
from dmx.storage.remote import SHARED_FILESYSTEM, StorageLayout
from dmx.study.views import StudyObserver
from dmx.training.job import Workers

if TYPE_CHECKING:
    from dmx.search.study_log import StudyLog

logger = logging.getLogger("dmx.study")
SLICE_SECONDS = 5.0
"""Tune hears so often of a trial, and can stop it then without losing a step."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What a study searches, and with what means.

    Attributes:
        space: what is searched, with overridden values already fixed.
        overrides: dotted values that hold for every trial.
        num_trials: trials in all. max_steps: optimizer steps of a full trial.
        grace_steps: steps before ASHA may stop a trial, or between a population's comparisons.
        objectives: names, accuracy first (see objectives.OBJECTIVES).
        workers: the processes of one trial, and what each has; part of a GPU is allowed.
        time_budget_seconds: stop then, continuable; None has no limit.
        max_failures: restarts of one trial after a dead worker or node, without getting further.
        trial_timeout_seconds: without a report for so long a trial's process is killed; None:
            see ray_tune.hang_timeout.
        storage_timeout: how long to wait for a storage that is full, read-only or gone.
        reuse_actors: keep a worker process for the next trial (saves its start of seconds).
        places: object storage and local copies (see training.job.Job).
        reason: one sentence of why it trains so much.
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
    workers: Workers = field(default_factory=Workers)
    time_budget_seconds: float | None = None
    max_failures: int = 3
    trial_timeout_seconds: float | None = None
    storage_timeout: float = STORAGE_TIMEOUT
    reuse_actors: bool = True
    places: StorageLayout = SHARED_FILESYSTEM
    reason: str = ""

    def trial_config(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The plain RunConfig of the trial at `point`."""
        plain = to_dict(self.space.run_config(self.task, self.overrides, point))
        assert isinstance(plain, dict)
        return plain

    def make_scheduler(self) -> Scheduler:
        """What decides which trials are trained, and how far."""
        if self.scheduler == "none":
            return Scheduler(self)
        return PopulationBasedTraining(self) if self.scheduler == "pbt" else SuccessiveHalving(self)

    def settings(
        self, data: Manifest, warm_start: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """All that decides a trial: what a later session must have equal to continue the study."""
        names = ("task", "num_trials", "max_steps", "grace_steps", "reduction_factor")
        return {
            **{name: getattr(self, name) for name in (*names, "scheduler", "sampler", "seed")},
            "attention": self.space.attention,
            "overrides": dict(self.overrides),
            **self.space.plain(self.overrides),
            "data": data.label,
            "data_checksum": data.checksum,
            **({"objectives": list(self.objectives)} if len(self.objectives) > 1 else {}),
            **({} if warm_start is None else {"warm_start": dict(warm_start)}),
        }


class SegmentQueue:
    """A study's segments as jobs: proposals are made, and comparisons carried out, on the way.

    Killed at any moment, the next session finds a comparison either unmade, and makes the same one
    again (no trial has trained on), or recorded, with the copies that it needs.
    """

    def __init__(self, log: StudyLog, scheduler: Scheduler, store: Store) -> None:
        self.config, self.log, self.scheduler = log.study_config, log, scheduler
        self._store = store

    def next(self) -> tuple[int, dict[str, Any]] | Idle:
        """(trial, fields of its Job) of the next segment, which is in flight from now on."""
        log = self.log
        if self.scheduler.proposes_at_once:
            for number in range(len(log.by_number), self.config.num_trials):
                log.start(number)
        while (comparison := self.scheduler.comparison(log)) is not None:
            self._carry_out(comparison)
        while not isinstance(segment := self.scheduler.next_segment(log), Idle):
            number = segment.trial
            log.start(number)
            params = log.by_number[number].params_at(segment.until)
            try:
                job = self._job(number, self.config.trial_config(params))
            except ConfigError as error:  # only corners were checked before
                logger.warning("trial %d cannot be built: %s", number, error)
                log.finish(number, "FAILED", str(error))
                continue
            if segment.until < self.config.max_steps:
                job["stop_at"] = segment.until
            if segment.adopt is not None:
                job["adopt"] = str(adopted(log.folder, number, segment.adopt))
            log.journal.check()  # a driver that was taken over hands nothing out
            log.in_flight.add(number)
            return number, job
        return segment

    def _job(self, number: int, run_config: dict[str, Any]) -> dict[str, Any]:
        folder = self.log.folder.absolute()
        return {
            "run_config": run_config,
            "data_folder": str(self._store.folder),
            "folder": str(layout.trial_folder(folder, number)),
            "places": self.config.places,
            "storage_timeout": self.config.storage_timeout,
            "workers": self.config.workers,
            "within": str(folder),
            "slice_seconds": SLICE_SECONDS,
            # The study's journal is ours, so whoever still works on a trial was given up.
            "takes_over": True,
        }

    def _carry_out(self, comparison: Comparison) -> None:
        """Copy the checkpoints that are taken over, then record it."""
        for takeover in comparison.takeovers:
            persist(
                functools.partial(self._copy, takeover),
                self.log.folder,
                seconds=self.config.storage_timeout,
            )
        self.log.compare(comparison)
        for t in comparison.takeovers:
            now = settings_text(t.params)
            logger.info("step %d: trial %d takes over trial %d: %s", t.step, t.trial, t.source, now)

    def _copy(self, takeover: Takeover) -> None:
        places, folder = self.config.places, self.log.folder
        source = layout.trial_folder(folder, takeover.source) / layout.LAST_DIR
        places.pull(source)
        put_back(source)
        target = adopted(folder, takeover.trial, takeover.step)
        copy_folder(source, target)
        places.push(target)


def adopted(folder: Path, trial: int, step: int) -> Path:
    """Where the checkpoint lies that a trial takes over at a step."""
    return layout.trial_folder(folder, trial) / f"from-{step:08d}"


def train_trials(
    config: StudyConfig,
    store: Store,
    folder: Path,
    *,
    slots: int,
    observers: tuple[StudyObserver, ...] = (),
) -> Study:
    """Run the trials that are still to run, `slots` at once, in the connected Ray cluster.

    Raises:
        StageError: the study is damaged, or another process works on it.
        StorageError: its storage stayed full, read-only or away; it can be continued.
    """
    from dmx.search.study_log import StudyLog  # Optuna and Ray Tune take seconds to import
    from dmx.study import ray_tune

    log = StudyLog(folder, config)
    try:
        scheduler = config.make_scheduler()
        catch_up(log, scheduler, observers)
        deadline = time.monotonic() + (config.time_budget_seconds or math.inf)
        ray_tune.give_back_rooms(folder)
        if not log.complete:
            log.begin()
            segments = SegmentQueue(log, scheduler, store)
            ray_tune.fit(segments, observers, slots=slots, deadline=deadline)
        best = log.best_trial
        if best is not None and best.folder is not None and config.places.run_url is not None:
            config.places.pull(best.folder / layout.BEST_DIR)  # it ran on any node
        for number in log.outcomes:  # a process that was killed may have left it aside
            put_back(layout.trial_folder(folder, number) / layout.BEST_DIR)
        return log
    finally:
        log.close()


def catch_up(log: StudyLog, scheduler: Scheduler, observers: tuple[StudyObserver, ...]) -> None:
    """Carry out what was decided, and show what was recorded, when a crash came in between."""
    events = [e for e in log.journal.events if e.get("event") != "settings"]
    last = events[-1] if events else {}
    ended = [last["trial"]] if last.get("event") == "outcome" else []
    for number, reason in sorted(scheduler.stopped(log).items()):
        log.by_number[number].reason = reason
        if number not in log.outcomes:
            log.finish(number, "PRUNED")
            ended.append(number)
    for observer in observers:
        observer.continues([t for t in log.trials if t.number not in ended])
        if last.get("event") == "report":
            observer.reported(last["trial"], last["metrics"])
        for number in sorted(ended):
            observer.ended(log.by_number[number])
