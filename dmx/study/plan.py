"""What a caller asks of a study: its options, and all that is checked before it starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dmx.attention import AttentionConfig
from dmx.cluster import capacity
from dmx.cluster.capacity import Resources
from dmx.costs.measure import check_memory
from dmx.data.store import Store
from dmx.errors import ConfigError
from dmx.registry import code_version, shipped_names
from dmx.runs.run import Run
from dmx.runs.study import SamplerKind, SchedulerKind
from dmx.runs.trial import parse_objectives
from dmx.search import warm_start
from dmx.search.rungs import LEAST_FACTOR
from dmx.search.samplers import check_sampler, independent
from dmx.search.schedulers import check_population
from dmx.search.space import SearchSpace, load_space
from dmx.storage.files import STORAGE_TIMEOUT
from dmx.storage.remote import SHARED_FILESYSTEM, StorageLayout
from dmx.study import folder as study_folder
from dmx.study import results as study_results
from dmx.study.budget import Budget, fit_budget
from dmx.study.study import StudyConfig
from dmx.study.views import Output
from dmx.tasks import Task, task_for
from dmx.training.job import check_batch

logger = logging.getLogger("dmx.tune")


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What a caller asks of a study; the options of `dmx.tune`, by their names.

    Attributes:
        overrides: dotted settings of every trial. time_budget, trial_timeout, storage_patience:
            seconds. resume: continue the study that is there. Others: see `dmx.tune --help`.
    """

    attention: str | None = None
    task: str | None = None
    space: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    storage: str = "runs"
    scratch: str | None = None
    data_root: str | None = None
    node_data: str | None = None
    prepare: bool = True
    num_trials: int | None = None
    max_steps: int | None = None
    objective: str = "accuracy"
    scheduler: SchedulerKind | None = None
    grace_steps: int | None = None
    reduction_factor: float | None = None
    sampler: SamplerKind = "tpe"
    warm_start: Sequence[str] = ()
    seed: int = 0
    final_seeds: int = 0
    time_budget: float | None = None
    trial_timeout: float | None = None
    storage_patience: float = STORAGE_TIMEOUT
    cpus_per_trial: float | None = None
    gpus_per_trial: float | None = None
    workers_per_trial: int | None = None
    trials_per_gpu: str | None = None
    max_concurrent_trials: int | None = None
    address: str | None = None
    output: Output = "auto"
    resume: bool = False

    @property
    def default_name(self) -> str | None:
        """The study's name where none is given."""
        if not self.attention or not self.task:
            return None
        return f"{self.attention}-{task_for(self.task).name}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study's options with the names in them looked up.

    Attributes:
        space: what is searched, with the overrides no longer in it.
        overrides: dotted values that hold for every trial.
        known: the settings of the study that is continued: another machine would choose others.
    """

    options: StudyOptions
    task: Task
    space: SearchSpace
    overrides: Mapping[str, Any]
    objectives: tuple[str, ...]
    scheduler: SchedulerKind
    known: Mapping[str, Any]

    @property
    def _chosen(self) -> dict[str, Any]:
        overrides = self.known.get("overrides", {})
        return {k: v for k, v in overrides.items() if k != "train.num_steps"}

    def budget(self, resources: Resources, trials_per_gpu: int | None = None) -> Budget:
        """How much to train with such resources."""
        options, known = self.options, self.known
        return fit_budget(
            self.task,
            resources,
            {**self._chosen, **self.space.defaults},
            searched=self.space.names(),
            num_trials=_first(options.num_trials, known.get("num_trials")),
            max_steps=_first(options.max_steps, known.get("max_steps")),
            trials_per_gpu=trials_per_gpu or capacity.wanted_per_gpu(options.trials_per_gpu),
            cpus_per_trial=options.cpus_per_trial,
            gpus_per_trial=options.gpus_per_trial,
            workers_per_trial=options.workers_per_trial,
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
        if self.options.address is None:  # a cluster's machines are others
            check_memory(runs, torch.device("cuda" if budget.gpus else "cpu"))

    def study(
        self, budget: Budget, name: str, places: StorageLayout = SHARED_FILESYSTEM
    ) -> StudyConfig:
        """The study to run."""
        options = self.options
        rungs: dict[str, Any] = {"grace_steps": budget.grace_steps, **_rungs(options)}
        return StudyConfig(
            name=name,
            task=self.task.name,
            space=self.space,
            overrides=self.fixed(budget),
            num_trials=budget.num_trials,
            max_steps=budget.max_steps,
            **rungs,
            scheduler=self.scheduler,
            sampler=options.sampler,
            objectives=self.objectives,
            seed=options.seed,
            cpus_per_trial=budget.cpus,
            gpus_per_trial=budget.gpus,
            workers_per_trial=budget.workers,
            time_budget_seconds=options.time_budget,
            trial_timeout_seconds=options.trial_timeout,
            storage_timeout=options.storage_patience,
            places=places,
        )


def _first(given: int | None, known: int | None) -> int | None:
    return known if given is None else given


def make_plan(options: StudyOptions, known: Mapping[str, Any]) -> Plan:
    """Look up the names; everything that needs no data and no cluster is checked here.

    Raises:
        ConfigError: what is asked for does not exist, or contradicts itself.
    """
    if options.attention is None or options.task is None:
        raise ConfigError("give --attention and --task, or --resume RUN.")
    task = task_for(options.task)
    config_class, given = AttentionConfig.find(options.attention)
    overrides = dict(options.overrides)
    for size_field, size in given.items():
        key = f"attention.{size_field}"
        if overrides.setdefault(key, size) != size:
            raise ConfigError(f"--attention {options.attention} and --set {key} contradict.")
    name = options.space or config_class.name
    if options.space is None and name not in shipped_names("search_spaces"):
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
    space = space.without(overrides)
    objectives, scheduler = _choose(options, space)
    _check_limits(options)
    return Plan(
        options=options,
        task=task,
        space=space,
        overrides=overrides,
        objectives=objectives,
        scheduler=scheduler,
        known=known,
    )


def _choose(options: StudyOptions, space: SearchSpace) -> tuple[tuple[str, ...], SchedulerKind]:
    """What is optimised; scheduler and sampler must suit it, and the scheduler is chosen by it."""
    objectives = parse_objectives(options.objective)
    scheduler: SchedulerKind = options.scheduler or ("asha" if len(objectives) == 1 else "none")
    if len(objectives) > 1 and scheduler != "none":
        why = (
            "copies weights between trials by accuracy alone, and its trials share one size: "
            "there is no front to find for"
            if scheduler == "pbt"
            else "stops trials by accuracy alone and would cut cheap ones off the front of"
        )
        raise ConfigError(
            f"--scheduler {scheduler} {why} --objective {options.objective}; leave --scheduler "
            "out, or give --objective accuracy."
        )
    _check_rungs(options, scheduler)
    if scheduler == "pbt" and options.num_trials is not None:
        check_population(space, options.num_trials)
    check_sampler(options.sampler, space, objectives)
    return objectives, scheduler


def _check_rungs(options: StudyOptions, scheduler: str) -> None:
    """Refuse rungs that make no sense, or that nobody would look at."""
    grace, factor = options.grace_steps, options.reduction_factor
    if grace is not None and grace < 1:
        raise ConfigError(f"--grace-steps is {grace}; it must be at least 1.")
    if factor is not None and not LEAST_FACTOR <= factor < math.inf:
        raise ConfigError(
            f"--reduction-factor is {factor:.10g}; it must be at least {LEAST_FACTOR} and finite."
        )
    for option, value, of in (
        ("--grace-steps", grace, ("asha", "hyperband", "pbt")),
        ("--reduction-factor", factor, ("asha", "hyperband")),
    ):
        if value is not None and scheduler not in of:
            raise ConfigError(
                f"{option} means nothing to --scheduler {scheduler}; leave it out, or choose "
                f"{' or '.join(of)}."
            )


def _rungs(options: StudyOptions) -> dict[str, float]:
    """What was said of the rungs, by StudyConfig's names."""
    said = {"grace_steps": options.grace_steps, "reduction_factor": options.reduction_factor}
    return {name: value for name, value in said.items() if value is not None}


