"""A study on Ray Tune, which trains segments and decides nothing.

Tune asks the searcher for the next segment, and for each result that comes in whether its trial
goes on; both ask the study's record and its scheduler.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import statistics
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import PlacementGroupID, tune
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from dmx import terminal
from dmx.cluster import capacity
from dmx.cluster.gang import Gang, runner_of
from dmx.errors import DmxError, StorageError
from dmx.process import own_signals, terminate_like_interrupt
from dmx.runs.layout import DEV_ACCURACY, FAILURE, RESUMABLE, SEGMENT_ENDED, STEPS, UNDER_WAY
from dmx.runs.trial import TrialStatus
from dmx.search.schedulers import DONE, Idle, Scheduler
from dmx.search.study_log import StudyLog
from dmx.storage.files import is_storage_error
from dmx.study.views import StudyObserver
from dmx.training.job import Job
from dmx.training.runner import ProcessState, Runner

if TYPE_CHECKING:
    from dmx.study.study import SegmentQueue, StudyConfig

logger = logging.getLogger("dmx.study")
JOB_KEY = "job"
NUMBER_KEY = "trial_number"


def is_report(result: Mapping[str, Any]) -> bool:
    """Whether it tells of an evaluation, and not of a failure or of training that goes on."""
    return STEPS in result and FAILURE not in result and UNDER_WAY not in result


class TrialTrainable(tune.Trainable):
    """Runs one trial in a Ray actor.

    The runner writes its checkpoints straight into the trial's folder on the shared storage, so a
    trial continues wherever Ray starts it again: after a dead worker, a lost node, or in a new
    session of the study.
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
        """Nothing: the runner writes its own, and nothing is restored from Ray's."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass

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


class _InDriver:
    """Ray pickles all it is given into a snapshot that nothing reads: leave nothing there."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())


class SegmentSearcher(_InDriver, Searcher):
    """Hands out segments, each as a trial of Ray Tune."""

    def __init__(self, segments: SegmentQueue) -> None:
        super().__init__(metric=DEV_ACCURACY, mode="max")
        self._segments = segments

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """None while the trials that train must come further first."""
        found = self._segments.next()
        if isinstance(found, Idle):
            return Searcher.FINISHED if found is DONE else None
        number, job = found
        return {NUMBER_KEY: number, JOB_KEY: job}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Outcomes are recorded by the Recorder, which knows the trial."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        pass


class Decisions(_InDriver, tune.Stopper):
    """Records every report, and stops what the study's scheduler stops.

    Tune asks it before anything else hears of a result, the trial's last one included.

    Args:
        deadline: of time.monotonic, when the session ends; Tune's own goes by the wall clock.
    """

    def __init__(self, log: StudyLog, scheduler: Scheduler, deadline: float = math.inf) -> None:
        self._log, self._scheduler, self._deadline = log, scheduler, deadline

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """A report that is known from before a crash decides nothing new."""
        if not is_report(result):
            return FAILURE in result
        number, step = result["config"][NUMBER_KEY], int(result[STEPS])
        self._log.report(number, step, result)
        return not self._scheduler.keep_training(self._log, number, step)

    def stop_all(self) -> bool:
        return time.monotonic() >= self._deadline


