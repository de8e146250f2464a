"""The curriculum controller: launch, gate, journal, next; the cluster is injected.

Every decision is a pure function (dmx.curriculum.planner) of the journal, and is in the journal
before anything follows from it. So a controller that was killed at any line is continued by the
next one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dmx import terminal
from dmx.config import InitConfig
from dmx.curriculum import checks, planner
from dmx.curriculum.config import CurriculumConfig, StageConfig
from dmx.curriculum.planner import Launch
from dmx.curriculum.resources import Allocation, Key, ResourcePlan, ResourcePool
from dmx.data.prepare import is_prepared
from dmx.data.store import Store
from dmx.errors import DmxError, RunFailedError
from dmx.runs.layout import REPORT_KEYS, STEPS, attempt_folder
from dmx.runs.stages import History, advance, fold
from dmx.schema import to_dict
from dmx.storage.journal import Journal, read_claim
from dmx.training.evaluation import EvaluationJob
from dmx.training.job import Job
from dmx.training.transfer import weights_checksum

logger = logging.getLogger("dmx.curriculum")
_POLL_SECONDS = 1.0
_NICE = 19
"""Priority of data preparation beside training: only what is idle."""

Observer = Callable[[History, Mapping[str, Any]], None]
"""Called with each event after it is in the journal, and with the history that includes it."""


class ClusterLost(RunFailedError):
    """The cluster does not answer any more; what is on disk can be continued elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """News of a piece of work.

    Attributes:
        report: of a run: flat metrics, with `done` in the last; of a search: the best trial's
            reports, one message each. {} for the end of anything else.
        done: nothing more will come. failure: why it ended badly, one line.
        lost: it is the machines that failed; the work itself can be continued.
        value: what a test or a preparation returned; at the end of a search what it found and cost
            (see Attempt.search).
    """

    key: Key
    report: Mapping[str, Any] = field(default_factory=dict)
    done: bool = False
    failure: str | None = None
    lost: bool = False
    value: Any = None


class Backend(Protocol):
    """What the controller needs of a cluster; tests have one without Ray."""

    def train(self, key: Key, job: Job, *, cpus: float, gpus: float) -> None:
        """Start or continue a run."""

    def search(
        self, key: Key, launch: Launch, job: Job, *, cpus: float, gpus: float, slots: int
    ) -> None:
        """Start or continue a study; its trials are runs as the job says, `slots` at once."""

    def prepare(
        self, key: Key, task: str, root: Path, options: Mapping[str, Any], workers: int, nice: int
    ) -> None:
        """Prepare a task's data."""

    def test(self, key: Key, wanted: EvaluationJob, *, cpus: float, gpus: float) -> None:
        """Measure a test accuracy."""

    def poll(self, timeout_seconds: float) -> list[Message]:
        """News; empty after the timeout."""

    def close(self) -> None:
        """End all work at once; what is on disk stays."""