def check_study(
    options: StudyOptions, config: StudyConfig, store: Store, folder: Path, code: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(the study's settings, the files it keeps of earlier ones); nothing is written.

    Args:
        code: the version that trained the study that is continued.

    Raises:
        ConfigError, StageError: the search is impossible, or an earlier study cannot be used.
    """
    if config.scheduler == "pbt":
        check_population(config.space, config.num_trials)
    known = Run.read(folder).settings.get("warm_start") if options.resume else None
    identity, files, notes = warm_start.prepare(
        options.warm_start,
        Path(options.storage),
        config,
        store.manifest.checksum,
        folder,
        known=known,
        resume=options.resume,
    )
    for note in notes:
        logger.info("%s", note)
    if alone := independent(config.sampler, config.space):
        names = ", ".join(alone)
        logger.info("sampler %s draws at random, each by itself: %s", options.sampler, names)
    settings = study_results.settings(config, store, identity)
    if options.resume:
        study_folder.check_same(folder, settings)
        begun, now = code, code_version()
        if begun not in (None, now):
            logger.warning("the study was trained by code %s until now; this is %s", begun, now)
    return settings, files


def _check_limits(options: StudyOptions) -> None:
    """Refuse limits that make no sense.

    Raises:
        ConfigError: names the option.
    """
    if options.max_concurrent_trials is not None and options.max_concurrent_trials < 1:
        raise ConfigError(
            f"--max-concurrent-trials is {options.max_concurrent_trials}; it must be 1 or more."
        )
    if options.trial_timeout is not None and not options.trial_timeout > 0:
        raise ConfigError(f"--trial-timeout is {options.trial_timeout:g}; it must be positive.")
    if not options.storage_patience >= 0:
        raise ConfigError(
            f"--storage-patience is {options.storage_patience:g}; it must not be negative."
        )
    if options.final_seeds < 0:
        raise ConfigError(f"--final-seeds is {options.final_seeds}; it must not be negative.")
    if options.time_budget is not None and not options.time_budget > 0:
        raise ConfigError(f"--time-budget is {options.time_budget}; it must be positive.")
