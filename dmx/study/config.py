"""What a study searches, and with what means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dmx.runs.objectives import DEFAULT
from dmx.runs.study import SamplerKind, SchedulerKind
from dmx.schema import to_dict
from dmx.search.space import SearchSpace
from dmx.storage.files import STORAGE_TIMEOUT
from dmx.storage.layout import SHARED_FILESYSTEM, StorageLayout
from dmx.training.job import Workers, share_out


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What a study searches, and with what means.

    Attributes:
        name: folder below the run root. task: what is trained.
        space: what is searched, with overridden values already fixed.
        overrides: dotted values that hold for every trial.
        num_trials: trials in all. max_steps: optimizer steps of a full trial.
        grace_steps: steps before ASHA may stop a trial. reduction_factor: of ASHA.
        objectives: names, accuracy first (see objectives.OBJECTIVES).
        cpus_per_trial, gpus_per_trial: resources of one trial; fractions of a GPU are allowed.
        workers_per_trial: processes that share a trial's work; as many as it has whole GPUs.
        time_budget_seconds: stop then, continuable; None has no limit.
        max_failures: restarts of one trial after a dead worker or node, without getting further.
        trial_timeout_seconds: without a report for so long a trial's process is killed; None:
            see watchdog.patience.
        storage_timeout: how long to wait for a storage that is full, read-only or gone.
        reuse_actors: keep a worker process for the next trial (saves its start of seconds).
        places: object storage and local copies (see training.job.Job).
    """

    name: str
    task: str
    space: SearchSpace
    overrides: Mapping[str, Any] = field(default_factory=dict)
    num_trials: int
    max_steps: int
    grace_steps: int
    reduction_factor: float = 3.0
    scheduler: SchedulerKind = "asha"
    sampler: SamplerKind = "tpe"
    objectives: tuple[str, ...] = DEFAULT
    seed: int = 0
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    workers_per_trial: int = 1
    time_budget_seconds: float | None = None
    max_failures: int = 3
    trial_timeout_seconds: float | None = None
    storage_timeout: float = STORAGE_TIMEOUT
    reuse_actors: bool = True
    places: StorageLayout = SHARED_FILESYSTEM

    @property
    def workers(self) -> Workers:
        """The processes of one trial, and what each of them has."""
        return share_out(
            cpus=self.cpus_per_trial, gpus=self.gpus_per_trial, workers=self.workers_per_trial
        )

    def trial_config(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The plain RunConfig of the trial at `point`."""
        plain = to_dict(self.space.run_config(self.task, self.overrides, point))
        assert isinstance(plain, dict)
        return plain
