"""What is under way, and how much of the cluster that leaves."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from dmx.cluster.size import Means
from dmx.curriculum.planner import Launch
from dmx.curriculum.stages import StageConfig
from dmx.curriculum.work import Key


@dataclass
class Busy:
    """Work under way, and what it occupies. `launch`: of a stage. `begun`: when."""

    cpus: float = 0.0
    gpus: float = 0.0
    launch: Launch | None = None
    begun: float = field(default_factory=time.monotonic)


class Room:
    """The cluster's CPUs and GPUs, less what is under way."""

    def __init__(self, means: Means) -> None:
        self.means = means
        self.busy: dict[Key, Busy] = {}

    def free(self) -> tuple[float, float]:
        """(CPUs, GPUs) that nothing occupies."""
        cpus = self.means.num_cpus - sum(b.cpus for b in self.busy.values())
        return cpus, self.means.num_gpus - sum(b.gpus for b in self.busy.values())

    def fits(self, stage: StageConfig) -> bool:
        """Whether one worker of the stage could start now."""
        cpus, gpus = self.means.of(stage)
        free_cpus, free_gpus = self.free()
        return cpus <= free_cpus + 1e-9 and gpus <= free_gpus + 1e-9

    def slots(self, cpus: float, gpus: float) -> int:
        """How many workers of this size fit, at least one."""
        free_cpus, free_gpus = self.free()
        rooms = [free_cpus / cpus] if cpus else []
        rooms += [free_gpus / gpus] if gpus else []
        return max(int(min(rooms, default=1.0) + 1e-9), 1)
