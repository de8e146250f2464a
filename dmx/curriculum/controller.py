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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dmx.config import InitConfig
from dmx.curriculum import checks, planner
from dmx.curriculum.config import CurriculumConfig, StageConfig
from dmx.curriculum.planner import Launch, ResourcePlan
from dmx.data.prepare import is_prepared
from dmx.data.store import Store
from dmx.errors import DmxError, RunFailedError, StageError
from dmx.registry import code_version
from dmx.runs.curriculum import Curriculum
from dmx.runs.layout import JOURNAL_FILE, MODEL_FILE, REPORT_KEYS, STEPS, attempt_folder
from dmx.schema import to_dict
from dmx.storage.files import sha256_file
from dmx.storage.journal import Journal, read_claim
from dmx.terminal import log_context
from dmx.training.evaluation import EvaluationJob
from dmx.training.job import Job
from dmx.training.transfer import weights_checksum

if TYPE_CHECKING:  # tests have one without Ray
    from dmx.curriculum.backend import RayBackend

logger = logging.getLogger("dmx.curriculum")
_POLL_SECONDS = 1.0
_NICE = 19
"""Priority of data preparation beside training: only what is idle."""


class ClusterLost(RunFailedError):
    """The cluster does not answer any more; what is on disk can be continued elsewhere."""


