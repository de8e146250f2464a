"""The Ray backend of a curriculum: stages, searches, data preparation, tests."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dmx import terminal
from dmx.cluster import capacity, gang
from dmx.curriculum.controller import ClusterLost, Key, Message
from dmx.curriculum.planner import Launch
from dmx.data.prepare import open_data
from dmx.data.store import open_store
from dmx.errors import DmxError, StorageError
from dmx.runs import layout
from dmx.runs.folder_sync import FolderSync
from dmx.runs.layout import FAILURE, RESUMABLE, STEPS, TRAIN_SECONDS
from dmx.runs.study import Study
from dmx.schema import to_dict
from dmx.storage.journal import Claim, decode
from dmx.storage.remote import SHARED_FILESYSTEM, StorageLayout
from dmx.study import results
from dmx.study.folder import open_folder, settings_event
from dmx.study.study import StudyConfig, train_trials
from dmx.study.views import LogView, TensorBoardView
from dmx.training.checkpoint import open_checkpoint
from dmx.training.evaluation import EvaluationJob, evaluate_checkpoint
from dmx.training.job import Job, Workers
from dmx.training.transfer import MisfitError

import ray  # isort: skip
from ray.exceptions import RayError, RayTaskError  # isort: skip

_CLOSE_SECONDS = 20.0
_NO_CPU = Workers(cpus=0)
_GRACE_SHARE = 8
"""ASHA's grace without `grace_steps`: an eighth of the stage's steps."""


class SearchView:
    """Log lines of a search's trials, read from its journal: the search runs elsewhere."""

    def __init__(self, folder: Path, num_trials: int) -> None:
        self.folder, self._view = folder, LogView(num_trials)
        self._study = Study(folder)
        self._read = 0
        list(self._new_events())  # of an earlier session
        self._view.continues(self._study.trials)

    def show(self) -> None:
        """Say what is new."""
        for event in self._new_events():
            if event["event"] == "report":
                self._view.reported(event["trial"], event["metrics"])
            elif event["event"] == "outcome":
                self._view.ended(self._study.by_number[event["trial"]])

    def _new_events(self) -> Iterator[dict[str, Any]]:
        """The events of the lines that were added, and are whole; they are folded."""
        try:
            with (self.folder / layout.JOURNAL_FILE).open("rb") as file:
                file.seek(self._read)
                lines = file.read().rpartition(b"\n")[0]
        except OSError:  # not begun, or on another node's disk
            return
        self._read += len(lines) + bool(lines)
        for line in lines.splitlines():
            if (event := decode(line)) is not None:
                self._study.add(event)
                yield event


