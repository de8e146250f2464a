"""The curriculum controller: launch, gate, journal, next; the cluster is injected."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dmx import terminal
from dmx.config import InitConfig
from dmx.curriculum.checks import (
    StageData,
    Stores,
    best_checkpoints,
    check_promoted,
    checkpoint_facts,
    data_facts,
    resolve,
)
from dmx.curriculum.config import CurriculumConfig, StageConfig
from dmx.curriculum.history import History, advance, attempt_folder, fold
from dmx.curriculum.planner import (
    Launch,
    Verdict,
    all_passed,
    judge,
    next_launches,
    stage_study,
    to_rejudge,
    wanted_tests,
)
from dmx.curriculum.resources import Busy, Key, Means, Room
from dmx.errors import CheckpointError, DmxError
from dmx.runs.metrics import REPORT_KEYS, STEPS
from dmx.schema import to_dict
from dmx.storage.journal import Journal, read_claim
from dmx.training.job import Job
from dmx.training.predictions import Measurement
from dmx.training.transfer import weights_checksum

if TYPE_CHECKING:
    from dmx.study.study import StudyConfig


class ClusterLost(Exception):
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
    report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    done: bool = False
    failure: str | None = None
    lost: bool = False
    value: Any = None


class Backend(Protocol):
    """What the controller needs of a cluster; tests have one without Ray."""

    def train(self, key: Key, job: Job, *, cpus: float, gpus: float) -> None:
        """Start or continue a run."""

    def search(
        self, key: Key, study: StudyConfig, data_folder: str, folder: Path, slots: int
    ) -> None:
        """Start or continue a study."""

    def prepare(
        self, key: Key, task: str, root: Path, options: Mapping[str, Any], workers: int, nice: int
    ) -> None:
        """Prepare a task's data."""

    def test(self, key: Key, wanted: Measurement, *, cpus: float, gpus: float) -> None:
        """Measure a test accuracy."""

    def poll(self, timeout_seconds: float) -> list[Message]:
        """News; empty after the timeout."""

    def close(self) -> None:
        """End all work at once; what is on disk stays."""


logger = logging.getLogger("dmx.curriculum")


class Observer(Protocol):
    """Whoever shows a run; called with each event after it is in the journal."""

    def event(self, history: History, event: Mapping[str, Any]) -> None:
        """One more event; `history` includes it."""


def say(verdict: Verdict) -> None:
    """Log what a gate found and what follows from it."""
    words = {
        "promote": "promoted" if verdict.passed else "promoted all the same (on_fail: continue)",
        "retry": "not passed; trying again with new seeds (on_fail: retry)",
        "longer": "not passed; training longer (on_fail: longer)",
        "stop": "not passed; this branch ends here (on_fail: stop)",
    }
    level = logging.INFO if verdict.passed else logging.WARNING
    logger.log(level, "gate: %s -> %s", verdict.reason, words[verdict.next])


_NICE = 19
"""Priority of data preparation beside training: only what is idle."""


class Record(Protocol):
    """Writes an event to the journal."""

    def __call__(self, event: str, **values: object) -> None: ...


class GiveUp(Protocol):
    """Takes a stage out of this session."""

    def __call__(self, stage: str, reason: str) -> None: ...


