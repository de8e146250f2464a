"""What one optimizer step costs, measured: a few real steps and evaluations on this machine."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch

from dmx.config import RunConfig, TrainConfig
from dmx.costing.count import threads
from dmx.data.batches import eval_batches
from dmx.data.store import Store
from dmx.nn.device import pick_device
from dmx.training.trainer import Trainer

_CPU_POSITIONS = 65536
"""Positions, masked ones included, of a step that is timed on a CPU; a larger batch is timed in
part and its time multiplied, since on a CPU it grows with the examples."""
_MOST_STEPS = 40


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Measured times.

    Attributes:
        step_seconds: of an optimizer step, the median. eval_seconds: of the whole dev split,
            estimated from a few batches. peak_memory_bytes: of the GPU, or None.
        steps: how many were timed, after one to warm up. device: "cpu", "cuda" or "mps".
    """

    step_seconds: float
    eval_seconds: float
    peak_memory_bytes: float | None
    steps: int
    device: str


def probe_step(
    config: RunConfig,
    store: Store,
    *,
    num_threads: int = 1,
    seconds: float = 6.0,
    num_dev: int | None = None,
) -> Probe:
    """Time real optimizer steps, and evaluation, for about `seconds`; nothing is written.

    Args:
        num_threads: CPU threads of a worker.
        num_dev: examples of the dev split; None takes the store's.
    """
    whole = config.train.batch_size
    length = config.model.max_length or config.task_info.max_length
    on_cpu = pick_device(config.train.device).type == "cpu"
    train = _part(config.train, max(_CPU_POSITIONS // length, 1)) if on_cpu else config.train
    # Enough steps for a schedule, however few the run has.
    train = dataclasses.replace(train, compile=False, num_steps=max(train.num_steps, 64))
    with threads(num_threads), torch.random.fork_rng():
        trainer = Trainer(dataclasses.replace(config, train=train), store)
        try:
            return _time(trainer, seconds, whole / train.batch_size, num_dev)
        finally:
            trainer.close()


def _part(train: TrainConfig, most: int) -> TrainConfig:
    """The same with a batch of at most `most` examples, in whole micro batches where that goes."""
    if train.batch_size <= most:
        return train
    micro = train.micro_batch_size or train.batch_size
    size = max(most // micro * micro, min(most, micro))
    return dataclasses.replace(
        train, batch_size=size, micro_batch_size=micro if size > micro else None
    )


def _time(trainer: Trainer, seconds: float, times: float, num_dev: int | None) -> Probe:
    """Measure; an optimizer step of the run is `times` as long as one of the trainer."""
    device = trainer.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started, measured = time.perf_counter(), []
    for step in range(_MOST_STEPS):
        batch = trainer.batches(step)
        before = time.perf_counter()
        trainer.train_step(batch)  # exactly what training does
        _wait(device)
        measured.append(time.perf_counter() - before)
        if step and time.perf_counter() - started > 0.7 * seconds:
            break
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    dev = trainer.store.split("dev")
    seen, before = 0, time.perf_counter()
    for batch in eval_batches(dev, trainer.passes.evaluation.size, trainer.length, device):
        trainer.probabilities(batch)
        _wait(device)
        seen += len(batch.labels)
        if time.perf_counter() - before > 0.3 * seconds:
            break
    per_example = (time.perf_counter() - before) / max(seen, 1)
    timed = sorted(measured[1:])
    return Probe(
        step_seconds=timed[len(timed) // 2] * times,
        eval_seconds=per_example * (len(dev) if num_dev is None else num_dev),
        peak_memory_bytes=None if peak is None else float(peak),
        steps=len(timed),
        device=device.type,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