class CurriculumLog(Curriculum):
    """A curriculum's record, open for writing.

    Attributes:
        observers: called with the record and each event, after it is in the journal.

    Raises:
        StageError: another process holds it, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.observers: tuple[Callable[[Curriculum, Mapping[str, Any]], None], ...] = ()
        self.journal = Journal(folder / JOURNAL_FILE)
        try:
            for event in self.journal.events:
                self.add(event)
        except StageError:
            self.journal.close()
            raise

    def record(self, event: str, **values: Any) -> None:
        """Write an event down, take it up, and show it."""
        self.journal.append(event=event, **values, time=time.time())
        added = self.journal.events[-1]
        self.add(added)
        for observer in self.observers:
            observer(self, added)

    def close(self) -> None:
        """Let others write it."""
        self.journal.close()


# -- what a cluster does ------------------------------------------------------------------------


class Key(NamedTuple):
    """Names a piece of work: what it is, for which stage, and what else tells it apart."""

    kind: Literal["train", "data", "test"]
    stage: str
    detail: str = ""


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


@dataclass
class _Work:
    """Work under way, and what it occupies. `launch`: of a stage."""

    cpus: float = 0.0
    gpus: float = 0.0
    launch: Launch | None = None
    begun: float = field(default_factory=time.monotonic)


class Controller:
    """Runs the selected stages of a curriculum to their end.

    Args:
        curriculum: all stages, checked. log: its record. backend: does the work.
        plan: how much fits at once. data_root: of prepared data.
        selected: names of the stages that this session may run.

    Attributes:
        broken: why a stage cannot run in this session: its data, or the checkpoint it starts from.
        lost: those of them whose machines failed.
    """

    def __init__(
        self,
        curriculum: CurriculumConfig,
        log: CurriculumLog,
        backend: RayBackend,
        *,
        plan: ResourcePlan,
        data_root: Path,
        selected: Collection[str],
    ) -> None:
        self.broken: dict[str, str] = {}
        self.lost: set[str] = set()
        self._curriculum, self._log, self._backend, self._plan = curriculum, log, backend, plan
        self._data_root, self._stores = data_root, dict[str, Store]()
        self._selected = tuple(selected)
        self._work: dict[Key, _Work] = {}
        self._untested: set[Key] = set()
        self._gate_times: dict[str, float] = {}

    def run(self, check: Callable[[], None] = lambda: None) -> bool:
        """Work until nothing is left that could be done; True if every selected stage passed.

        Args:
            check: raises where the session is to end (see process.terminate_like_interrupt).
        """
        receive = {
            "train": self._train_received,
            "data": self._data_received,
            "test": self._test_received,
        }
        self._rejudge()
        while True:
            check()
            self._start_stages()
            self._prepare_data()
            if not self._ready():  # tests wait for whatever trains
                self._start_tests()
            if not self._work:
                return planner.all_passed(self._log, self._selected)
            for message in self._backend.poll(_POLL_SECONDS):
                with log_context(message.key.stage):
                    receive[message.key.kind](message)

    def _break(self, stage: str, reason: str) -> None:
        """The stage cannot run in this session; others may."""
        with log_context(stage):
            logger.error("%s", reason)
        self.broken[stage] = reason

    # -- room -------------------------------------------------------------------------------

    def _under_way(self, kind: str) -> list[Key]:
        return [key for key in self._work if key.kind == kind]

    def _slots(self, stage: StageConfig) -> int:
        """How many runs of the stage could start now."""
        asked = self._plan.request_for(stage)
        rooms = [free / size for free, size in zip(self._free(), asked, strict=True) if size]
        return int(min(rooms, default=1.0) + 1e-9)

    def _free(self) -> tuple[float, float]:
        """(CPUs, GPUs) that nothing occupies."""
        cluster, work = self._plan.cluster, self._work.values()
        cpus = cluster.num_cpus - sum(w.cpus for w in work)
        return cpus, cluster.num_gpus - sum(w.gpus for w in work)

    # -- stages -----------------------------------------------------------------------------

    def _ready(self) -> list[Launch]:
        """What could start now if there is room."""
        busy = [key.stage for key in self._under_way("train")]
        found = planner.next_launches(self._curriculum, self._log, self._selected, busy)
        return [x for x in found if x.stage.name not in self.broken and self._has_data(x.stage)]

    def _start_stages(self) -> None:
        for launch in self._ready():
            if self._slots(launch.stage) > 0:
                with log_context(launch.stage.name):
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
            path = str(self._log.folder / path) if "stage" in source else path
            found = InitConfig(path=path, sha256=source.get("sha256"), reinit=launch.reinit)
            init = to_dict(found)
        if not launch.resumed:
            self._log.record(
                "started",
                stage=stage.name,
                attempt=launch.number,
                retry=launch.retry,
                config=config,
                attention=launch.config.attention.label,
                source=source,
                spec={**stage.plain(), "code": code_version()},
                data=checks.data_facts(store),
            )
        logger.info(
            "%s (attempt %d, %s steps%s)",
            "continues" if launch.resumed else "starts",
            launch.number,
            f"{launch.config.train.num_steps:,}",
            f", from {launch.source.get('stage', path)}" if init else "",
        )
        job = Job(
            run_config={**config, "init": init},
            data_folder=str(store.folder),
            folder=str(attempt_folder(self._log.folder, stage.name, launch.number)),
            workers=self._plan.workers_for(stage),
            within=str(self._log.folder.absolute()),
        )
        cpus, gpus = self._plan.request_for(stage)
        key, slots = Key("train", stage.name), self._slots(stage) if stage.search else 1
        self._work[key] = _Work(cpus * slots, gpus * slots, launch)
        if stage.search is None:
            self._backend.train(key, job)
        else:
            self._backend.search(key, launch, job, slots=slots)

    def _source(self, launch: Launch) -> dict[str, Any]:
        """Where the weights come from, found as they were when the attempt was begun."""
        source = dict(launch.source)
        if "stage" in source:
            checks.check_promoted(self._log.stage(source["stage"]), source)
        elif launch.resumed:
            source = dict(self._log.stage(launch.stage.name).attempts[-1].source)
        elif "path" in source:
            source["sha256"] = weights_checksum(Path(source["path"]))
        return source

    def _train_received(self, message: Message) -> None:
        launch, report = self._work[message.key].launch, message.report
        attempt = self._log.stage(message.key.stage).attempts[-1]
        assert launch is not None
        if report and int(report[STEPS]) not in attempt.curve:
            self._log.record(
                "report",
                stage=message.key.stage,
                attempt=launch.number,
                step=int(report[STEPS]),
                metrics={k: report[k] for k in REPORT_KEYS if k in report},
            )
            if len(attempt.curve) == 1 and not launch.resumed and launch.retry == 0:
                self._note_latency(launch)
        if message.done:
            del self._work[message.key]
            if message.lost:  # nothing is decided: the same command continues the attempt
                self.lost.add(launch.stage.name)
                self._break(launch.stage.name, message.failure or "its process was lost")
            else:
                self._decide(launch.stage, message.failure, message.value)

    def _note_latency(self, launch: Launch) -> None:
        """How soon after the parent's gate the worker held the folder and began to train."""
        gate = self._gate_times.get(launch.stage.parent or "")
        claimed = read_claim(attempt_folder(self._log.folder, launch.stage.name, launch.number))
        if gate is not None and "time" in claimed:
            seconds = float(claimed["time"]) - gate
            parent = launch.stage.parent
            logger.info("its worker began %.1f s after the gate of %s", seconds, parent)
            self._log.record("latency", stage=launch.stage.name, seconds=seconds)

    # -- gates ------------------------------------------------------------------------------

    def _decide(self, stage: StageConfig, failure: str | None, search: Any = None) -> None:
        state = self._log.stage(stage.name)
        best = checks.best_checkpoints(state)
        verdict = planner.judge(stage, state.attempts, best, failure)
        number = state.attempts[-1].number
        checkpoint = best.get(number if verdict.attempt is None else verdict.attempt)
        if checkpoint is not None:
            model = self._log.folder / checkpoint["path"] / MODEL_FILE
            checkpoint["sha256"] = sha256_file(model)
        self._log.record(
            "decided",
            stage=stage.name,
            attempt=number,
            passed=verdict.passed,
            reason=verdict.reason,
            next=verdict.next,
            failure=failure,
            checkpoint=checkpoint,
            judging=stage.judging(),
            **({"search": search} if search is not None else {}),
        )
        self._gate_times[stage.name] = time.time()
        level = logging.INFO if verdict.passed else logging.WARNING
        logger.log(level, "gate: %s -> %s", verdict.reason, verdict.outcome)

    def _rejudge(self) -> None:
        for stage in planner.to_rejudge(self._curriculum, self._log, self._selected):
            with log_context(stage.name):
                logger.info("gate or on_fail was changed; judging again")
                decision = self._log.stage(stage.name).attempts[-1].decision
                self._decide(stage, decision.get("failure"), decision.get("search"))

    # -- beside training: the next stage's data, and test accuracies ------------------------

    def _has_data(self, stage: StageConfig) -> bool:
        """Whether the stage's data are there; their store is open then."""
        if any(key.detail == stage.task for key in self._under_way("data")):
            return False
        try:
            store = checks.find_data(stage, self._data_root, self._stores.get(stage.task))
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
        if self._under_way("data"):
            return
        for stage in self._curriculum.stages:
            settled = self._log.stage(stage.name).status in ("passed", "failed")
            if stage.name not in self._selected or settled or stage.name in self.broken:
                continue
            if stage.task in self._stores or is_prepared(stage.task, self._data_root):
                continue
            workers = max(int(self._free()[0]), 1)
            with log_context(stage.name):
                logger.info("preparing data: %s (%d workers)", stage.task, workers)
            nice = _NICE if self._under_way("train") else 0
            key = Key("data", stage.name, stage.task)
            self._work[key] = _Work()
            self._backend.prepare(key, self._data_root, stage.generate.options(), workers, nice)
            return

    def _data_received(self, message: Message) -> None:
        seconds = time.monotonic() - self._work.pop(message.key).begun
        if message.failure is not None:
            self._break(message.key.stage, message.failure)
            return
        task = message.key.detail
        logger.info("data ready: %s, after %.1f s", task, seconds)
        self._log.record("data", stage=message.key.stage, task=task, seconds=seconds)

    def _start_tests(self) -> None:
        """Start whatever test accuracies are missing and fit."""
        for stage, on in planner.wanted_tests(self._curriculum, self._log):
            key, state = Key("test", stage.name, on.name), self._log.stage(stage.name)
            known = key in self._work or key in self._untested or stage.name in self.broken
            if known or self._slots(stage) < 1 or not self._has_data(on):
                continue
            assert state.promoted is not None
            try:
                folder = checks.check_promoted(state, state.promoted)
            except DmxError as error:
                self._break(stage.name, str(error))
                continue
            store = self._stores[on.task]
            wanted = EvaluationJob(
                checkpoint=str(folder),
                data_folder=str(store.folder),
                config=None if on is stage else to_dict(checks.resolve(on.config, store)),
            )
            worker = self._plan.workers_for(stage)  # one of them is enough
            self._work[key] = _Work(worker.cpus, worker.gpus)
            self._backend.test(key, wanted, worker)

    def _test_received(self, message: Message) -> None:
        del self._work[message.key]
        on = message.key.detail
        if message.failure is not None:
            self._untested.add(message.key)
            logger.warning("no test accuracy on %s: %s", on, message.failure)
            return
        if message.value is not None:
            logger.info("test accuracy on %s: %.4f", on, message.value)
        self._log.record("tested", stage=message.key.stage, on=on, accuracy=message.value)