class SideWork:
    """See the file's first line. `record` and `give_up` are the controller's."""

    def __init__(
        self,
        curriculum: CurriculumConfig,
        folder: Path,
        backend: Backend,
        room: Room,
        stores: Stores,
        *,
        record: Record,
        give_up: GiveUp,
    ) -> None:
        self._curriculum, self._folder, self._backend = curriculum, folder, backend
        self._room, self._stores = room, stores
        self._record, self._give_up = record, give_up
        self._untested: set[tuple[str, str]] = set()

    def has_data(self, stage: StageConfig) -> bool:
        """Whether the stage's data are there and open."""
        if any(key.kind == "data" and key.detail == stage.task for key in self._room.busy):
            return False
        try:
            return self._stores.open(stage)
        except DmxError as error:
            self._give_up(stage.name, str(error))
            return False

    def prepare_data(
        self, history: History, selected: Collection[str], broken: Collection[str]
    ) -> None:
        """Start preparing the set that is needed first, one at a time.

        Beside training it has only what is idle.
        """
        if any(key.kind == "data" for key in self._room.busy):
            return
        for stage in self._curriculum.stages:
            settled = history.stage(stage.name).status in ("passed", "failed")
            if stage.name not in selected or settled or stage.name in broken:
                continue
            if self._stores.is_prepared(stage):
                continue
            training = any(key.kind == "train" for key in self._room.busy)
            workers = max(int(self._room.free()[0]), 1)
            key = Key("data", stage.name, stage.task)
            with terminal.log_context(stage.name):
                logger.info("preparing data: %s (%d workers)", stage.task, workers)
            nice, options = _NICE if training else 0, stage.generate.options()
            self._room.busy[key] = Busy()
            self._backend.prepare(key, stage.task, self._stores.root, options, workers, nice)
            return

    def start_tests(self, history: History, broken: Collection[str]) -> None:
        """Start whatever test accuracies are missing and fit."""
        for stage, on in wanted_tests(self._curriculum, history):
            key = Key("test", stage.name, on.name)
            known = key in self._room.busy or (stage.name, on.name) in self._untested
            if known or stage.name in broken or not self._room.fits(stage):
                continue
            promoted = history.stage(stage.name).promoted
            if promoted is None or not self.has_data(on):
                continue
            try:
                folder = check_promoted(stage.name, promoted, self._folder)
            except CheckpointError as error:
                self._give_up(stage.name, str(error))
                continue
            store = self._stores[on.task]
            other = None if on is stage else to_dict(resolve(on.config, StageData(store=store)))
            wanted = Measurement(
                checkpoint=str(folder), data_folder=str(store.folder), config=other
            )
            worker = self._room.means.shared_out(stage)  # one of them is enough
            self._room.busy[key] = Busy(worker.cpus, worker.gpus)
            self._backend.test(key, wanted, cpus=worker.cpus, gpus=worker.gpus)

    def received(self, message: Message) -> None:
        """Record what ended."""
        began = self._room.busy.pop(message.key).begun
        stage, detail = message.key.stage, message.key.detail
        if message.key.kind == "data":
            seconds = time.monotonic() - began
            if message.failure is not None:
                self._give_up(stage, message.failure)
                return
            logger.info("data ready: %s, after %.1f s", detail, seconds)
            self._record("data", stage=stage, task=detail, seconds=seconds)
        elif message.failure is not None:
            self._untested.add((stage, detail))
            logger.warning("no test accuracy on %s: %s", detail, message.failure)
        else:
            if message.value is not None:
                logger.info("test accuracy on %s: %.4f", detail, message.value)
            self._record("tested", stage=stage, on=detail, accuracy=message.value)


_POLL_SECONDS = 1.0


