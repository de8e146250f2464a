"""How much of a machine or cluster a stage gets, and what is under way there."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from dmx.cluster.capacity import Resources, check_request
from dmx.curriculum.config import CurriculumConfig, StageConfig
from dmx.curriculum.planner import Launch
from dmx.errors import ConfigError
from dmx.training.job import Workers, check_batch, check_device, share_out


@dataclass(frozen=True, kw_only=True)
class ResourcePlan:
    """CPU cores and GPUs: of the whole cluster, and of one run, with its workers."""

    num_cpus: float
    num_gpus: float
    cpus: float
    gpus: float
    workers: int | None = None

    def request_for(self, stage: StageConfig) -> tuple[float, float]:
        """(CPUs, GPUs) of one of the stage's runs."""
        cpus = self.cpus if stage.cpus is None else stage.cpus
        return cpus, self.gpus if stage.gpus is None else stage.gpus

    def workers_for(self, stage: StageConfig) -> Workers:
        """The processes that share the work of one of the stage's runs, and what each has.

        Raises:
            ConfigError: the numbers do not go together.
        """
        cpus, gpus = self.request_for(stage)
        workers = self.workers if stage.workers is None and not stage.gpus else stage.workers
        return share_out(cpus=cpus, gpus=gpus, workers=workers)


def plan_resources(
    curriculum: CurriculumConfig,
    resources: Resources,
    *,
    cpus: float | None,
    gpus: float | None,
    workers: int | None,
    check: bool = True,
) -> ResourcePlan:
    """Choose what the command line left open.

    With GPUs a run has one of them and its share of the cores; without, the cores are shared by as
    many stages as could ever run at once. No run exceeds the cluster's largest node.

    Raises:
        ConfigError: a stage asks for more than there is; Ray would wait for ever.
    """
    if gpus is None:
        gpus = 1.0 if resources.num_gpus else 0.0
    if cpus is None:
        runs = int(resources.num_gpus / gpus) if gpus else len(curriculum.leaves)
        largest = max((int(node[0]) for node in resources.nodes), default=resources.num_cpus)
        cpus = float(max(min(resources.num_cpus, largest) // max(runs, 1), 1))
    plan = ResourcePlan(
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        cpus=cpus,
        gpus=gpus,
        workers=workers,
    )
    for stage in curriculum.stages if check else ():
        wanted_cpus, wanted_gpus = plan.request_for(stage)
        try:
            shared = plan.workers_for(stage)
            check_request(resources, cpus=wanted_cpus, gpus=wanted_gpus, workers=shared.count)
            check_batch(stage.config.train.batch_size, shared.count)
            check_device(stage.config.train.device, shared)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from None
    return plan


class Key(NamedTuple):
    """Names a piece of work: what it is, for which stage, and what else tells it apart."""

    kind: Literal["train", "data", "test"]
    stage: str
    detail: str = ""


@dataclass
class Allocation:
    """Work under way, and what it occupies. `launch`: of a stage."""

    cpus: float = 0.0
    gpus: float = 0.0
    launch: Launch | None = None
    begun: float = field(default_factory=time.monotonic)


class ResourcePool:
    """The cluster's CPUs and GPUs, less what is under way."""

    def __init__(self, plan: ResourcePlan) -> None:
        self.plan = plan
        self.allocated: dict[Key, Allocation] = {}

    def under_way(self, kind: str) -> list[Key]:
        return [key for key in self.allocated if key.kind == kind]

    def free(self) -> tuple[float, float]:
        """(CPUs, GPUs) that nothing occupies."""
        cpus = self.plan.num_cpus - sum(a.cpus for a in self.allocated.values())
        return cpus, self.plan.num_gpus - sum(a.gpus for a in self.allocated.values())

    def fits(self, stage: StageConfig) -> bool:
        """Whether one run of the stage could start now."""
        cpus, gpus = self.plan.request_for(stage)
        free_cpus, free_gpus = self.free()
        return cpus <= free_cpus + 1e-9 and gpus <= free_gpus + 1e-9

    def slots(self, cpus: float, gpus: float) -> int:
        """How many runs of this size fit, at least one."""
        free_cpus, free_gpus = self.free()
        rooms = [free_cpus / cpus] if cpus else []
        rooms += [free_gpus / gpus] if gpus else []
        return max(int(min(rooms, default=1.0) + 1e-9), 1)
