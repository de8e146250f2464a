"""What one optimizer step costs, measured: a few real steps and evaluations on this machine."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch

from dmx.config import RunConfig
from dmx.costing.count import threads
from dmx.data.batches import eval_batches
from dmx.data.store import Store
from dmx.trainer import Trainer


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
    config: RunConfig, store: Store, *, num_threads: int = 1, seconds: float = 6.0
) -> Probe:
    """Time real optimizer steps, and evaluation, for about `seconds`; nothing is written."""
    train = dataclasses.replace(
        config.train, compile=False, num_steps=max(config.train.num_steps, 64)
    )
    with threads(num_threads), torch.random.fork_rng():
        trainer = Trainer(dataclasses.replace(config, train=train), store)
        try:
            return _time(trainer, seconds)
        finally:
            trainer.close()


def _time(trainer: Trainer, seconds: float) -> Probe:
    device = trainer.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer.model.train()
    started, times = time.perf_counter(), []
    for step in range(40):
        batch = trainer.batches(step)
        before = time.perf_counter()
        trainer._optimizer_step(batch)  # exactly what training does
        _wait(device)
        times.append(time.perf_counter() - before)
        if step and time.perf_counter() - started > 0.7 * seconds:
            break
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    trainer.model.eval()
    dev = trainer.store.split("dev")
    size = trainer.passes.evaluation.size
    seen, before = 0, time.perf_counter()
    with torch.no_grad():
        for batch in eval_batches(dev, size, trainer.length, device):
            trainer.passes.logits(batch)
            _wait(device)
            seen += len(batch.labels)
            if time.perf_counter() - before > 0.3 * seconds:
                break
    eval_seconds = (time.perf_counter() - before) * len(dev) / max(seen, 1)
    timed = sorted(times[1:])
    return Probe(
        step_seconds=timed[len(timed) // 2],
        eval_seconds=eval_seconds,
        peak_memory_bytes=None if peak is None else float(peak),
        steps=len(timed),
        device=device.type,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
