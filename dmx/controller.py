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
from dmx.checkpoint import open_checkpoint
from dmx.claim import read_claim
from dmx.data.files import sha256_file
from dmx.data.locate import is_prepared
from dmx.data.store import Store, open_store
from dmx.errors import CheckpointError, DmxError
from dmx.evaluation import Measurement
from dmx.history import History, advance, attempt_folder, fold
from dmx.journal import Journal
from dmx.planner import Launch, Verdict, attempt_config, judge, judging_of, next_launches
from dmx.precheck import StageData, check_promoted, check_settings, resolve
from dmx.records import CheckpointRef
from dmx.runner import Job
from dmx.schema import to_dict
from dmx.stages import CurriculumConfig, StageConfig
from dmx.stage_study import stage_study
from dmx.work import Backend, Key, Message

logger = logging.getLogger("dmx.curriculum")
_POLL_SECONDS = 1.0
_NICE = 19


@dataclass(frozen=True, kw_only=True)
class Means:
    """CPU cores and GPUs: of the whole cluster, and of one worker."""

    num_cpus: float
    num_gpus: float
    cpus: float
    gpus: float

    def of(self, stage: StageConfig) -> tuple[float, float]:
        """(CPUs, GPUs) of one of the stage's workers."""
        cpus = self.cpus if stage.cpus is None else stage.cpus
        return cpus, self.gpus if stage.gpus is None else stage.gpus


class Observer(Protocol):
    """Whoever shows a run; called with each event after it is in the journal."""

    def event(self, history: History, event: Mapping[str, Any]) -> None:
        """One more event; `history` includes it."""


