"""What a study or a run will cost before it is launched: work, memory, hours and money."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from dmx.config import RunConfig
from dmx.costing.count import StepCost, count_step, sizes
from dmx.costing.estimate import Cost, check_price
from dmx.costing.probe import Probe, probe_step
from dmx.costing.view import describe, to_plain
from dmx.data.store import Store
from dmx.search.simulate import ExpectedSteps, expected_steps

if TYPE_CHECKING:
    from dmx.study.config import StudyConfig

__all__ = ["Cost", "check_price", "describe", "run_cost", "study_cost", "to_plain"]

_MOST_KINDS = 16
"""Models of different size that are counted, of all that a space can propose."""
_COUNT_SECONDS = 20.0
_MOST_SIMULATED = 300
"""Trials of a study whose early stopping is simulated."""


def study_cost(
    config: StudyConfig,
    store: Store,
    *,
    slots: int,
    final_seeds: int = 0,
    price_per_gpu_hour: float | None = None,
    probe_seconds: float = 6.0,
    num_dev: int | None = None,
) -> Cost:
    """Estimate a study: count models at the space's corners, time the cheapest and the dearest.

    Args:
        slots: trials at once. probe_seconds: for each of the two; 0 measures nothing.
        num_dev: examples of the dev split; None takes the store's.
    """
    check_price(price_per_gpu_hour)
    points = [*map(dict, config.space.start), *config.space.corners()]
    runs = [config.space.run_config(config.task, config.overrides, point) for point in points]
    every = runs[0].train.eval_every_steps
    steps = _steps(config, every, slots)
    return _cost(
        f"study of {config.num_trials} trials, up to {config.max_steps:,} steps each",
        runs,
        store,
        steps=steps,
        num_trials=config.num_trials,
        evaluations=steps.expected / every,
        cpus_per_trial=config.cpus_per_trial,
        gpus_per_trial=config.gpus_per_trial,
        slots=slots,
        final_steps=final_seeds * config.max_steps,
        price_per_gpu_hour=price_per_gpu_hour,
        probe_seconds=probe_seconds,
        num_dev=num_dev,
    )


def _steps(config: StudyConfig, every: int, slots: int) -> ExpectedSteps:
    """Steps of the whole study; of a long one a part is simulated and stands for the rest.

    The simulation's time grows with the square of the trials, and the share that is saved hardly
    changes any more.
    """
    simulated = min(config.num_trials, _MOST_SIMULATED)
    part = expected_steps(
        num_trials=simulated,
        max_steps=config.max_steps,
        grace_steps=config.grace_steps,
        reduction_factor=config.reduction_factor,
        eval_every_steps=every,
        slots=min(slots, simulated),
        scheduler=config.scheduler,
    )
    more = config.num_trials / simulated
    return ExpectedSteps(full=config.num_trials * config.max_steps, expected=part.expected * more)


def run_cost(
    config: RunConfig,
    store: Store,
    *,
    threads: int,
    price_per_gpu_hour: float | None = None,
    probe_seconds: float = 6.0,
    num_dev: int | None = None,
) -> Cost:
    """Estimate a single run; `num_dev` as in study_cost."""
    check_price(price_per_gpu_hour)
    train = config.train
    on_gpu = train.device == "cuda" or (train.device == "auto" and torch.cuda.is_available())
    steps = ExpectedSteps(full=train.num_steps, expected=float(train.num_steps))
    return _cost(
        f"run of {train.num_steps:,} steps",
        [config],
        store,
        steps=steps,
        num_trials=1,
        evaluations=math.ceil(train.num_steps / train.eval_every_steps),
        cpus_per_trial=threads,
        gpus_per_trial=1.0 if on_gpu else 0.0,
        slots=1,
        final_steps=0,
        price_per_gpu_hour=price_per_gpu_hour,
        probe_seconds=probe_seconds,
        num_dev=num_dev,
    )


def largest(runs: list[RunConfig], store: Store) -> RunConfig:
    """The run that keeps most memory while it trains, as far as that can be counted."""
    return max(_counted(list(_kinds(runs).values()), store), key=lambda c: c[0].memory_bytes)[1]


def _cost(
    what: str,
    runs: list[RunConfig],
    store: Store,
    *,
    probe_seconds: float,
    num_dev: int | None,
    **rest: Any,
) -> Cost:
    kinds = _kinds(runs)
    counted = _counted(list(kinds.values()), store)
    probes: tuple[Probe, ...] = ()
    note = ""
    if rest["gpus_per_trial"] and not torch.cuda.is_available():
        note = "this machine has no GPU, so neither time nor money can be measured here"
    elif probe_seconds > 0:
        ends = [counted[0], counted[-1]] if len(counted) > 1 else [counted[0]]
        threads = max(int(rest["cpus_per_trial"]), 1)
        probes = tuple(
            probe_step(run, store, num_threads=threads, seconds=probe_seconds, num_dev=num_dev)
            for _, run, _ in ends
        )
    return Cost(
        what=what,
        kinds=tuple(step for step, _, _ in counted),
        weights=tuple(weight for _, _, weight in counted),
        num_kinds=len(kinds),
        probes=probes,
        note=note,
        **rest,
    )


def _kinds(runs: Iterable[RunConfig]) -> dict[str, tuple[RunConfig, int]]:
    """Runs of different cost, and how many of the given ones each stands for."""
    found: dict[str, tuple[RunConfig, int]] = {}
    for run in runs:
        text = sizes(run)
        known = found.get(text)
        found[text] = (run, 1) if known is None else (known[0], known[1] + 1)
    return found


def _counted(
    kinds: list[tuple[RunConfig, int]], store: Store
) -> list[tuple[StepCost, RunConfig, int]]:
    """Counted models by rising FLOPs; no more than fit into a moment, spread over all."""
    every = max(math.ceil(len(kinds) / _MOST_KINDS), 1)
    started = time.perf_counter()
    found: list[tuple[StepCost, RunConfig, int]] = []
    for run, weight in [*kinds[::every], *([kinds[-1]] if (len(kinds) - 1) % every else [])]:
        if len(found) >= 2 and time.perf_counter() - started > _COUNT_SECONDS:
            break
        found.append((count_step(run, store), run, weight))
    return sorted(found, key=lambda item: (item[0].flops, item[0].parameters))