class Controller:
    """Runs the selected stages of a curriculum to their end.

    Args:
        curriculum: all stages, checked. folder: the run's. journal: open, locked.
        backend: does the work. plan: how much fits at once. data_root: of prepared data.
        selected: names of the stages that this session may run.
        code: the version of dmx, for the lineage.
    """

    def __init__(
        self,
        curriculum: CurriculumConfig,
        folder: Path,
        journal: Journal,
        backend: Backend,
        *,
        plan: ResourcePlan,
        data_root: Path,
        selected: Collection[str],
        code: str = "",
        observers: tuple[Observer, ...] = (),
    ) -> None:
        self.curriculum, self.folder, self.journal = curriculum, folder, journal
        self.history = fold(journal.events)
        self.broken: dict[str, str] = {}
        """Why a stage cannot run in this session: its data, or the checkpoint it starts from."""
        self.lost: set[str] = set()
        """Those of them whose machines failed."""
        self._backend, self._pool = backend, ResourcePool(plan)
        self._data_root, self._stores = data_root, dict[str, Store]()
        self._selected, self._code, self._observers = tuple(selected), code, observers
        self._untested: set[Key] = set()
        self._gate_times: dict[str, float] = {}

    def run(self, check: Callable[[], None] = lambda: None) -> bool:
        """Work until nothing is left that could be done; True if every selected stage passed.

        Args:
            check: raises where the session is to end (see process.terminate_like_interrupt).
        """
        self._rejudge()
        while True:
            check()
            self._start_stages()
            self._prepare_data()
            if not self._ready():  # tests wait for whatever trains
                self._start_tests()
            if not self._pool.allocated:
                return planner.all_passed(self.history, self._selected)
            for message in self._backend.poll(_POLL_SECONDS):
                with terminal.log_context(message.key.stage):
                    self._receive(message)

    def _receive(self, message: Message) -> None:
        if message.key.kind == "train":
            self._train_received(message)
        elif message.key.kind == "data":
            self._data_received(message)
        else:
            self._test_received(message)

    def _record(self, event: str, **values: Any) -> None:
        self.journal.append(event=event, **values, time=time.time())
        added = self.journal.events[-1]
        self.history = advance(self.history, added)
        for observer in self._observers:
            observer(self.history, added)

    def _break(self, stage: str, reason: str) -> None:
        """The stage cannot run in this session; others may."""
        with terminal.log_context(stage):
            logger.error("%s", reason)
        self.broken[stage] = reason

    # -- stages -----------------------------------------------------------------------------

    def _ready(self) -> list[Launch]:
        """What could start now if there is room."""
        busy = [key.stage for key in self._pool.under_way("train")]
        found = planner.next_launches(self.curriculum, self.history, self._selected, busy)
        return [x for x in found if x.stage.name not in self.broken and self._has_data(x.stage)]

    def _start_stages(self) -> None:
        for launch in self._ready():
            if self._pool.fits(launch.stage):
                with terminal.log_context(launch.stage.name):
                    try:
                        self._launch(launch)
                    except DmxError as error:
                        self._break(launch.stage.name, str(error))

    def _launch(self, launch: Launch) -> None:
        stage, store = launch.stage, self._stores[launch.stage.task]
        config = to_dict(checks.resolve(launch.config, store))
        source, init = self._source(launch), None
        path = source.get("path")
        if path is not None:
            path = str(self.folder / path) if "stage" in source else path
            found = InitConfig(path=path, sha256=source.get("sha256"), reinit=launch.reinit)
            init = to_dict(found)
        if not launch.resumed:
            self._record(
                "started",
                stage=stage.name,
                attempt=launch.number,
                retry=launch.retry,
                config=config,
                attention=launch.config.attention.label,
                source=source,
                spec={**stage.plain(), "code": self._code},
                data=checks.data_facts(store),
            )
        logger.info(
            "%s (attempt %d, %s steps%s)",
            "continues" if launch.resumed else "starts",
            launch.number,
            f"{launch.config.train.num_steps:,}",
            f", from {launch.source.get('stage', path)}" if init else "",
        )
        cpus, gpus = self._pool.plan.request_for(stage)
        job = Job(
            run_config={**config, "init": init},
            data_folder=str(store.folder),
            folder=str(attempt_folder(self.folder, stage.name, launch.number)),
            workers=self._pool.plan.workers_for(stage),
            within=str(self.folder.absolute()),
        )
        key = Key("train", stage.name)
        slots = self._pool.slots(cpus, gpus) if stage.search is not None else 1
        self._pool.allocated[key] = Allocation(cpus * slots, gpus * slots, launch)
        if stage.search is None:
            self._backend.train(key, job, cpus=cpus, gpus=gpus)
        else:
            self._backend.search(key, launch, job, cpus=cpus, gpus=gpus, slots=slots)

    def _source(self, launch: Launch) -> dict[str, Any]:
        """Where the weights come from, found as they were when the attempt was begun."""
        source = dict(launch.source)
        if "stage" in source:
            checks.check_promoted(source["stage"], source, self.folder)
        elif launch.resumed:
            current = self.history.stage(launch.stage.name).current
            source = dict(current.source) if current is not None else source
        elif "path" in source:
            source["sha256"] = weights_checksum(Path(source["path"]))
        return source

    def _train_received(self, message: Message) -> None:
        launch, report = self._pool.allocated[message.key].launch, message.report
        attempt = self.history.stage(message.key.stage).current
        assert launch is not None and attempt is not None
        if report and int(report[STEPS]) not in attempt.curve:
            self._record(
                "report",
                stage=message.key.stage,
                attempt=launch.number,
                step=int(report[STEPS]),
                metrics={k: report[k] for k in REPORT_KEYS if k in report},
            )
            if not attempt.reports and not launch.resumed and launch.retry == 0:
                self._note_latency(launch)
        if message.done:
            del self._pool.allocated[message.key]
            if message.lost:  # nothing is decided: the same command continues the attempt
                self.lost.add(launch.stage.name)
                self._break(launch.stage.name, message.failure or "its process was lost")
            else:
                self._decide(launch.stage, message.failure, message.value)

    def _note_latency(self, launch: Launch) -> None:
        """How soon after the parent's gate the worker held the folder and began to train."""
        parent = launch.stage.parent
        gate = self._gate_times.get(parent or "")
        claimed = read_claim(attempt_folder(self.folder, launch.stage.name, launch.number))
        if gate is not None and "time" in claimed:
            seconds = float(claimed["time"]) - gate
            logger.info("its worker began %.1f s after the gate of %s", seconds, parent)
            self._record("latency", stage=launch.stage.name, seconds=seconds)

    # -- gates ------------------------------------------------------------------------------

    def _decide(self, stage: StageConfig, failure: str | None, search: Any = None) -> None:
        state = self.history.stage(stage.name)
        assert state.current is not None
        best = checks.best_checkpoints(self.folder, stage.name, state)
        verdict = planner.judge(stage, state, best, failure)
        chosen = state.current.number if verdict.attempt is None else verdict.attempt
        self._record(
            "decided",
            stage=stage.name,
            attempt=state.current.number,
            passed=verdict.passed,
            reason=verdict.reason,
            next=verdict.next,
            failure=failure,
            checkpoint=checks.with_checksum(self.folder, best[chosen]) if chosen in best else None,
            judging=stage.judging(),
            **({"search": search} if search is not None else {}),
        )
        self._gate_times[stage.name] = time.time()
        level = logging.INFO if verdict.passed else logging.WARNING
        logger.log(level, "gate: %s -> %s", verdict.reason, verdict.outcome)

    def _rejudge(self) -> None:
        for stage in planner.to_rejudge(self.curriculum, self.history, self._selected):
            attempt = self.history.stage(stage.name).current
            assert attempt is not None
            with terminal.log_context(stage.name):
                logger.info("gate or on_fail was changed; judging again")
                decision = attempt.decision or {}
                self._decide(stage, decision.get("failure"), decision.get("search"))

    # -- beside training: the next stage's data, and test accuracies ------------------------

    def _has_data(self, stage: StageConfig) -> bool:
        """Whether the stage's data are there; their store is open then."""
        if any(key.detail == stage.task for key in self._pool.under_way("data")):
            return False
        try:
            store = self._stores.get(stage.task)
            if store is not None:
                checks.check_settings(stage, store)
            else:
                store = checks.find_data(stage, self._data_root)
        except DmxError as error:
            self._break(stage.name, str(error))
            return False
        if store is not None:
            self._stores[stage.task] = store
        return store is not None

    def _prepare_data(self) -> None:
        """Start preparing the set that is needed first, one at a time.

        Beside training it has only what is idle.
        """
        if self._pool.under_way("data"):
            return
        for stage in self.curriculum.stages:
            settled = self.history.stage(stage.name).status in ("passed", "failed")
            if stage.name not in self._selected or settled or stage.name in self.broken:
                continue
            if stage.task in self._stores or is_prepared(stage.task, self._data_root):
                continue
            workers = max(int(self._pool.free()[0]), 1)
            with terminal.log_context(stage.name):
                logger.info("preparing data: %s (%d workers)", stage.task, workers)
            nice = _NICE if self._pool.under_way("train") else 0
            key = Key("data", stage.name, stage.task)
            self._pool.allocated[key] = Allocation()
            options = stage.generate.options()
            self._backend.prepare(key, stage.task, self._data_root, options, workers, nice)
            return

    def _data_received(self, message: Message) -> None:
        seconds = time.monotonic() - self._pool.allocated.pop(message.key).begun
        if message.failure is not None:
            self._break(message.key.stage, message.failure)
            return
        task = message.key.detail
        logger.info("data ready: %s, after %.1f s", task, seconds)
        self._record("data", stage=message.key.stage, task=task, seconds=seconds)

    def _start_tests(self) -> None:
        """Start whatever test accuracies are missing and fit."""
        for stage, on in planner.wanted_tests(self.curriculum, self.history):
            key = Key("test", stage.name, on.name)
            known = key in self._pool.allocated or key in self._untested
            if known or stage.name in self.broken or not self._pool.fits(stage):
                continue
            promoted = self.history.stage(stage.name).promoted
            if promoted is None or not self._has_data(on):
                continue
            try:
                folder = checks.check_promoted(stage.name, promoted, self.folder)
            except DmxError as error:
                self._break(stage.name, str(error))
                continue
            store = self._stores[on.task]
            wanted = EvaluationJob(
                checkpoint=str(folder),
                data_folder=str(store.folder),
                config=None if on is stage else to_dict(checks.resolve(on.config, store)),
            )
            worker = self._pool.plan.workers_for(stage)  # one of them is enough
            self._pool.allocated[key] = Allocation(worker.cpus, worker.gpus)
            self._backend.test(key, wanted, cpus=worker.cpus, gpus=worker.gpus)

    def _test_received(self, message: Message) -> None:
        del self._pool.allocated[message.key]
        on = message.key.detail
        if message.failure is not None:
            self._untested.add(message.key)
            logger.warning("no test accuracy on %s: %s", on, message.failure)
            return
        if message.value is not None:
            logger.info("test accuracy on %s: %.4f", on, message.value)
        self._record("tested", stage=message.key.stage, on=on, accuracy=message.value)