class Recorder(_InDriver, tune.Callback):
    """Records how segments and trials end, and shows observers what happens.

    Args:
        max_failures: processes that a trial may lose without getting any further.
        watchdog: knows which processes were killed because they hung.
    """

    def __init__(
        self,
        log: StudyLog,
        scheduler: Scheduler,
        observers: tuple[StudyObserver, ...],
        *,
        max_failures: int,
        watchdog: Watchdog,
    ) -> None:
        self._log, self._scheduler, self._observers = log, scheduler, observers
        self._max_failures, self._watchdog = max_failures, watchdog
        self._shown = {(trial, step) for trial, step, _, _ in log.history}
        self._lost: dict[int, int] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config[NUMBER_KEY]
        params = self._log.by_number[number].params_at(math.inf)
        self._show("started", number, params, trial.config[JOB_KEY]["run_config"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A report came in, and Decisions has recorded it."""
        if result.get(RESUMABLE):  # the next trial would meet the same storage
            raise StorageError(str(result[FAILURE]))
        if not is_report(result):
            return
        number, step = trial.config[NUMBER_KEY], int(result[STEPS])
        if (number, step) not in self._shown:
            self._shown.add((number, step))
            self._lost.pop(number, None)
            trial.run_metadata.num_failures = 0  # it got further: what counts is a row of deaths
            self._show("reported", number, self._log.by_number[number].curve[step])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A segment ended by itself, was stopped by the scheduler, or by the end of the session."""
        number, result = trial.config[NUMBER_KEY], trial.last_result or {}
        self._log.in_flight.discard(number)
        if result.get(FAILURE):
            self._finish(number, "FAILED", result[FAILURE])
        elif number in self._scheduler.stopped(self._log):
            self._finish(number, "PRUNED")
        elif result.get("done") and not result.get(SEGMENT_ENDED):
            self._finish(number, "COMPLETE")
        # else: cut off by the time budget; it stays RUNNING and is continued with --resume.

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune gives the trial up: its process died too often, or once while it was starting."""
        number = trial.config[NUMBER_KEY]
        self._log.in_flight.discard(number)  # handed out once more, unless it ends here
        self._lost[number] = self._lost.get(number, 0) + 1
        if max(trial.run_metadata.num_failures, self._lost[number]) > self._max_failures:
            self._finish(number, "FAILED", self._watchdog.hung.get(number) or _reason(trial))

    def _finish(self, number: int, status: TrialStatus, error: str = "") -> None:
        self._log.finish(number, status, error)
        trial = self._log.by_number[number]
        trial.reason = self._scheduler.stopped(self._log).get(number, "")
        self._show("ended", trial)

    def _show(self, event: str, *values: Any) -> None:
        """Tell the observers; a view that cannot write its file must not end the study."""
        for observer in self._observers:
            try:
                getattr(observer, event)(*values)
            except OSError as error:
                if not is_storage_error(error):
                    raise
                logger.warning("%s cannot write: %s.", type(observer).__name__, error.strerror)


LEAST_SECONDS = 1800.0
"""Nothing is called a hang sooner, unless the user says so: a first step may compile for long."""
TIMES_MEDIAN = 10.0
START_SECONDS = 120.0
"""A process has at least so long until its first report: it imports, opens data, may compile."""
_LOOK_SECONDS = 1.0


def hang_timeout(intervals: Collection[float], fixed: float | None) -> float:
    """Seconds without a report after which a trial hangs.

    Args:
        intervals: seconds between reports of the study so far. fixed: what the user said, or None.
    """
    if fixed is not None:
        return fixed
    usual = statistics.median(intervals) if intervals else 0.0
    return max(LEAST_SECONDS, TIMES_MEDIAN * usual)


class Watchdog(_InDriver, tune.Callback):
    """Kills the process of a trial that has not reported for too long; Tune then restarts it.

    Args:
        timeout_seconds: see hang_timeout. kill: ends an actor's process; Ray's own in the end sends
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
        self._intervals: deque[float] = deque(maxlen=1000)
        self._looked = clock()
        self.hung: dict[int, str] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._since[trial] = self._reported[trial] = self._clock()
        self._started.add(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """It is alive; the latest intervals say what is usual."""
        now = self._clock()
        self._started.discard(trial)
        self._since[trial] = now
        if is_report(result):
            if (since := self._reported.get(trial)) is not None:
                self._intervals.append(now - since)
            self._reported[trial] = now
            self.hung.pop(trial.config[NUMBER_KEY], None)

    def _forget(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._since.pop(trial, None)
        self._reported.pop(trial, None)

    on_trial_complete = on_trial_error = on_trial_recover = _forget

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look at all running trials; Tune calls this many times a second."""
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        usual = hang_timeout(self._intervals, self._timeout_seconds)
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


def fit(
    segments: SegmentQueue, observers: tuple[StudyObserver, ...], *, slots: int, deadline: float
) -> None:
    """Train segments until there are no more, or until the deadline (of time.monotonic)."""
    config, log, scheduler = segments.config, segments.log, segments.scheduler
    storage = log.folder.absolute() / "ray"
    watchdog = Watchdog(config.trial_timeout_seconds)
    recorder = Recorder(
        log, scheduler, observers, max_failures=config.max_failures, watchdog=watchdog
    )
    # A process's peak memory never falls: without a GPU, each trial needs one of its own.
    measures_process = "memory" in config.objectives and not config.workers.gpus
    tuner = tune.Tuner(
        tune.with_resources(TrialTrainable, TrialRoom(_trial_resources(config), log.folder)),
        tune_config=tune.TuneConfig(
            search_alg=SegmentSearcher(segments),
            num_samples=-1,  # the searcher says when it is over
            max_concurrent_trials=slots,
            reuse_actors=config.reuse_actors and not measures_process,
        ),
        run_config=tune.RunConfig(
            name=f"session-{uuid.uuid4().hex}",
            storage_path=str(storage),
            stop=Decisions(log, scheduler, deadline),
            callbacks=[recorder, watchdog],
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
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
    return {"CPU": config.workers.cpus, "GPU": config.workers.gpus}


def _reason(trial: Any) -> str:
    """The last line of a trial's error file: the exception itself."""
    try:
        lines = Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines()
        return lines[-1] if lines else "it failed without a message"
    except (OSError, TypeError, AttributeError):
        return "it failed without a message"