@dataclass
class _Busy:
    """Work under way."""

    cpus: float
    gpus: float
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
        self._backend, self._means, self._root = backend, means, data_root
        self._code = code
        self._selected, self._observers = tuple(selected), observers
        self.history = fold(journal.events)
        self._busy: dict[Key, _Busy] = {}
        self._stores: dict[str, Store] = {}
        self._broken: dict[str, str] = {}
        self._untested: set[tuple[str, str]] = set()
        self._gate_times: dict[str, float] = {}

    # -- the loop ---------------------------------------------------------------------------

    def run(self) -> bool:
        """Work until nothing is left that could be done; True if every selected stage passed."""
        self._rejudge()
        while True:
            self._start_stages()
            self._start_preparation()
            self._start_tests()
            if not self._busy:
                break
            for message in self._backend.poll(_POLL_SECONDS):
                self._receive(message)
        return all(self.history.stage(n).status == "passed" for n in self._selected)

    @property
    def broken(self) -> Mapping[str, str]:
        """Why a stage's data could not be prepared, or its checkpoint not used."""
        return self._broken

    def _record(self, event: str, **values: Any) -> None:
        self.journal.append(event=event, **values, time=time.time())
        added = self.journal.events[-1]
        self.history = advance(self.history, added)
        for observer in self._observers:
            observer.event(self.history, added)

    def _receive(self, message: Message) -> None:
        with log.context(message.key.stage):
            if message.key.kind == "train":
                self._receive_report(message)
            elif message.key.kind == "data":
                self._receive_data(message)
            else:
                self._receive_test(message)

    def _free(self) -> tuple[float, float]:
        cpus = self._means.num_cpus - sum(b.cpus for b in self._busy.values())
        return cpus, self._means.num_gpus - sum(b.gpus for b in self._busy.values())

    def _fits(self, stage: StageConfig) -> bool:
        cpus, gpus = self._means.of(stage)
        free_cpus, free_gpus = self._free()
        return cpus <= free_cpus + 1e-9 and gpus <= free_gpus + 1e-9

    # -- stages -----------------------------------------------------------------------------

    def _ready(self) -> list[Launch]:
        busy = [key.stage for key in self._busy if key.kind == "train"]
        found = next_launches(self.curriculum, self.history, self._selected, busy)
        return [launch for launch in found if launch.stage.name not in self._broken]

    def _start_stages(self) -> None:
        for launch in self._ready():
            stage = launch.stage
            if not self._fits(stage) or not self._has_data(stage):
                continue
            with log.context(stage.name):
                try:
                    self._launch(launch)
                except DmxError as error:
                    self._break(stage.name, str(error))

    def _launch(self, launch: Launch) -> None:
        stage, store = launch.stage, self._stores[launch.stage.task]
        config = resolve(launch.config, StageData(store=store))
        source = launch.source
        init = source.get("path")
        if init is not None and "stage" in source:
            init = str(check_promoted(source["stage"], source, self.folder))
        if not launch.resumed:
            self._record(
                "started",
                stage=stage.name,
                attempt=launch.number,
                retry=launch.retry,
                config=to_dict(config),
                source=dict(source),
                spec={**stage.plain(), "code": self._code},
                data=_data_facts(store),
            )
        cpus, gpus = self._means.of(stage)
        folder = attempt_folder(self.folder, stage.name, launch.number)
        key = Key("train", stage.name)
        what = "continues" if launch.resumed else "starts"
        logger.info(
            "%s (attempt %d, %s steps%s)",
            what,
            launch.number,
            f"{config.train.num_steps:,}",
            f", from {source.get('stage', init)}" if init else "",
        )
        if stage.search is not None:
            slots = self._slots(cpus, gpus)
            study = stage_study(launch, cpus=cpus, gpus=gpus, init_from=init)
            self._busy[key] = _Busy(cpus * slots, gpus * slots, launch)
            self._backend.search(key, study, str(store.folder), folder, slots)
            return
        job = Job(
            run_config=to_dict(config),
            data_folder=str(store.folder),
            folder=str(folder),
            threads=max(int(cpus), 1),
            init_from=init,
            reinit=launch.reinit,
        )
        self._busy[key] = _Busy(cpus, gpus, launch)
        self._backend.train(key, job, cpus=cpus, gpus=gpus)

    def _slots(self, cpus: float, gpus: float) -> int:
        free_cpus, free_gpus = self._free()
        slots = int(free_cpus / cpus + 1e-9) if cpus else 1
        return max(min(slots, int(free_gpus / gpus + 1e-9)) if gpus else slots, 1)

    def _receive_report(self, message: Message) -> None:
        launch = self._busy[message.key].launch
        assert launch is not None
        state = self.history.stage(message.key.stage)
        attempt = state.current
        assert attempt is not None
        report = message.report
        if report and int(report[keys.STEPS]) not in attempt.reports:
            flat = {k: report[k] for k in keys.REPORT_KEYS if k in report}
            first = not attempt.reports
            self._record(
                "report",
                stage=message.key.stage,
                attempt=launch.number,
                step=int(report[keys.STEPS]),
                metrics=flat,
            )
            if first:
                self._note_latency(launch)
        if message.done:
            del self._busy[message.key]
            self._decide(launch.stage, message.failure)

    def _note_latency(self, launch: Launch) -> None:
        """How soon after the parent's gate the worker had the folder and began to train."""
        gate = self._gate_times.get(launch.stage.parent or "")
        claimed = read_claim(attempt_folder(self.folder, launch.stage.name, launch.number))
        if gate is not None and "time" in claimed and not launch.resumed and launch.retry == 0:
            seconds = float(claimed["time"]) - gate
            logger.info("its worker began %.1f s after the gate of %s", seconds, launch.stage.parent)
            self._record("latency", stage=launch.stage.name, seconds=seconds)

    # -- gates ------------------------------------------------------------------------------

    def _decide(self, stage: StageConfig, failure: str | None) -> None:
        state = self.history.stage(stage.name)
        attempt = state.current
        assert attempt is not None
        references = self._checkpoints(stage.name)
        config = attempt.config["model"]
        record = attempt.record(
            stage.name, int(config["num_classes"]), references.get(attempt.number)
        )
        verdict = judge(stage, state, record, references, failure)
        chosen = verdict.attempt if verdict.attempt is not None else attempt.number
        self._record(
            "decided",
            stage=stage.name,
            attempt=attempt.number,
            passed=verdict.passed,
            reason=verdict.reason,
            next=verdict.next,
            failure=failure,
            checkpoint=self._facts(stage.name, chosen, references.get(chosen)),
            judging=stage.judging(),
        )
        self._gate_times[stage.name] = time.time()
        _say(verdict)

    def _checkpoints(self, stage: str) -> dict[int, CheckpointRef]:
        """The best checkpoint of each attempt that has one."""
        found = {}
        for attempt in self.history.stage(stage).attempts:
            folder = attempt_folder(self.folder, stage, attempt.number) / keys.BEST_DIR
            try:
                metrics = open_checkpoint(folder).metrics
            except CheckpointError:
                continue
            found[attempt.number] = CheckpointRef(
                path=folder,
                step=int(metrics.get(keys.STEPS, 0)),
                dev_accuracy=metrics.get(keys.DEV_ACCURACY),
            )
        return found

    def _facts(
        self, stage: str, attempt: int, reference: CheckpointRef | None
    ) -> dict[str, Any] | None:
        """What the journal says of a promoted checkpoint; its path is relative to the run."""
        if reference is None:
            return None
        return {
            "stage": stage,
            "attempt": attempt,
            "path": str(reference.path.relative_to(self.folder)),
            "step": reference.step,
            keys.DEV_ACCURACY: reference.dev_accuracy,
            "sha256": sha256_file(reference.path / keys.MODEL_FILE),
        }

    def _rejudge(self) -> None:
        """A stage that was refused by a gate that has been changed since is judged again."""
        for name in self._selected:
            state = self.history.stage(name)
            stage = self.curriculum.stage(name)
            if state.status != "failed" or state.current is None:
                continue
            if judging_of(state.current) != stage.judging():
                decision = state.current.decision or {}
                with log.context(name):
                    logger.info("gate or on_fail was changed; judging again")
                    self._decide(stage, decision.get("failure"))

    # -- data -------------------------------------------------------------------------------

    def _has_data(self, stage: StageConfig) -> bool:
        """Whether the stage's data are open; opens them when they are there."""
        if stage.task in self._stores:
            return True
        if not is_prepared(stage.task, self._root) or self._preparing(stage.task):
            return False
        try:
            store = open_store(self._root / stage.task)
            check_settings(stage, store)
        except DmxError as error:
            self._break(stage.name, str(error))
            return False
        self._stores[stage.task] = store
        return True

    def _preparing(self, task: str) -> bool:
        return any(key.kind == "data" and key.detail == task for key in self._busy)

    def _start_preparation(self) -> None:
        """One set at a time, the one needed first; beside training only with what is idle."""
        if any(key.kind == "data" for key in self._busy):
            return
        for stage in self.curriculum.stages:
            settled = self.history.stage(stage.name).status in ("passed", "failed")
            if stage.name not in self._selected or settled or stage.name in self._broken:
                continue
            if is_prepared(stage.task, self._root):
                continue
            training = any(key.kind == "train" for key in self._busy)
            workers = max(int(self._free()[0]), 1)
            key = Key("data", stage.name, stage.task)
            with log.context(stage.name):
                logger.info("preparing data: %s (%d workers)", stage.task, workers)
            self._busy[key] = _Busy(0.0, 0.0)
            self._backend.prepare(
                key,
                stage.task,
                self._root,
                stage.generate.options(),
                workers,
                _NICE if training else 0,
            )
            return

    def _receive_data(self, message: Message) -> None:
        began = self._busy.pop(message.key).begun
        if message.failure is not None:
            self._break(message.key.stage, message.failure)
            return
        seconds = time.time() - began
        logger.info("data ready: %s, after %.1f s", message.key.detail, seconds)
        self._record("data", stage=message.key.stage, task=message.key.detail, seconds=seconds)

    def _break(self, stage: str, reason: str) -> None:
        """The stage cannot run in this session; others may."""
        with log.context(stage):
            logger.error("%s", reason)
        self._broken[stage] = reason

    # -- tests ------------------------------------------------------------------------------

    def _start_tests(self) -> None:
        """Test accuracies, when nothing that trains wants the room."""
        if any(self._fits(launch.stage) and self._has_data(launch.stage) for launch in self._ready()):
            return
        for stage, on in self._wanted_tests():
            if not self._fits(stage):
                continue
            promoted = self.history.stage(stage.name).promoted
            assert promoted is not None
            try:
                folder = check_promoted(stage.name, promoted, self.folder)
            except CheckpointError as error:
                self._break(stage.name, str(error))
                continue
            config = None
            if on is not stage:
                config = to_dict(resolve(attempt_config(on, 0), StageData(store=self._stores[on.task])))
            cpus, gpus = self._means.of(stage)
            key = Key("test", stage.name, on.name)
            self._busy[key] = _Busy(cpus, gpus)
            store = self._stores[on.task]
            wanted = Measurement(
                checkpoint=str(folder), data_folder=str(store.folder), config=config
            )
            self._backend.test(key, wanted, cpus=cpus, gpus=gpus)

    def _wanted_tests(self) -> list[tuple[StageConfig, StageConfig]]:
        """(stage, stage whose test split) of passed stages, where not measured yet."""
        last = self.curriculum.stages[-1]
        found = []
        for stage in self.curriculum.stages:
            state = self.history.stage(stage.name)
            if state.promoted is None or stage.name in self._broken:
                continue
            for on in (stage,) if stage is last else (stage, last):
                pair = (stage.name, on.name)
                known = on.name in state.tests or pair in self._untested
                if not known and Key("test", *pair) not in self._busy and self._has_data(on):
                    found.append((stage, on))
        return found

    def _receive_test(self, message: Message) -> None:
        del self._busy[message.key]
        stage, on = message.key.stage, message.key.detail
        if message.failure is not None or message.value is None:
            self._untested.add((stage, on))
            if message.failure is not None:
                logger.warning("no test accuracy on %s: %s", on, message.failure)
            return
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


def _data_facts(store: Store) -> dict[str, Any]:
    manifest = store.manifest
    return {
        "label": manifest.label,
        "folder": str(store.folder),
        "checksum": manifest.checksum,
        "origin": manifest.origin,
        "splits": dict(manifest.splits),
        "is_sample": manifest.is_sample,
    }
