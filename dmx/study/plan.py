"""A study's options, checked, and fitted to the machines that there are."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dmx.attention import AttentionConfig
from dmx.cluster import capacity
from dmx.cluster.capacity import Resources
from dmx.config import full_budget, schedule
from dmx.costs.measure import check_memory
from dmx.data.store import Store
from dmx.errors import ConfigError
from dmx.registry import code_version, shipped_names
from dmx.runs.study import LEAST_FACTOR, SamplerKind, SchedulerKind
from dmx.runs.trial import parse_objectives
from dmx.schema import check_number, convert
from dmx.search import warm_start
from dmx.search.samplers import check_sampler, independent
from dmx.search.schedulers import check_population
from dmx.search.space import SearchSpace, load_space
from dmx.storage.files import STORAGE_TIMEOUT
from dmx.storage.remote import SHARED_FILESYSTEM, StorageLayout
from dmx.study.folder import RunLocation, check_same
from dmx.study.study import StudyConfig
from dmx.study.views import Output
from dmx.tasks import Task, task_for
from dmx.training.job import check_batch, share_out

logger = logging.getLogger("dmx.tune")
_CPU_TRIALS = 10
_GPU_TRIALS = 32


@dataclass(frozen=True, kw_only=True)
class StudyOptions(RunLocation):
    """What a caller asks of a study; the options of `dmx.tune`, by their names.

    Attributes:
        overrides: dotted settings of every trial. time_budget, trial_timeout, storage_patience:
            seconds. resume: continue the study that is there. Others: see `dmx.tune --help`.
    """

    attention: str
    task: str
    space: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
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
    def default_name(self) -> str:
        """The study's name where none is given."""
        return f"{self.attention}-{task_for(self.task).name}"


