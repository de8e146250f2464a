"""The curriculum controller: launch, gate, journal, next; the cluster is injected.

Every decision is a pure function (dmx.planner) of the journal, and is in the journal before
anything follows from it. So a controller that was killed at any line is continued by the next one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dmx import log
from dmx import records as keys
from dmx.claim import read_claim
from dmx.cluster_size import Means
from dmx.errors import CheckpointError, DmxError
from dmx.evaluation import Measurement
from dmx.history import History, advance, attempt_folder, fold
from dmx.journal import Journal
from dmx.planner import (
    Launch,
    Verdict,
    all_passed,
    judge,
    next_launches,
    to_rejudge,
    wanted_tests,
)
from dmx.precheck import StageData, check_promoted, resolve
from dmx.promotion import best_checkpoints, checkpoint_facts, data_facts
from dmx.runner import Job
from dmx.schema import to_dict
from dmx.stage_data import Stores
from dmx.stage_study import stage_study
from dmx.stages import CurriculumConfig, StageConfig
from dmx.work import Backend, Key, Message

logger = logging.getLogger("dmx.curriculum")
_POLL_SECONDS = 1.0
_NICE = 19
"""Priority of data preparation beside training: only what is idle."""


class Observer(Protocol):
    """Whoever shows a run; called with each event after it is in the journal."""

    def event(self, history: History, event: Mapping[str, Any]) -> None:
        """One more event; `history` includes it."""


@dataclass
class _Busy:
    """Work under way, and what it occupies."""

    cpus: float = 0.0
    gpus: float = 0.0
    launch: Launch | None = None
    begun: float = field(default_factory=time.time)


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
        self._backend, self._means, self._stores = backend, means, Stores(data_root)
        self._selected, self._code, self._observers = tuple(selected), code, observers
        self._busy: dict[Key, _Busy] = {}
        self._untested: set[tuple[str, str]] = set()
        self._gate_times: dict[str, float] = {}

    def run(self) -> bool:
        """Work until nothing is left that could be done; True if every selected stage passed."""
        self._rejudge()
        while True:
            self._start_stages()
            self._start_preparation()
            self._start_tests()
            if not self._busy:
                return all_passed(self.history, self._selected)
            for message in self._backend.poll(_POLL_SECONDS):
                with log.context(message.key.stage):
                    self._receive(message)

    def _receive(self, message: Message) -> None:
        kinds = {"train": self._received_report, "data": self._received_data}
        kinds.get(message.key.kind, self._received_test)(message)

    def _record(self, event: str, **values: Any) -> None:
        self.journal.append(event=event, **values, time=time.time())
        added = self.journal.events[-1]
        self.history = advance(self.history, added)
        for observer in self._observers:
            observer.event(self.history, added)

    def _break(self, stage: str, reason: str) -> None:
        """The stage cannot run in this session; others may."""
        with log.context(stage):
            logger.error("%s", reason)
        self.broken[stage] = reason

    def _free(self) -> tuple[float, float]:
        cpus = self._means.num_cpus - sum(b.cpus for b in self._busy.values())
        return cpus, self._means.num_gpus - sum(b.gpus for b in self._busy.values())

    def _fits(self, stage: StageConfig) -> bool:
        cpus, gpus = self._means.of(stage)
        free_cpus, free_gpus = self._free()
        return cpus <= free_cpus + 1e-9 and gpus <= free_gpus + 1e-9

    # -- stages -----------------------------------------------------------------------------

    def _ready(self) -> list[Launch]:
        """What could start now if there is room."""
        busy = [key.stage for key in self._busy if key.kind == "train"]
        found = next_launches(self.curriculum, self.history, self._selected, busy)
        return [x for x in found if x.stage.name not in self.broken and self._has_data(x.stage)]

    def _start_stages(self) -> None:
        for launch in self._ready():
            if self._fits(launch.stage):
                with log.context(launch.stage.name):
                    try:
                        self._launch(launch)
                    except DmxError as error:
                        self._break(launch.stage.name, str(error))

    def _launch(self, launch: Launch) -> None:
        stage, store = launch.stage, self._stores[launch.stage.task]
        config = to_dict(resolve(launch.config, StageData(store=store)))
        init = launch.source.get("path")
        if init is not None and "stage" in launch.source:
            init = str(check_promoted(launch.source["stage"], launch.source, self.folder))
        if not launch.resumed:
            self._record(
                "started",
                stage=stage.name,
                attempt=launch.number,
                retry=launch.retry,
                config=config,
                source=dict(launch.source),
                spec={**stage.plain(), "code": self._code},
                data=data_facts(store),
            )
        logger.info(
            "%s (attempt %d, %s steps%s)",
            "continues" if launch.resumed else "starts",
            launch.number,
            f"{launch.config.train.num_steps:,}",
            f", from {launch.source.get('stage', init)}" if init else "",
        )
        cpus, gpus = self._means.of(stage)
        folder = attempt_folder(self.folder, stage.name, launch.number)
        key = Key("train", stage.name)
        if stage.search is not None:
            slots = self._slots(cpus, gpus)
            study = stage_study(launch, cpus=cpus, gpus=gpus, init_from=init)
            self._busy[key] = _Busy(cpus * slots, gpus * slots, launch)
            self._backend.search(key, study, str(store.folder), folder, slots)
            return
        job = Job(
            run_config=config,
            data_folder=str(store.folder),
            folder=str(folder),
            threads=max(int(cpus), 1),
            init_from=init,
            reinit=launch.reinit,
        )
        self._busy[key] = _Busy(cpus, gpus, launch)
        self._backend.train(key, job, cpus=cpus, gpus=gpus)

    def _slots(self, cpus: float, gpus: float) -> int:
        """Trials at once of a search."""
        free_cpus, free_gpus = self._free()
        rooms = [free_cpus / cpus] if cpus else []
        rooms += [free_gpus / gpus] if gpus else []
        return max(int(min(rooms, default=1.0) + 1e-9), 1)

    def _received_report(self, message: Message) -> None:
        launch, report = self._busy[message.key].launch, message.report
        attempt = self.history.stage(message.key.stage).current
        assert launch is not None and attempt is not None
        if report and int(report[keys.STEPS]) not in attempt.reports:
            self._record(
                "report",
                stage=message.key.stage,
                attempt=launch.number,
                step=int(report[keys.STEPS]),
                metrics={k: report[k] for k in keys.REPORT_KEYS if k in report},
            )
            if not attempt.reports and not launch.resumed and launch.retry == 0:
                self._note_latency(launch)
        if message.done:
            del self._busy[message.key]
            self._decide(launch.stage, message.failure)

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

    def _decide(self, stage: StageConfig, failure: str | None) -> None:
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
        )
        self._gate_times[stage.name] = time.time()
        _say(verdict)

    def _rejudge(self) -> None:
        for stage in to_rejudge(self.curriculum, self.history, self._selected):
            attempt = self.history.stage(stage.name).current
            assert attempt is not None
            with log.context(stage.name):
                logger.info("gate or on_fail was changed; judging again")
                self._decide(stage, (attempt.decision or {}).get("failure"))

    # -- data -------------------------------------------------------------------------------

    def _has_data(self, stage: StageConfig) -> bool:
        if any(key.kind == "data" and key.detail == stage.task for key in self._busy):
            return False
        try:
            return self._stores.open(stage)
        except DmxError as error:
            self._break(stage.name, str(error))
            return False

    def _start_preparation(self) -> None:
        """One set at a time, the one needed first; beside training only with what is idle."""
        if any(key.kind == "data" for key in self._busy):
            return
        for stage in self.curriculum.stages:
            settled = self.history.stage(stage.name).status in ("passed", "failed")
            if stage.name not in self._selected or settled or stage.name in self.broken:
                continue
            if self._stores.is_prepared(stage):
                continue
            training = any(key.kind == "train" for key in self._busy)
            workers = max(int(self._free()[0]), 1)
            key = Key("data", stage.name, stage.task)
            with log.context(stage.name):
                logger.info("preparing data: %s (%d workers)", stage.task, workers)
            nice, options = _NICE if training else 0, stage.generate.options()
            self._busy[key] = _Busy()
            self._backend.prepare(key, stage.task, self._stores.root, options, workers, nice)
            return

    def _received_data(self, message: Message) -> None:
        seconds = time.time() - self._busy.pop(message.key).begun
        if message.failure is not None:
            self._break(message.key.stage, message.failure)
            return
        logger.info("data ready: %s, after %.1f s", message.key.detail, seconds)
        self._record("data", stage=message.key.stage, task=message.key.detail, seconds=seconds)

    # -- tests ------------------------------------------------------------------------------

    def _start_tests(self) -> None:
        """Test accuracies, when nothing that trains wants the room."""
        if self._ready():
            return
        for stage, on in wanted_tests(self.curriculum, self.history):
            key = Key("test", stage.name, on.name)
            known = key in self._busy or (stage.name, on.name) in self._untested
            if known or stage.name in self.broken or not self._fits(stage):
                continue
            if not self._has_data(on):
                continue
            promoted = self.history.stage(stage.name).promoted
            assert promoted is not None
            try:
                folder = check_promoted(stage.name, promoted, self.folder)
            except CheckpointError as error:
                self._break(stage.name, str(error))
                continue
            store = self._stores[on.task]
            other = None if on is stage else to_dict(resolve(on.config, StageData(store=store)))
            wanted = Measurement(
                checkpoint=str(folder), data_folder=str(store.folder), config=other
            )
            cpus, gpus = self._means.of(stage)
            self._busy[key] = _Busy(cpus, gpus)
            self._backend.test(key, wanted, cpus=cpus, gpus=gpus)

    def _received_test(self, message: Message) -> None:
        del self._busy[message.key]
        stage, on = message.key.stage, message.key.detail
        if message.failure is not None:
            self._untested.add((stage, on))
            logger.warning("no test accuracy on %s: %s", on, message.failure)
            return
        if message.value is not None:
            logger.info("test accuracy on %s: %.4f", on, message.value)
        self._record("tested", stage=stage, on=on, accuracy=message.value)


def _say(verdict: Verdict) -> None:
    words = {
        "promote": "promoted" if verdict.passed else "promoted all the same (on_fail: continue)",
        "retry": "not passed; trying again with new seeds (on_fail: retry)",
        "longer": "not passed; training longer (on_fail: longer)",
        "stop": "not passed; this branch ends here (on_fail: stop)",
    }
    level = logging.INFO if verdict.passed else logging.WARNING
    logger.log(level, "gate: %s -> %s", verdict.reason, words[verdict.next])
