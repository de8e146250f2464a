"""What Ray Tune calls during a study: whence trials come, what runs them, and what is recorded."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import PlacementGroupID, tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from dmx import terminal
from dmx.cluster import capacity
from dmx.cluster.gang import Gang, runner_of
from dmx.data.store import Store
from dmx.errors import ConfigError, DmxError, StorageError
from dmx.process import own_signals, terminate_like_interrupt
from dmx.runs.metrics import DEV_ACCURACY, FAILURE, RESUMABLE, SEGMENT_ENDED, STEPS, UNDER_WAY
from dmx.runs.study import TrialStatus
from dmx.search.ledger import Ledger, trial_folder
from dmx.search.rungs import Brackets
from dmx.search.schedulers import apply
from dmx.storage.files import is_storage_error
from dmx.study.pbt import Population, copied
from dmx.study.views import StudyObserver
from dmx.training.job import Job
from dmx.training.runner import ProcessState, Runner

if TYPE_CHECKING:
    from dmx.study.study import StudyConfig

logger = logging.getLogger("dmx.study")
JOB_KEY = "job"
SLICE_SECONDS = 5.0
"""Tune hears so often of a trial, and can stop it then without losing a step."""


class TrialTrainable(tune.Trainable):
    """Runs one trial in a Ray actor.

    The runner writes its checkpoints straight into the trial's folder on the shared storage, so a
    trial continues wherever Ray starts it again: after a dead worker, a lost node, or in a new
    session of the study. Ray's own checkpoints serve only schedulers that pause or copy trials.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Note the job. It is built in the first step: Tune gives up a trial that dies in here."""
        terminal.setup_logging()
        capacity.hide_unreserved_gpus()
        self._state = ProcessState.now()
        self._job = Job(**config[JOB_KEY])
        self._runner: Runner | Gang | None = None

    @property
    def runner(self) -> Runner | Gang:
        """The run, built or continued from its last checkpoint."""
        if self._runner is None:
            self._runner = runner_of(self._job)
        return self._runner

    def step(self) -> dict[str, Any]:
        """Train to the next evaluation and report, or for one slice: then there is no report."""
        return self.runner.step()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """For schedulers that pause or copy trials (PBT)."""
        self.runner.save_into(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """For schedulers that pause or copy trials (PBT)."""
        self.runner.load_from(Path(checkpoint))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Reuse the process for another trial; everything of the old one is dropped."""
        self.cleanup()
        self._state.restore()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Keep what was trained, and free what the run holds."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None


class TrialRoom(tune.PlacementGroupFactory):
    """The resources of a trial, in a placement group whose name tells the study.

    Ray removes a group with the job that created it, not with the process: a curriculum's search
    whose process dies is started again within the same job, and finds its trials' room taken.
    """

    def __init__(self, resources: dict[str, float], folder: Path) -> None:
        super().__init__([resources])
        self._study = _study_name(folder)

    def to_placement_group(self) -> PlacementGroup:
        """A new group; Ray refuses a name that it knows."""
        return placement_group(
            self.bundles, strategy=self.strategy, name=f"{self._study}{uuid.uuid4().hex}"
        )


def give_back_rooms(folder: Path) -> None:
    """Remove the groups that an earlier process of the study left; the claim keeps others out."""
    for group_id, group in ray.util.placement_group_table().items():
        if group["name"].startswith(_study_name(folder)) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group_id))))


def _study_name(folder: Path) -> str:
    return f"dmx-trial-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]}-"


NUMBER_KEY = "trial_number"


def is_report(result: Mapping[str, Any]) -> bool:
    """Whether it tells of an evaluation, and not of a failure or of training that goes on."""
    return STEPS in result and FAILURE not in result and UNDER_WAY not in result


class RecordingScheduler(TrialScheduler):
    """Records every report; Ray decides nothing.

    Args:
        brackets: what stops trials; None stops none.
    """

    def __init__(self, ledger: Ledger, brackets: Brackets | None = None) -> None:
        self._ledger, self._brackets = ledger, brackets
        for number, step, metrics in ledger.record.history():
            self._decide(number, step, metrics)

    @property
    def stopped(self) -> Mapping[int, str]:
        """Trial -> why it was stopped."""
        return {} if self._brackets is None else self._brackets.stopped

    def _decide(self, number: int, step: int, metrics: Mapping[str, Any]) -> bool:
        value = metrics.get(DEV_ACCURACY)
        if self._brackets is None or value is None:
            return True
        return self._brackets.report(number, step, value)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        pass

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        pass

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        pass

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Record the report, then decide; one known from before a crash decides nothing new."""
        if FAILURE in result:
            return self.STOP
        if not is_report(result):
            return self.CONTINUE
        number, step = trial.config[NUMBER_KEY], int(result[STEPS])
        if self._ledger.report(number, step, result):
            self._decide(number, step, result)
        return self.STOP if number in self.stopped else self.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """The last report reaches a scheduler only here."""
        number = trial.config[NUMBER_KEY]
        if is_report(result) and self._ledger.report(number, int(result[STEPS]), result):
            self._decide(number, int(result[STEPS]), result)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The first trial that waits."""
        for trial in tune_controller.get_trials():
            if trial.status in (Trial.PENDING, Trial.PAUSED):
                return trial
        return None

    def debug_string(self) -> str:
        """For Ray's own status output."""
        return "dmx decides"


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


LEAST_SECONDS = 1800.0
"""Nothing is called a hang sooner, unless the user says so: a first step may compile for long."""
TIMES_MEDIAN = 10.0
START_SECONDS = 120.0
"""A process has at least so long until its first report: it imports, opens data, may compile."""
_LOOK_SECONDS = 1.0


def patience(intervals: list[float], fixed: float | None) -> float:
    """Seconds without a report after which a trial hangs.

    Args:
        intervals: seconds between reports of the study so far. fixed: what the user said, or None.
    """
    if fixed is not None:
        return fixed
    usual = statistics.median(intervals) if intervals else 0.0
    return max(LEAST_SECONDS, TIMES_MEDIAN * usual)


class Watchdog(tune.Callback):
    """Kills the process of a trial that has not reported for too long; Tune then restarts it.

    Args:
        timeout_seconds: see patience. kill: ends an actor's process; Ray's own in the end sends
            SIGKILL, which a stopped process cannot ignore either. clock: monotonic seconds.
    """

    def __init__(
        self,
        timeout_seconds: float | None,
        *,
        kill: Callable[[Any], None] = ray.kill,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_seconds, self._kill, self._clock = timeout_seconds, kill, clock
        self._since: dict[Any, float] = {}  # it was last heard of
        self._reported: dict[Any, float] = {}
        self._started: set[Any] = set()
        self._intervals: list[float] = []
        self._looked = clock()
        self.hung: dict[int, str] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its time runs."""
        self._since[trial] = self._reported[trial] = self._clock()
        self._started.add(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """It is alive; the last thousand intervals say what is usual."""
        now = self._clock()
        self._started.discard(trial)
        self._since[trial] = now
        if is_report(result):
            if (since := self._reported.get(trial)) is not None:
                self._intervals = [*self._intervals[-999:], now - since]
            self._reported[trial] = now
            self.hung.pop(trial.config[NUMBER_KEY], None)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its time is over."""
        self._since.pop(trial, None)
        self._reported.pop(trial, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its time is over."""
        self._since.pop(trial, None)
        self._reported.pop(trial, None)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It waits for a process."""
        self._since.pop(trial, None)
        self._reported.pop(trial, None)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look at all running trials; Tune calls this many times a second."""
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        usual = patience(self._intervals, self._timeout_seconds)
        for trial, since in list(self._since.items()):
            actor = trial.temporary_state.ray_actor
            limit = max(usual, START_SECONDS) if trial in self._started else usual
            if now - since <= limit or actor is None:
                continue
            number = trial.config[NUMBER_KEY]
            self.hung[number] = f"it made no progress for {limit:.0f} s"
            logger.warning(
                "trial %d made no progress for %.0f s; its process is killed and it continues "
                "from its last checkpoint.",
                number,
                limit,
            )
            del self._since[trial]  # the kill is answered by on_trial_recover or on_trial_error
            self._kill(actor)

    def __reduce__(self) -> tuple[Any, ...]:
        return (tune.Callback, ())  # see Ledger.__reduce__


def _measures_process(config: StudyConfig) -> bool:
    """A process's peak memory never falls: without a GPU, each trial needs one of its own."""
    return "memory" in config.objectives and not config.gpus_per_trial


def fit(
    config: StudyConfig,
    store: Store,
    folder: Path,
    slots: int,
    ledger: Ledger,
    scheduler: RecordingScheduler,
    observers: tuple[StudyObserver, ...],
    deadline: float,
    population: Population | None,
) -> None:
    """Run the trials that are left, until the deadline (of time.monotonic)."""
    storage = folder.absolute() / "ray"
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
    with terminate_like_interrupt(), own_signals():  # Tune's swallows a later Ctrl-C
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
