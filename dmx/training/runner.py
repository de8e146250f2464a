"""One run in one process: build or resume a Trainer, keep its best and last checkpoint, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import math
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.backends import cudnn

from dmx.config import parse_run_config
from dmx.data.store import open_store
from dmx.errors import DmxError, StorageError, TakenOverError
from dmx.nn.device import give_back_memory
from dmx.runs import layout
from dmx.storage.files import is_there, persist
from dmx.storage.journal import Claim
from dmx.training.checkpoint import Checkpoint, open_checkpoint, repeat_checkpoint
from dmx.training.job import Job, check_batch
from dmx.training.process_group import SINGLE_PROCESS, PeerLost, ProcessGroup
from dmx.training.samples import predict_samples
from dmx.training.trainer import Trainer
from dmx.training.transfer import identified, read_weights

logger = logging.getLogger("dmx.runner")


class Runner:
    """Steps through a job, one evaluation at a time.

    An exception is the run's own fault: it becomes a report with `failure`, since starting the
    same thing again would end the same way. Only a dead process is worth another try. A storage
    that fails is waited for; when that takes too long, the report carries `resumable` as well: the
    run is as sound as its last checkpoint.

    Args:
        job: the run. on_step: see Trainer.
        group: the processes that train it together, each with a Runner; the main one alone claims
            the folder and writes.

    Raises:
        PeerLost: another process is gone; from every method.
    """

    def __init__(
        self,
        job: Job,
        on_step: Callable[[int, int], None] | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.job = job
        self._group = group
        self._on_step = on_step
        self._folder = Path(job.folder)
        self._trainer: Trainer | None = None
        self._claim: Claim | None = None
        self._failed: dict[str, Any] = {}  # the report of it
        self._resumed = False
        self._unsaved = False  # whole steps since the last checkpoint
        self._busy_seconds = 0.0
        torch.set_num_threads(job.workers.threads)
        started = time.perf_counter()
        try:
            if self._group.is_main:
                self._persist(self._claim_folder)
            self._build()
        except PeerLost:
            raise
        except Exception as error:
            self._fail(error)
        self._busy_seconds = time.perf_counter() - started

    def _persist(self, action: Callable[[], None]) -> None:
        persist(action, self._folder, seconds=self.job.storage_timeout)

    def _claim_folder(self) -> None:
        """Hold the folder, once the storages of the run and of its data are there."""
        # A folder made while the storage is away would be hidden or in the way when it is back.
        # A node's own scratch and data are another matter: nobody has been there before.
        job = self.job
        within = job.within if job.places.run_url is None else None
        data = job.data_folder if job.places.node_data is None else None
        for place in (within, data):
            if place is not None:
                Path(place).stat()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._claim = Claim(self._folder, take_over=job.takes_over)
        job.places.claim(self._folder, self._claim)

    def _build(self) -> None:
        config, places = parse_run_config(self.job.run_config), self.job.places
        check_batch(config.train.batch_size, self._group.size)
        last, own, start = self._folder / layout.LAST_DIR, None, None
        if self._group.is_main:
            for folder in (last, self._folder / layout.BEST_DIR):
                places.pull(folder)
            own = open_checkpoint(last) if is_there(last) else None
            if own is not None and config.init is not None:  # its source may be gone
                config = dataclasses.replace(config, init=own.config.init or config.init)
            elif config.init is not None:
                places.pull(Path(config.init.path))
                config = identified(config)
                start = config.init
        store = open_store(places.data(self.job.data_folder))
        self._trainer = Trainer(config, store, on_step=self._on_step, group=self._group)
        if start is not None:
            self._trainer.start_from(read_weights(Path(start.path)), start.reinit)
        resume = own is not None and self._go_on(self._trainer, own)
        self._trainer.follow_main()
        self._resumed = self._group.broadcast_object(resume)

    def _go_on(self, trainer: Trainer, own: Checkpoint) -> bool:
        """Load the own last checkpoint, or the one to adopt where it is no further; which it was.

        Returns:
            Whether the run goes on from its own.
        """
        if self.job.adopt is not None:
            folder = Path(self.job.adopt)
            self.job.places.pull(folder)
            other = open_checkpoint(folder)
            if own.training_state()["step"] <= other.metrics[layout.STEPS]:
                trainer.adopt(other, own)
                return False
        trainer.load(own)
        return True

    @property
    def trainer(self) -> Trainer:
        """The trainer; asserts that the run could be built."""
        assert self._trainer is not None, self._failed
        return self._trainer

    def step(self) -> dict[str, Any]:
        """Train to the next evaluation; flat metrics with `done`, or with `failure`.

        A report with `under_way` is none of those: `slice_seconds` have passed, and the next call
        goes on. Between two calls the run can be closed without losing a step.

        After a restart the first call only repeats the last report: the crash may have come
        between the checkpoint and the report. Whoever knows it already ignores it.
        """
        trainer = self._trainer
        if self._failed or trainer is None:
            return dict(self._failed)
        if self._resumed and trainer.metrics:
            self._resumed = False
            return {**trainer.metrics, **self._ending(trainer)}
        started, self._unsaved = time.perf_counter(), False
        seconds = self.job.slice_seconds
        until = math.inf if seconds is None else time.monotonic() + seconds
        try:
            metrics = trainer.advance(until)
            if metrics is not None and self._group.is_main:
                self._keep(trainer)
        except PeerLost:
            raise
        except Exception as error:
            self._fail(error)
            return dict(self._failed)
        self._busy_seconds += time.perf_counter() - started
        if metrics is None:
            self._unsaved = True
            under_way = {layout.UNDER_WAY: True, "done": False}
            return {layout.STEPS: trainer.step, layout.DEV_ACCURACY: 0.0, **under_way}
        return {**metrics, layout.PROCESS_SECONDS: self._busy_seconds, **self._ending(trainer)}

    def _ending(self, trainer: Trainer) -> dict[str, bool]:
        """Whether this piece ends here, and whether the run goes on later."""
        at = self.job.stop_at
        stop = at is not None and trainer.step >= at and trainer.interval is None
        waits = {layout.SEGMENT_ENDED: True} if stop and not trainer.finished else {}
        return {"done": stop or trainer.finished, **waits}

    def _keep(self, trainer: Trainer) -> None:
        """Write the checkpoints; what a storage that fails makes again is only the writing."""
        best = trainer.best_step == trainer.step
        notes = {layout.SAMPLES_FILE: predict_samples(trainer).to_json()} if best else {}
        best_folder, last_folder = self._folder / layout.BEST_DIR, self._folder / layout.LAST_DIR
        claim = self._claim
        assert claim is not None

        def save() -> None:
            claim.check()
            if best:
                trainer.save(best_folder, notes, claim.check)
                repeat_checkpoint(best_folder, last_folder, before_replacing=claim.check)
            else:
                trainer.save(last_folder, before_replacing=claim.check)

        self._persist(save)
        if best:
            self.job.places.push(best_folder, claim)
        self.job.places.push(last_folder, claim)

    def _fail(self, error: Exception) -> None:
        """Keep the traceback beside the run, and one line of it for the last report."""
        own = isinstance(error, DmxError)
        text = str(error) if own else f"{type(error).__name__}: {error}"
        self._failed = {
            layout.STEPS: 0 if self._trainer is None else self._trainer.step,
            layout.DEV_ACCURACY: 0.0,  # Tune insists on the metric, and nobody counts it
            layout.FAILURE: text.partition("\n")[0],
            "done": True,
            **({layout.RESUMABLE: True} if isinstance(error, StorageError) else {}),
        }
        if isinstance(error, TakenOverError):  # the folder is another's
            return
        with contextlib.suppress(OSError):
            (self._folder / layout.ERROR_FILE).write_text(traceback.format_exc(), encoding="utf-8")

    def _keep_unsaved(self, trainer: Trainer) -> None:
        """Write the last checkpoint in the middle of an interval; a run that ends does not wait."""
        claim, self._unsaved = self._claim, False
        if claim is None or self._failed:
            return
        try:
            claim.check()
            trainer.save(self._folder / layout.LAST_DIR, before_replacing=claim.check)
            self.job.places.push(self._folder / layout.LAST_DIR, claim)
        except (OSError, DmxError) as error:
            logger.warning("the steps since the last checkpoint are lost: %s", error)

    def close(self) -> None:
        """Free the trainer's thread and the device's memory, for the next run in this process.

        What was trained since the last evaluation is kept, unless a call of `step` was cut off.
        """
        if self._trainer is not None and self._unsaved:
            self._keep_unsaved(self._trainer)
        if self._claim is not None:
            self._claim.release()
            self._claim = None
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None
            if torch.cuda.is_initialized():
                gc.collect()  # an optimizer and its schedule hold each other, and the weights
                torch.cuda.empty_cache()


@functools.cache
def _pass_over_imports() -> None:
    """Once: what is still there stays, mostly modules; to look through it takes 0.2 s each time."""
    gc.freeze()


_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    *(
        (functools.partial(getattr, cudnn, name), functools.partial(setattr, cudnn, name))
        for name in ("benchmark", "deterministic")
    ),
)


@dataclass(frozen=True)
class ProcessState:
    """torch's process-wide switches. Threads and torch's random state are each run's own to set."""

    values: tuple[Any, ...]

    @classmethod
    def now(cls) -> ProcessState:
        return cls(tuple(read() for read, _ in _SWITCHES))

    def restore(self) -> None:
        """As they were; and what a former run compiled, drew or kept is forgotten."""
        for (_, put), value in zip(_SWITCHES, self.values, strict=True):
            put(value)
        random.seed(0)
        np.random.seed(0)  # nothing of ours draws from these two, but an added attention may
        if "torch._dynamo" in sys.modules:  # it takes a second to import, for nothing
            torch.compiler.reset()
        gc.collect()
        _pass_over_imports()
        give_back_memory()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