# -- what needs no data and no cluster to be checked --------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study's options with the names in them looked up.

    Attributes:
        space: what is searched, with what the caller fixes no longer in it.
        overrides: dotted values that hold for every trial.
    """

    options: StudyOptions
    task: Task
    space: SearchSpace
    overrides: Mapping[str, Any]
    objectives: tuple[str, ...]
    scheduler: SchedulerKind


def make_plan(options: StudyOptions, known: Mapping[str, Any]) -> Plan:
    """Look the names up, and check them and the numbers.

    Args:
        known: the settings of the study that is continued: another machine would choose others.
    """
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
    space = load_space(name, task.name)
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
    _check_numbers(options)
    objectives, scheduler = _choose(options, space)
    earlier = {k: v for k, v in known.get("overrides", {}).items() if k != "train.num_steps"}
    repeated = ("num_trials", "max_steps")
    kept = {k: known[k] for k in repeated if k in known and getattr(options, k) is None}
    return Plan(
        options=dataclasses.replace(options, **kept),
        task=task,
        space=space,
        overrides={**earlier, **overrides},
        objectives=objectives,
        scheduler=scheduler,
    )


def _check_numbers(options: StudyOptions) -> None:
    counts = ("num_trials", "max_steps", "grace_steps", "max_concurrent_trials")
    amounts = ("cpus_per_trial", "gpus_per_trial", "time_budget", "trial_timeout")
    for names, bounds in (
        (counts, {"least": 1}),
        (amounts, {"above": 0}),
        (("storage_patience", "final_seeds"), {"least": 0}),
        (("reduction_factor",), {"least": LEAST_FACTOR}),
    ):
        for name in names:
            check_number("--" + name.replace("_", "-"), getattr(options, name), **bounds)


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
    for option, value, of in (
        ("--grace-steps", options.grace_steps, ("asha", "hyperband", "pbt")),
        ("--reduction-factor", options.reduction_factor, ("asha", "hyperband")),
    ):
        if value is not None and scheduler not in of:
            raise ConfigError(
                f"{option} means nothing to --scheduler {scheduler}; leave it out, or choose "
                f"{' or '.join(of)}."
            )
    if scheduler == "pbt" and options.num_trials is not None:
        check_population(space, options.num_trials)
    check_sampler(options.sampler, space, objectives)
    return objectives, scheduler


# -- fitted to resources and data ---------------------------------------------------------------


def fit(
    plan: Plan,
    resources: Resources,
    name: str = "",
    places: StorageLayout = SHARED_FILESYSTEM,
    *,
    trials_per_gpu: int | None = None,
) -> StudyConfig:
    """The study on such resources: the task's full budget on GPUs, one that fits on CPUs.

    What the caller left open is chosen, and said in `reason`. Warm-up and evaluations follow the
    number of steps (see dmx.config.schedule); what is fixed or searched is left alone.

    Args:
        name, places: of the study. trials_per_gpu: as measured, instead of the options'.
    """
    options, task = plan.options, plan.task
    searched = plan.space.names()
    if "train.num_steps" in searched:
        raise ConfigError("train.num_steps cannot be searched: all trials have the same schedule.")
    shared = trials_per_gpu or capacity.wanted_per_gpu(options.trials_per_gpu)
    fixed = {**plan.overrides, **plan.space.defaults}
    _check_gpus(options, shared, fixed, resources)
    for key in ("train.num_steps", "train.eval_every_steps"):
        if key in fixed:
            convert(int, fixed[key], key)
    steps, wanted = options.max_steps, fixed.get("train.num_steps")
    if None not in (steps, wanted) and steps != wanted:
        raise ConfigError(
            f"--max-steps is {steps}, but train.num_steps is {wanted}; give one of them."
        )
    on_gpu = resources.num_gpus > 0
    full, batch = full_budget(task, "train.num_steps"), full_budget(task, "train.batch_size")
    steps = steps or int(wanted or (full if on_gpu else min(full, task.cpu_steps)))
    chosen: dict[str, Any] = {**schedule(task, steps)}
    if not on_gpu:
        chosen["train.batch_size"] = min(batch, task.cpu_batch_size)
    every = {"train.eval_every_steps": full_budget(task, "train.eval_every_steps")}
    every |= {**chosen, **fixed}
    left = {k: v for k, v in chosen.items() if k not in fixed and k not in searched}
    num_trials = options.num_trials or (_GPU_TRIALS if on_gpu else _CPU_TRIALS)
    gpus = (options.gpus_per_trial or 1.0 / (shared or 1)) if on_gpu else 0.0
    cpus = options.cpus_per_trial or float(options.workers_per_trial or 1)
    if on_gpu:
        part = resources.num_cpus * gpus // resources.num_gpus
        cpus = options.cpus_per_trial or max(1.0, part)
    workers = share_out(cpus=cpus, gpus=gpus, workers=options.workers_per_trial)
    reason = f"{num_trials} trials of up to {steps:,} steps"
    if on_gpu:
        reason = f"{resources.num_gpus} GPUs: {reason}"
    else:
        of = {**left, **fixed}.get("train.batch_size", "as searched")
        reason = (
            f"no GPU, {resources.num_cpus} CPU cores: {reason}, batch {of} (the task's full budget "
            f"is {full:,} steps, batch {batch})"
        )
    if workers.count > 1:
        reason += f", each by {workers.count} workers"
    return StudyConfig(
        name=name,
        task=task.name,
        space=plan.space,
        overrides={**plan.overrides, **left, "train.num_steps": steps},
        num_trials=num_trials,
        max_steps=steps,
        grace_steps=options.grace_steps or max(int(every["train.eval_every_steps"]), steps // 9),
        reduction_factor=options.reduction_factor or 3.0,
        scheduler=plan.scheduler,
        sampler=options.sampler,
        objectives=plan.objectives,
        seed=options.seed,
        workers=workers,
        time_budget_seconds=options.time_budget,
        trial_timeout_seconds=options.trial_timeout,
        storage_timeout=options.storage_patience,
        places=places,
        reason=reason,
    )


def _check_gpus(
    options: StudyOptions, shared: int | None, fixed: Mapping[str, Any], resources: Resources
) -> None:
    check_number("--trials-per-gpu", shared, least=1)
    if shared is not None and options.gpus_per_trial is not None:
        raise ConfigError("--gpus-per-trial and --trials-per-gpu contradict; give one of them.")
    if resources.num_gpus:
        return
    if shared is not None:
        raise ConfigError("--trials-per-gpu is given, but the cluster has no GPU; leave it out.")
    if options.gpus_per_trial is not None:
        raise ConfigError(
            "--gpus-per-trial is given, but the cluster has no GPU; --workers-per-trial shares a "
            "trial's work among CPU processes."
        )
    if fixed.get("train.device") == "cuda":
        raise ConfigError("train.device is cuda, but the cluster has no GPU; leave it out.")


def check_space(config: StudyConfig, *, here: bool) -> None:
    """Build the experiment at every corner of the space; `here`: it is to fit this machine."""
    runs = config.space.check(config.task, config.overrides)
    for _, run in runs:
        check_batch(run.train.batch_size, config.workers.count)
    if here:
        check_memory(runs, torch.device("cuda" if config.workers.gpus else "cpu"))


def check_study(
    options: StudyOptions,
    config: StudyConfig,
    store: Store,
    folder: Path,
    record: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, str]]:
    """(the study's settings, the files it keeps of earlier ones); nothing is written.

    Args:
        record: what the journal of a study that is continued says of its latest session.
    """
    if config.scheduler == "pbt":
        check_population(config.space, config.num_trials)
    identity, files, notes = warm_start.prepare(
        options.warm_start,
        Path(options.storage),
        config,
        store.manifest.checksum,
        folder,
        known=record.get("settings", {}).get("warm_start"),
        resume=options.resume,
    )
    for note in notes:
        logger.info("%s", note)
    if alone := independent(config.sampler, config.space):
        names = ", ".join(alone)
        logger.info("sampler %s draws at random, each by itself: %s", options.sampler, names)
    settings = config.settings(store.manifest, identity)
    if options.resume:
        check_same(folder, settings)
        begun, now = record.get("environment", {}).get("code"), code_version()
        if begun not in (None, now):
            logger.warning("the study was trained by code %s until now; this is %s", begun, now)
    return settings, files
