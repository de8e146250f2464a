"""What a call of `dmx.tune` asks for: task, space and overrides, and the study made of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dmx.attention.base import split_name
from dmx.cli import tune_search
from dmx.cluster import gpu_packing
from dmx.cluster.capacity import Resources
from dmx.costs.measure import check_memory
from dmx.errors import ConfigError
from dmx.registry import shipped_names
from dmx.schema import flatten, parse_assignments
from dmx.search.space import SearchSpace, load_space
from dmx.storage.layout import SHARED_FILESYSTEM, StorageLayout
from dmx.study.budget import Budget, fit_budget
from dmx.study.study import StudyConfig
from dmx.tasks import Task, task_for
from dmx.training.job import check_batch


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The command's options with the names in them looked up.

    Attributes:
        space: what is searched, with the overrides no longer in it.
        overrides: dotted values that hold for every trial.
    """

    args: argparse.Namespace
    task: Task
    space: SearchSpace
    overrides: Mapping[str, Any]

    @property
    def _known(self) -> Mapping[str, Any]:
        """The settings of the study that is continued: another machine would choose others."""
        known: Mapping[str, Any] = self.args.record.get("settings", {})
        return known

    @property
    def _chosen(self) -> dict[str, Any]:
        overrides = self._known.get("overrides", {})
        return {k: v for k, v in overrides.items() if k != "train.num_steps"}

    def budget(self, resources: Resources, trials_per_gpu: int | None = None) -> Budget:
        """How much to train with such resources."""
        args, known = self.args, self._known
        return fit_budget(
            self.task,
            resources,
            {**self._chosen, **self.space.defaults},
            searched=self.space.names(),
            num_trials=_first(args.num_trials, known.get("num_trials")),
            max_steps=_first(args.max_steps, known.get("max_steps")),
            trials_per_gpu=trials_per_gpu or gpu_packing.wanted(args.trials_per_gpu),
            cpus_per_trial=args.cpus_per_trial,
            gpus_per_trial=args.gpus_per_trial,
            workers_per_trial=args.workers_per_trial,
        )

    def fixed(self, budget: Budget) -> dict[str, Any]:
        """Dotted values of every trial."""
        return {**self._chosen, **self.overrides, **budget.settings}

    def check(self, budget: Budget) -> None:
        """Build the experiment at every corner of the space.

        Raises:
            ConfigError: one is impossible, does not fit this machine, or its batch cannot be
                shared out.
        """
        self.space.check(self.task.name, self.fixed(budget))
        runs = []
        for corner in self.space.corners():
            config = self.space.run_config(self.task.name, self.fixed(budget), corner)
            check_batch(config.train.batch_size, budget.workers)
            at = ", ".join(f"{k}={v}" for k, v in corner.items()) or "its defaults"
            runs.append((f"search space {self.space.name} at {at}: ", config))
        if self.args.address is None:  # a cluster's machines are others
            check_memory(runs, torch.device("cuda" if budget.gpus else "cpu"))

    def study(
        self, budget: Budget, name: str, places: StorageLayout = SHARED_FILESYSTEM
    ) -> StudyConfig:
        """The study to run."""
        args = self.args
        rungs: dict[str, Any] = {"grace_steps": budget.grace_steps, **tune_search.rungs(args)}
        return StudyConfig(
            name=name,
            task=self.task.name,
            space=self.space,
            overrides=self.fixed(budget),
            num_trials=budget.num_trials,
            max_steps=budget.max_steps,
            **rungs,
            scheduler=args.scheduler,
            sampler=args.sampler,
            objectives=args.objectives,
            seed=args.seed,
            cpus_per_trial=budget.cpus,
            gpus_per_trial=budget.gpus,
            workers_per_trial=budget.workers,
            time_budget_seconds=args.time_budget,
            trial_timeout_seconds=args.trial_timeout,
            storage_timeout=args.storage_patience,
            places=places,
        )


def _first(given: int | None, known: int | None) -> int | None:
    return known if given is None else given


def make_plan(args: argparse.Namespace) -> Plan:
    """Look up the names; everything that needs no data and no cluster is checked here.

    Raises:
        ConfigError: what is asked for does not exist, or contradicts itself.
    """
    if args.attention is None or args.task is None:
        raise ConfigError("give --attention and --task, or --resume RUN.")
    task = task_for(args.task)
    config_class, size = split_name(args.attention)
    overrides = flatten(parse_assignments(args.set))
    if size is not None:
        key = f"attention.{config_class.size_field}"
        if overrides.setdefault(key, size) != size:
            raise ConfigError(f"--attention {args.attention} and --set {key} contradict.")
    name = args.space or config_class.name
    if args.space is None and name not in shipped_names("search_spaces"):
        raise ConfigError(f"attention {name!r} has no search space of its own; give --space FILE.")
    space = load_space(name, task.name, task.family)
    if space.attention != config_class.name:
        raise ConfigError(
            f"search space {name} is for attention {space.attention!r}, not {config_class.name!r}."
        )
    for key in ("task", "attention", "attention.name"):
        if key in overrides:
            raise ConfigError(f"--set {key} is not possible; use --attention and --task.")
    if "data.root" in {**space.defaults, **overrides, **space.distributions()}:
        raise ConfigError("data.root is not possible in a search; use --data-root.")
    return Plan(args=args, task=task, space=space.without(overrides), overrides=overrides)
