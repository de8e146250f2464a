"""What a curriculum does beside training: the next stage's data, and test accuracies."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from dmx import log
from dmx.curriculum.history import History
from dmx.curriculum.planner import wanted_tests
from dmx.curriculum.precheck import StageData, check_promoted, resolve
from dmx.curriculum.room import Busy, Room
from dmx.curriculum.stage_data import Stores
from dmx.curriculum.stages import CurriculumConfig, StageConfig
from dmx.curriculum.work import Backend, Key, Message
from dmx.errors import CheckpointError, DmxError
from dmx.schema import to_dict
from dmx.training.evaluation import Measurement

logger = logging.getLogger("dmx.curriculum")
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
            with log.context(stage.name):
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