class RayBackend:
    """Everything runs in the connected Ray cluster.

    Args:
        places: where the run's nodes meet, if not on shared storage.
    """

    def __init__(self, places: StorageLayout = SHARED_FILESYSTEM) -> None:
        self._places = places
        self._runs: dict[Key, gang.Running] = {}
        self._tasks: dict[Any, Key] = {}
        self._views: dict[Key, SearchView] = {}

    def train(self, key: Key, job: Job) -> None:
        """Start or continue a run: in a process of its own, restarted when it dies."""
        self._runs[key] = gang.start(dataclasses.replace(job, places=self._places))

    def search(self, key: Key, launch: Launch, job: Job, *, slots: int) -> None:
        """Start or continue a study; its trials are runs as the job says, `slots` at once.

        A process without CPUs of its own drives Tune; the trials have them.
        """
        study = dataclasses.replace(stage_study(launch, job), places=self._places)
        self._views[key] = SearchView(Path(job.folder), study.num_trials)
        self._submit(key, _search, study, job.data_folder, job.folder, slots)

    def prepare(
        self, key: Key, root: Path, options: Mapping[str, Any], workers: int, nice: int
    ) -> None:
        """Prepare the data of the task that is the key's detail.

        It takes no CPU from Ray's count: it is `nice` and yields to whatever trains.
        """
        self._submit(key, _prepare, key.detail, str(root), dict(options), workers, nice)

    def test(self, key: Key, wanted: EvaluationJob, worker: Workers) -> None:
        """Measure a test accuracy."""
        wanted = dataclasses.replace(wanted, places=self._places)
        self._submit(key, _measure, wanted, worker.threads, worker=worker)

    def _submit(self, key: Key, function: Any, *arguments: Any, worker: Workers = _NO_CPU) -> None:
        """A task, retried when its process or node dies."""
        remote: Any = ray.remote(num_cpus=worker.cpus, num_gpus=worker.gpus, max_retries=3)
        self._tasks[remote(function).remote(*arguments)] = key

    def poll(self, timeout_seconds: float) -> list[Message]:
        """Whatever is there; waits only when nothing is.

        Raises:
            ClusterLost: Ray does not answer any more.
        """
        tests = any(key.kind == "test" for key in self._tasks.values())
        try:
            with capacity.for_task() if tests else contextlib.nullcontext():
                return self._poll(timeout_seconds)
        except (RayError, ConnectionError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ClusterLost(f"the cluster was lost ({reason})") from None

    def _poll(self, timeout_seconds: float) -> list[Message]:
        for key, view in self._views.items():
            with terminal.log_context(key.stage):
                view.show()
        messages = self._poll_tasks(0.0)
        if messages or not self._runs:
            return messages or self._poll_tasks(timeout_seconds)
        by_folder = {run.job.folder: key for key, run in self._runs.items()}
        # Short when tasks run too, since only one kind of work can be waited for.
        timeout = min(timeout_seconds, 0.2) if self._tasks else timeout_seconds
        for run, report in gang.wait_any(list(self._runs.values()), timeout_seconds=timeout):
            key = by_folder[run.job.folder]
            failure, done = report.get(FAILURE), bool(report.get("done"))
            if done:
                del self._runs[key]
                self._places.pull(Path(run.job.folder) / layout.BEST_DIR)
            shown = {} if failure else report
            lost = bool(report.get(RESUMABLE))
            messages.append(Message(key=key, report=shown, done=done, failure=failure, lost=lost))
        return messages

    def _poll_tasks(self, timeout_seconds: float) -> list[Message]:
        if not self._tasks:
            return []
        ready, _ = ray.wait(list(self._tasks), num_returns=1, timeout=timeout_seconds)
        messages = []
        for reference in ready:
            key = self._tasks.pop(reference)
            view = self._views.pop(key, None)
            if view is not None:
                with terminal.log_context(key.stage):
                    view.show()
            try:
                value, failure = ray.get(reference), None
            except RayError as error:
                lost = not isinstance(error, RayTaskError) or isinstance(error.cause, StorageError)
                messages.append(Message(key=key, done=True, failure=_reason(error), lost=lost))
                continue
            if view is not None:
                reports, failure, value = value
                self._places.pull(view.folder / layout.BEST_DIR)
                messages += [Message(key=key, report=report) for report in reports]
            messages.append(Message(key=key, done=True, failure=failure, value=value))
        return messages

    def close(self) -> None:
        """Kill workers and cancel tasks."""
        gang.stop(*self._runs.values())
        # As Ctrl-C in the process that drives Tune, whose trials then keep what they have trained.
        searches = [r for r, key in self._tasks.items() if key.kind == "train"]
        with contextlib.suppress(RayError, ValueError, TypeError):
            for reference in searches:
                ray.cancel(reference)
            if searches:
                ray.wait(searches, num_returns=len(searches), timeout=_CLOSE_SECONDS)
        for reference in self._tasks:
            with contextlib.suppress(RayError, ValueError, TypeError):
                ray.cancel(reference, force=True)
        self._runs.clear()
        self._tasks.clear()


def _reason(error: RayError) -> str:
    """One line; a user error's own sentence."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return str(cause) if isinstance(cause, DmxError) else gang.last_line(error)


# -- what runs in a Ray worker ------------------------------------------------------------------


def _measure(wanted: EvaluationJob, threads: int) -> float | None:
    """The accuracy; None where the weights do not fit the other stage's model."""
    capacity.hide_unreserved_gpus()
    try:
        return evaluate_checkpoint(wanted, threads).accuracy
    except MisfitError:
        return None


def _prepare(task: str, root: str, options: Mapping[str, Any], workers: int, nice: int) -> None:
    terminal.setup_logging()
    with contextlib.suppress(OSError):
        os.nice(nice)
    open_data(task, Path(root), workers=workers, options=options, generate=True)


def stage_study(launch: Launch, job: Job) -> StudyConfig:
    """The study of one attempt; a retry draws other points, a longer one trains them longer.

    Args:
        job: of one trial, with the weights that each of them starts from.
    """
    stage, config = launch.stage, launch.config
    assert stage.search is not None and stage.space is not None
    steps = config.train.num_steps
    grace = stage.search.grace_steps or max(config.train.eval_every_steps, steps // _GRACE_SHARE)
    changed = {
        "train.num_steps": steps,
        "train.seed": config.train.seed,
        "data.seed": config.data.seed,
        **{f"init.{key}": value for key, value in (job.run_config["init"] or {}).items()},
    }
    same = ("num_trials", "reduction_factor", "scheduler", "sampler")
    return StudyConfig(
        name=stage.name,
        task=stage.task,
        space=stage.space,
        overrides={**stage.overrides, **changed},
        max_steps=steps,
        grace_steps=min(grace, steps),
        **{name: getattr(stage.search, name) for name in same},
        seed=stage.search.seed + launch.retry,
        workers=job.workers,
    )


def _search(
    study: StudyConfig, data_folder: str, folder: str, slots: int
) -> tuple[list[dict[str, Any]], str | None, dict[str, Any] | None]:
    """(reports of the best trial, failure, Attempt.search) of a stage's study.

    The folder becomes a study's, which `dmx.report` reads as any other.
    """
    terminal.setup_logging()
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    claim = Claim(path)  # a driver that was just killed may still hold the study
    sync = FolderSync(study.places.below(path))
    sync.restore()
    view = TensorBoardView(path, {"task": study.task}, study.space.names())
    try:
        store = open_store(study.places.data(data_folder))
        event = settings_event("study", study.settings(store.manifest))
        open_folder(path, event, resume=True)  # by a former process, perhaps
        with sync:
            done = train_trials(study, store, path, slots=slots, observers=(view,))
        results.copy_best(done)
        results.write_files(done)
        best = done.best_trial
        if best is None:
            return [], "no trial of the search reported a dev accuracy", None
        study.places.push(path / layout.BEST_DIR)
    finally:
        view.close()
        claim.release()
    config = open_checkpoint(path / layout.BEST_DIR).config
    found = {
        "trial": best.number,
        "num_trials": len(done.trials),
        "params": dict(done.best_params),
        "config": to_dict(config),
        "attention": config.attention.label,
        STEPS: sum(t.steps for t in done.trials),
        TRAIN_SECONDS: math.fsum(t.seconds for t in done.trials),
    }
    return [dict(report) for report in best.reports], None, found
