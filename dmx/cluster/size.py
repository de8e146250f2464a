"""How much of a machine or cluster one worker of a curriculum gets, where nobody said."""

from __future__ import annotations

from dataclasses import dataclass

from dmx.cluster.connection import Resources, check_request, local_resources
from dmx.curriculum.stages import CurriculumConfig, StageConfig
from dmx.errors import ConfigError
from dmx.training.workers import Workers, check_batch, check_device, share_out


@dataclass(frozen=True, kw_only=True)
class Means:
    """CPU cores and GPUs: of the whole cluster, and of one run, with its workers."""

    num_cpus: float
    num_gpus: float
    cpus: float
    gpus: float
    workers: int | None = None

    def of(self, stage: StageConfig) -> tuple[float, float]:
        """(CPUs, GPUs) of one of the stage's runs."""
        cpus = self.cpus if stage.cpus is None else stage.cpus
        return cpus, self.gpus if stage.gpus is None else stage.gpus

    def shared_out(self, stage: StageConfig) -> Workers:
        """The processes that share the work of one of the stage's runs, and what each has.

        Raises:
            ConfigError: the numbers do not go together.
        """
        cpus, gpus = self.of(stage)
        workers = self.workers if stage.workers is None and not stage.gpus else stage.workers
        return share_out(cpus=cpus, gpus=gpus, workers=workers)


def local_means(
    curriculum: CurriculumConfig,
    cpus: float | None,
    gpus: float | None,
    workers: int | None = None,
    *,
    check: bool = True,
) -> Means:
    """The means of this machine, without starting Ray.

    Raises:
        ConfigError: a stage asks for more than there is.
    """
    return means_of(curriculum, local_resources(), cpus, gpus, workers, check=check)


def means_of(
    curriculum: CurriculumConfig,
    resources: Resources,
    cpus: float | None,
    gpus: float | None,
    workers: int | None = None,
    *,
    check: bool = True,
) -> Means:
    """Choose what the command line left open.

    With GPUs a worker has one of them and its share of the cores; without, the cores are shared
    by as many stages as could ever run at once. No
    worker exceeds the cluster's largest node.

    Raises:
        ConfigError: a stage asks for more than there is; Ray would wait for ever.
    """
    if gpus is None:
        gpus = 1.0 if resources.num_gpus else 0.0
    if cpus is None:
        runs = int(resources.num_gpus / gpus) if gpus else len(curriculum.leaves)
        largest = max((int(node[0]) for node in resources.nodes), default=resources.num_cpus)
        cpus = float(max(min(resources.num_cpus, largest) // max(runs, 1), 1))
    means = Means(
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        cpus=cpus,
        gpus=gpus,
        workers=workers,
    )
    for stage in curriculum.stages if check else ():
        wanted_cpus, wanted_gpus = means.of(stage)
        try:
            shared = means.shared_out(stage)
            count = shared.count
            check_request(resources, cpus=wanted_cpus, gpus=wanted_gpus, workers=count)
            check_batch(stage.config.train.batch_size, shared.count)
            check_device(stage.config.train.device, shared)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from None
    return means
