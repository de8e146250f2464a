"""What a study searches, and with what means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dmx.objectives import DEFAULT
from dmx.schema import to_dict
from dmx.space import SearchSpace


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
        time_budget_seconds: stop then, continuable; None has no limit.
        max_failures: restarts of one trial after a dead worker or node.
        reuse_actors: keep a worker process for the next trial (saves its start of seconds).
        init_from, reinit: weights that every trial starts from (see runner.Job).
    """

    name: str
    task: str
    space: SearchSpace
    overrides: Mapping[str, Any] = field(default_factory=dict)
    num_trials: int
    max_steps: int
    grace_steps: int
    reduction_factor: float = 3.0
    scheduler: Literal["asha", "hyperband", "pbt", "none"] = "asha"
    sampler: Literal["tpe", "random", "cmaes", "gp", "nsga2"] = "tpe"
    objectives: tuple[str, ...] = DEFAULT
    seed: int = 0
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    time_budget_seconds: float | None = None
    max_failures: int = 3
    reuse_actors: bool = True
    init_from: str | None = None
    reinit: tuple[str, ...] = ()

    def trial_config(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The plain RunConfig of the trial at `point`."""
        plain = to_dict(self.space.run_config(self.task, self.overrides, point))
        assert isinstance(plain, dict)
        return plain
