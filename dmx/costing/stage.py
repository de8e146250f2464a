"""What one stage of a curriculum, or any single run, costs: counted, measured and added up."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from dmx.config import RunConfig
from dmx.costing.count import StepCost, count_step
from dmx.costing.probe import Probe, probe_step
from dmx.costing.stand_in import stand_in
from dmx.data.store import Store

_SECONDS = 1.0
_COUNTED = 4
"""Examples: enough for a typical number of real tokens, which FLOPs and memory hang on."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """A run of `num_steps` steps with its evaluations.

    Attributes:
        step: what a step is made of, counted. probe: what it takes here, measured.
        total_seconds: of the whole run. input: what was measured on.
    """

    step: StepCost
    probe: Probe
    total_seconds: float
    input: str

    @property
    def memory_bytes(self) -> float:
        """Measured on a GPU; elsewhere weights, AdamW and what a micro batch keeps."""
        peak = self.probe.peak_memory_bytes
        return self.step.memory_bytes if peak is None else peak


def stage_cost(config: RunConfig, store: Store | None, num_dev: int, *, threads: int) -> StageCost:
    """Count and time a few steps; without data, on a few examples made for it.

    Args:
        num_dev: examples of the dev split. threads: CPU threads of a worker.
    """
    with contextlib.ExitStack() as stack:
        data = store or stack.enter_context(stand_in(config.task_info))
        step = count_step(config, data, examples=_COUNTED)
        probe = probe_step(config, data, num_threads=threads, seconds=_SECONDS, num_dev=num_dev)
        name = data.manifest.label if store is not None else data.manifest.data_name
    train = config.train
    evaluations = -(-train.num_steps // train.eval_every_steps)
    return StageCost(
        step=step,
        probe=probe,
        total_seconds=train.num_steps * probe.step_seconds + evaluations * probe.eval_seconds,
        input=name,
    )
