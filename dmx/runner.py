"""One run in one process: build or resume a Trainer, keep its best and last checkpoint, report."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dmx import records as keys
from dmx.adopt import adopt
from dmx.checkpoint import open_checkpoint, read_weights, transfer
from dmx.claim import Claim
from dmx.config import parse_run_config
from dmx.data.store import open_store
from dmx.errors import DmxError
from dmx.model import Classifier
from dmx.trainer import Diverged, Trainer


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to know to do a run; plain values, so that it can be sent anywhere.

    Attributes:
        run_config: the experiment (RunConfig as a plain dict).
        data_folder: the prepared store. folder: where checkpoints go, on storage all nodes see.
        threads: CPU threads. init_from: weights to start from (checkpoint folder or .model file).
        reinit: parameters that may keep fresh values then (see checkpoint.transfer).
        stop_at: end this piece at that optimizer step; the run itself goes on in another job.
        adopt: a checkpoint to go on from with this config's settings, where the run's own last one
            is not beyond it (see adopt.adopt).
    """

    run_config: Mapping[str, Any]
    data_folder: str
    folder: str
    threads: int = 1
    init_from: str | None = None
    reinit: tuple[str, ...] = field(default=())
    stop_at: int | None = None
    adopt: str | None = None


class Runner:
    """Steps through a job, one evaluation at a time.

    An exception is the run's own fault: it becomes a report with `failure`, since starting the
    same thing again would end the same way. Only a dead process is worth another try.

    Args:
        job: the run. on_step: see Trainer.
    """

    def __init__(self, job: Job, on_step: Callable[[int, int], None] | None = None) -> None:
        self.job = job
        self._on_step = on_step
        self._folder = Path(job.folder)
        self._trainer: Trainer | None = None
        self._claim: Claim | None = None
        self._failure: str | None = None
        self._resumed = False
        self._busy_seconds = 0.0
        torch.set_num_threads(job.threads)
        started = time.perf_counter()
        try:
            self._build()
        except Exception as error:
            self._fail(error)
        self._busy_seconds = time.perf_counter() - started

    def _build(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._claim = Claim(self._folder)
        last = self._folder / keys.LAST_DIR
        resume = last.exists() or (last.parent / f".{last.name}.old").exists()
        config = parse_run_config(self.job.run_config)
        store = open_store(Path(self.job.data_folder))
        start = None if resume or self.job.init_from is None else self._take_weights
        self._trainer = Trainer(config, store, on_step=self._on_step, before_training=start)
        if resume:
            own = open_checkpoint(last)
            other = None if self.job.adopt is None else open_checkpoint(Path(self.job.adopt))
            if other is not None and own.metrics[keys.STEPS] <= other.metrics[keys.STEPS]:
                adopt(self._trainer, other, own)
            else:
                self._trainer.load(own)
                self._resumed = True

    def _take_weights(self, model: Classifier) -> None:
        assert self.job.init_from is not None
        transfer(model, read_weights(Path(self.job.init_from)), self.job.reinit)

    @property
    def trainer(self) -> Trainer:
        """The trainer; asserts that the run could be built."""
        assert self._trainer is not None, self._failure
        return self._trainer

    def step(self) -> dict[str, Any]:
        """Train to the next evaluation; flat metrics with `done`, or with `failure`.

        After a restart the first call only repeats the last report: the crash may have come
        between the checkpoint and the report. Whoever knows it already ignores it.
        """
        trainer = self._trainer
        if self._failure is not None or trainer is None:
            return self._failed()
        if self._resumed and trainer.metrics:
            self._resumed = False
            return {**trainer.metrics, **self._ending(trainer)}
        started = time.perf_counter()
        try:
            metrics = trainer.advance()
            if trainer.best_step == trainer.step:
                trainer.save(self._folder / keys.BEST_DIR)
            trainer.save(self._folder / keys.LAST_DIR)
        except Exception as error:
            self._fail(error)
            return self._failed()
        self._busy_seconds += time.perf_counter() - started
        return {**metrics, keys.PROCESS_SECONDS: self._busy_seconds, **self._ending(trainer)}

    def _ending(self, trainer: Trainer) -> dict[str, bool]:
        """Whether this piece ends here, and whether the run goes on later."""
        stop = self.job.stop_at is not None and trainer.step >= self.job.stop_at
        waits = {keys.WAITS: True} if stop and not trainer.finished else {}
        return {"done": stop or trainer.finished, **waits}

    def _fail(self, error: Exception) -> None:
        """Keep the traceback beside the run, and one line of it for the report."""
        own = isinstance(error, DmxError | Diverged)
        text = str(error) if own else f"{type(error).__name__}: {error}"
        self._failure = next(iter(text.splitlines()), "") or type(error).__name__
        with contextlib.suppress(OSError):
            (self._folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")

    def _failed(self) -> dict[str, Any]:
        """A last report; Tune insists on the metric, and nobody counts it."""
        step = 0 if self._trainer is None else self._trainer.step
        return {keys.STEPS: step, keys.DEV_ACCURACY: 0.0, keys.FAILURE: self._failure, "done": True}

    def close(self) -> None:
        """Free the trainer's thread and the device's memory, for the next run in this process."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def evaluate_checkpoint(
    checkpoint_folder: str, data_folder: str, split: str, threads: int
) -> dict[str, float]:
    """{"loss", "accuracy", "num_examples"} of a checkpoint over a whole split of any store.

    Raises:
        CheckpointError, DataError: either is missing or damaged, or they do not fit.
    """
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(Path(checkpoint_folder))
    trainer = Trainer(checkpoint.config, open_store(Path(data_folder)))
    try:
        trainer.load_weights(checkpoint)
        result = trainer.evaluate(split)
    finally:
        trainer.close()
    return {
        "loss": result.loss,
        "accuracy": result.accuracy,
        "num_examples": result.num_examples,
    }