class Controller:
    """Runs the selected stages of a curriculum to their end.

    Args:
        curriculum: all stages, checked. folder: the run's. journal: open, locked.
        backend: does the work. means: how much fits at once. data_root: of prepared data.
        selected: names of the stages that this session may run.
        code: the version of dmx, for the lineage. observers: see Observer.
    """

    def __init__(
        self,
        curriculum: CurriculumConfig,
        folder: Path,
        journal: Journal,
        backend: Backend,
        *,
        means: Means,
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
        self._backend, self._room, self._stores = backend, Room(means), Stores(data_root)
        self._selected, self._code, self._observers = tuple(selected), code, observers
        self._side = SideWork(
            curriculum,
            folder,
            backend,
            self._room,
            self._stores,
            record=self._record,
            give_up=self._break,
        )
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
            self._side.prepare_data(self.history, self._selected, self.broken)
            if not self._ready():  # tests wait for whatever trains
                self._side.start_tests(self.history, self.broken)
            if not self._room.busy:
                return all_passed(self.history, self._selected)
            for message in self._backend.poll(_POLL_SECONDS):
                with terminal.log_context(message.key.stage):
                    self._receive(message)

    def _receive(self, message: Message) -> None:
        if message.key.kind == "train":
            self._received_report(message)
        else:
            self._side.received(message)

    def _record(self, event: str, **values: Any) -> None:
        self.journal.append(event=event, **values, time=time.time())
        added = self.journal.events[-1]
        self.history = advance(self.history, added)
        for observer in self._observers:
            observer.event(self.history, added)

    def _break(self, stage: str, reason: str) -> None:
        """The stage cannot run in this session; others may."""
        with terminal.log_context(stage):
            logger.error("%s", reason)
        self.broken[stage] = reason

    # -- stages -----------------------------------------------------------------------------

    def _ready(self) -> list[Launch]:
        """What could start now if there is room."""
        busy = [key.stage for key in self._room.busy if key.kind == "train"]
        found = next_launches(self.curriculum, self.history, self._selected, busy)
        return [
            x for x in found if x.stage.name not in self.broken and self._side.has_data(x.stage)
        ]

    def _start_stages(self) -> None:
        for launch in self._ready():
            if self._room.fits(launch.stage):
                with terminal.log_context(launch.stage.name):
                    try:
                        self._launch(launch)
                    except DmxError as error:
                        self._break(launch.stage.name, str(error))

    def _launch(self, launch: Launch) -> None:
        stage, store = launch.stage, self._stores[launch.stage.task]
        config = to_dict(resolve(launch.config, StageData(store=store)))
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
                source=source,
                spec={**stage.plain(), "code": self._code},
                data=data_facts(store),
            )
        logger.info(
            "%s (attempt %d, %s steps%s)",
            "continues" if launch.resumed else "starts",
            launch.number,
            f"{launch.config.train.num_steps:,}",
            f", from {launch.source.get('stage', path)}" if init else "",
        )
        cpus, gpus = self._room.means.of(stage)
        workers = self._room.means.shared_out(stage)
        folder = attempt_folder(self.folder, stage.name, launch.number)
        key = Key("train", stage.name)
        if stage.search is not None:
            slots = self._room.slots(cpus, gpus)
            study = stage_study(launch, cpus=cpus, gpus=gpus, workers=workers.count, init=init)
            self._room.busy[key] = Busy(cpus * slots, gpus * slots, launch)
            self._backend.search(key, study, str(store.folder), folder, slots)
            return
        job = Job(
            run_config={**config, "init": init},
            data_folder=str(store.folder),
            folder=str(folder),
            **workers.of_job(),
            within=str(self.folder.absolute()),
        )
        self._room.busy[key] = Busy(cpus, gpus, launch)
        self._backend.train(key, job, cpus=cpus, gpus=gpus)

    def _source(self, launch: Launch) -> dict[str, Any]:
        """Where the weights come from, found as they were when the attempt was begun."""
        source = dict(launch.source)
        if "stage" in source:
            check_promoted(source["stage"], source, self.folder)
        elif launch.resumed:
            current = self.history.stage(launch.stage.name).current
            source = dict(current.source) if current is not None else source
        elif "path" in source:
            source["sha256"] = weights_checksum(Path(source["path"]))
        return source

    def _received_report(self, message: Message) -> None:
        launch, report = self._room.busy[message.key].launch, message.report
        attempt = self.history.stage(message.key.stage).current
        assert launch is not None and attempt is not None
        if report and int(report[STEPS]) not in attempt.reports:
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
            del self._room.busy[message.key]
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
        attempt = state.current
        assert attempt is not None
        best = best_checkpoints(self.folder, stage.name, state)
        num_classes = int(attempt.config["model"]["num_classes"])
        record = attempt.record(stage.name, num_classes, best.get(attempt.number))
        verdict = judge(stage, state, record, best, failure)
        chosen = attempt.number if verdict.attempt is None else verdict.attempt
        self._record(
            "decided",
            stage=stage.name,
            attempt=attempt.number,
            passed=verdict.passed,
            reason=verdict.reason,
            next=verdict.next,
            failure=failure,
            checkpoint=checkpoint_facts(self.folder, stage.name, chosen, best.get(chosen)),
            judging=stage.judging(),
            **({"search": search} if search is not None else {}),
        )
        self._gate_times[stage.name] = time.time()
        say(verdict)

    def _rejudge(self) -> None:
        for stage in to_rejudge(self.curriculum, self.history, self._selected):
            attempt = self.history.stage(stage.name).current
            assert attempt is not None
            with terminal.log_context(stage.name):
                logger.info("gate or on_fail was changed; judging again")
                decision = attempt.decision or {}
                self._decide(stage, decision.get("failure"), decision.get("search"))
