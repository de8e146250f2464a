"""How much to train: the task's full budget on GPUs, one that fits the machine on CPUs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dmx.cluster.capacity import Resources
from dmx.config import full_budget, schedule
from dmx.errors import ConfigError
from dmx.schema import convert
from dmx.tasks import Task
from dmx.training.job import share_out

_CPU_TRIALS = 10
_GPU_TRIALS = 32


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one study spends.

    Attributes:
        num_trials: trials in all. settings: dotted RunConfig values that hold for every trial.
        max_steps: steps of a full trial. grace_steps: steps before ASHA may stop one.
        cpus, gpus: of one trial. workers: that share its work. reason: one sentence for the user.
    """

    num_trials: int
    max_steps: int
    grace_steps: int
    settings: Mapping[str, Any]
    cpus: float
    gpus: float
    workers: int
    reason: str


def fit_budget(
    task: Task,
    resources: Resources,
    overrides: Mapping[str, Any],
    *,
    searched: Collection[str] = (),
    num_trials: int | None,
    max_steps: int | None,
    trials_per_gpu: int | None,
    cpus_per_trial: float | None,
    gpus_per_trial: float | None = None,
    workers_per_trial: int | None = None,
) -> Budget:
    """Choose what the user left open; say so.

    Warm-up and evaluations follow the number of steps (see dmx.config.schedule). What is fixed
    (`overrides`) or searched is left alone.

    Raises:
        ConfigError: a number is out of range, or GPUs are asked for where there are none.
    """
    if "train.num_steps" in searched:
        raise ConfigError("train.num_steps cannot be searched: all trials have the same schedule.")
    for name, value in (("--num-trials", num_trials), ("--max-steps", max_steps)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")
    if trials_per_gpu is not None and trials_per_gpu < 1:
        raise ConfigError(f"--trials-per-gpu is {trials_per_gpu}; it must be at least 1.")
    if cpus_per_trial is not None and not cpus_per_trial > 0:
        raise ConfigError(f"--cpus-per-trial is {cpus_per_trial}; it must be positive.")
    if trials_per_gpu is not None and not resources.num_gpus:
        raise ConfigError("--trials-per-gpu is given, but the cluster has no GPU; leave it out.")
    if gpus_per_trial is not None:
        _check_gpus(gpus_per_trial, trials_per_gpu, resources)
    on_gpu = resources.num_gpus > 0
    if overrides.get("train.device") == "cuda" and not on_gpu:
        raise ConfigError("train.device is cuda, but the cluster has no GPU; leave it out.")
    for name in ("train.num_steps", "train.eval_every_steps"):
        if name in overrides:
            convert(int, overrides[name], name)
    wanted = overrides.get("train.num_steps")
    if None not in (max_steps, wanted) and max_steps != wanted:
        raise ConfigError(
            f"--max-steps is {max_steps}, but train.num_steps is {wanted}; give one of them."
        )
    full = full_budget(task, "train.num_steps")
    full_batch = full_budget(task, "train.batch_size")
    steps = max_steps or int(overrides.get("train.num_steps", 0))
    if not steps:
        steps = full if on_gpu else min(full, task.cpu_steps)
    settings: dict[str, Any] = {"train.num_steps": steps}
    settings |= schedule(task, steps)
    if not on_gpu:
        settings["train.batch_size"] = min(full_batch, task.cpu_batch_size)
    evaluation = overrides.get(
        "train.eval_every_steps",
        settings.get("train.eval_every_steps", full_budget(task, "train.eval_every_steps")),
    )
    settings = {k: v for k, v in settings.items() if k not in overrides and k not in searched}
    settings["train.num_steps"] = steps
    trials = num_trials or (_GPU_TRIALS if on_gpu else _CPU_TRIALS)
    gpus = (gpus_per_trial or 1.0 / (trials_per_gpu or 1)) if on_gpu else 0.0
    cpus = cpus_per_trial or float(workers_per_trial or 1)
    if on_gpu:
        cpus = cpus_per_trial or max(1.0, resources.num_cpus * gpus // resources.num_gpus)
    workers = share_out(cpus=cpus, gpus=gpus, workers=workers_per_trial).count
    if on_gpu:
        reason = f"{resources.num_gpus} GPUs: {trials} trials of up to {steps:,} steps"
    else:
        batch = {**settings, **overrides}.get("train.batch_size", "as searched")
        reason = (
            f"no GPU, {resources.num_cpus} CPU cores: {trials} trials of up to {steps:,} steps, "
            f"batch {batch} (the task's full budget is {full:,} steps, batch {full_batch})"
        )
    if workers > 1:
        reason += f", each by {workers} workers"
    return Budget(
        num_trials=trials,
        max_steps=steps,
        grace_steps=max(int(str(evaluation)), steps // 9),
        settings=settings,
        cpus=cpus,
        gpus=gpus,
        workers=workers,
        reason=reason,
    )


def _check_gpus(gpus: float, trials_per_gpu: int | None, resources: Resources) -> None:
    if not gpus > 0:
        raise ConfigError(f"--gpus-per-trial is {gpus:g}; it must be positive.")
    if trials_per_gpu is not None:
        raise ConfigError("--gpus-per-trial and --trials-per-gpu contradict; give one of them.")
    if not resources.num_gpus:
        raise ConfigError(
            "--gpus-per-trial is given, but the cluster has no GPU; --workers-per-trial shares a "
            "trial's work among CPU processes."
        )
