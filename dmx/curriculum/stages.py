"""Stages: what a curriculum consists of, every value decided and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dmx.config import RunConfig
from dmx.errors import ConfigError
from dmx.gates import Gate
from dmx.records import SamplerKind, SchedulerKind
from dmx.registry import choices_message
from dmx.schema import from_dict, to_dict
from dmx.search.brackets import LEAST_FACTOR
from dmx.search.space import SearchSpace


@dataclass(frozen=True, kw_only=True)
class OnFail:
    """What happens when the gate says no.

    Attributes:
        action: `stop` ends the run; `retry` trains again with new seeds; `longer` trains on, for
            `factor` times the steps of the attempt before, from its best checkpoint (with
            `afresh`: from where the stage itself starts); `continue` promotes all the same.
        times: how often, for retry and longer.
        then: what follows when they are used up: `stop`, or `continue` with the best attempt.
    """

    action: Literal["stop", "retry", "longer", "continue"] = "stop"
    times: int = 1
    factor: float = 2.0
    afresh: bool = False
    then: Literal["stop", "continue"] = "stop"

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ConfigError(f"times is {self.times}; it must be at least 1.")
        if not 0.1 <= self.factor <= 100:
            raise ConfigError(f"factor is {self.factor}; it must lie between 0.1 and 100.")

    @classmethod
    def parse(cls, value: object, path: str) -> OnFail:
        """From an action's name or a mapping."""
        return from_dict(cls, {"action": value} if isinstance(value, str) else value, path)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """How missing data are generated; None takes the task's own value (see dmx.data)."""

    num_images: int | None = None
    seed: int | None = None
    render: Literal["original", "lra"] | None = None

    def options(self) -> dict[str, Any]:
        """The values that are set."""
        return {k: v for k, v in vars(self).items() if v is not None}


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A stage that is a study; its best trial is promoted.

    Attributes:
        space: a search space's name or path. What it searches wins over the curriculum's values.
        num_trials: trials in all. scheduler, sampler: those of `dmx.tune`.
        grace_steps: steps before ASHA or Hyperband may stop a trial, or between two comparisons of
            a population; None takes an eighth of the stage's steps. seed: of the sampler.
    """

    space: str
    num_trials: int = 8
    scheduler: SchedulerKind = "asha"
    sampler: SamplerKind = "tpe"
    grace_steps: int | None = None
    reduction_factor: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_trials < 1:
            raise ConfigError(f"num_trials is {self.num_trials}; it must be at least 1.")
        if self.grace_steps is not None and self.grace_steps < 1:
            raise ConfigError(f"grace_steps is {self.grace_steps}; it must be at least 1.")
        if not LEAST_FACTOR <= self.reduction_factor < math.inf:
            raise ConfigError(
                f"reduction_factor is {self.reduction_factor}; it must be at least {LEAST_FACTOR} "
                "and finite."
            )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage, with every value decided.

    Attributes:
        parent: the stage whose best checkpoint starts this one, or None.
        init_path: weights on disk that start it (checkpoint folder or .model file), or None.
        space: of a stage that is a search, with what the curriculum fixed already fixed.
        cpus, gpus: of the stage's run; None lets the command line or the cluster decide.
        workers: processes that share the run's work; None is one for each of its GPUs.
    """

    name: str
    config: RunConfig
    parent: str | None
    init_path: str | None
    reinit: tuple[str, ...]
    gate: Gate
    on_fail: OnFail
    search: SearchConfig | None
    space: SearchSpace | None
    overrides: Mapping[str, Any]
    generate: Generate
    cpus: float | None
    gpus: float | None
    workers: int | None = None

    @property
    def task(self) -> str:
        """The task's name."""
        return self.config.task

    def training(self) -> dict[str, Any]:
        """Plain values of all that decides what is trained; the same values, the same result."""
        search = to_dict(self.search) if self.search else None
        space = self.space.plain(self.overrides) if self.space else {}
        return {
            **to_dict(self.config),
            "init_from": self.parent or self.init_path,
            "reinit": list(self.reinit),
            "generate": self.generate.options(),
            **({"search": search, "space": space} if search else {}),
        }

    def judging(self) -> dict[str, Any]:
        """Plain values of what decides whether the result is promoted."""
        return {"gate": self.gate.to_plain(), "on_fail": to_dict(self.on_fail)}

    def brief(self) -> dict[str, Any]:
        """What a report says of a stage that is still to come."""
        return {
            "name": self.name,
            "task": self.task,
            "parent": self.parent,
            "attention": self.config.attention.label,
        }

    def plain(self) -> dict[str, Any]:
        """All of it, for curriculum.yaml and the journal."""
        return {"name": self.name, **self.training(), **self.judging()}


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """A chain or a tree of stages, in the file's order; parents stand before their children."""

    name: str
    stages: tuple[StageConfig, ...]

    def stage(self, name: str) -> StageConfig:
        """The stage called `name`.

        Raises:
            ConfigError: no such stage; lists them.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"stage {choices_message(name, [s.name for s in self.stages])}.")

    def chain(self, name: str) -> tuple[StageConfig, ...]:
        """The stage and its ancestors, the oldest first."""
        stage = self.stage(name)
        above = self.chain(stage.parent) if stage.parent is not None else ()
        return (*above, stage)

    def descendants(self, name: str) -> tuple[str, ...]:
        """The stage and all that start from it, directly or not, in the file's order."""
        self.stage(name)
        return tuple(s.name for s in self.stages if name in [a.name for a in self.chain(s.name)])

    def until(self, name: str) -> tuple[str, ...]:
        """The stage, and the ones before it in the file."""
        names = [s.name for s in self.stages]
        self.stage(name)
        return tuple(names[: names.index(name) + 1])

    @property
    def last(self) -> StageConfig:
        """The end of the longest chain, the file's first of several: a branch does not take over.

        Its test split is the one that every stage is measured on.
        """
        return max(self.stages, key=lambda s: len(self.chain(s.name)))

    @property
    def leaves(self) -> tuple[str, ...]:
        """Stages from which no other starts."""
        parents = {s.parent for s in self.stages}
        return tuple(s.name for s in self.stages if s.name not in parents)
