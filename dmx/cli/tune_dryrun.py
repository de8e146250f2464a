"""`python -m dmx.tune --dry-run`: the plan and its cost, on the terminal."""

from __future__ import annotations

import contextlib
from pathlib import Path

from dmx.cli import tune_search
from dmx.cli.tune_plan import Plan
from dmx.cluster import capacity, connection
from dmx.costs.estimate import DryData, describe, study_cost
from dmx.errors import EXIT_OK
from dmx.search.rungs import describe_rungs
from dmx.terminal import console, verbatim


def _resources(address: str | None) -> contextlib.AbstractContextManager[capacity.Resources]:
    """Of this machine without starting Ray; only of a cluster must Ray be asked."""
    if address is None:
        return contextlib.nullcontext(capacity.local_resources())
    return connection.connect(address)


def show(plan: Plan, data: DryData, folder: Path) -> int:
    """Check all that the study would check, print, and start nothing."""
    args, task, space = plan.args, plan.task, plan.space
    with _resources(args.address) as resources:
        budget = plan.budget(resources)
        slots = capacity.check_request(
            resources, cpus=budget.cpus, gpus=budget.gpus, workers=budget.workers
        )
        slots = min(slots, args.max_concurrent_trials or slots)
    plan.check(budget)
    config = plan.study(budget, folder.name)
    tune_search.check_study(args, config, data.store, folder)
    out = console()
    out.print(f"data: {data.words}", highlight=False)
    out.print(f"budget: {budget.reason}; {slots} at once")
    for name, dist in space.distributions().items():
        out.print(f"search {name}: {dist.kind} {list(dist.values)}", highlight=False)
    out.print("first trial:")
    first = space.run_config(task.name, plan.fixed(budget), space.first())
    verbatim(first.to_yaml())
    stops = describe_rungs(
        config.scheduler,
        grace_steps=config.grace_steps,
        max_steps=config.max_steps,
        reduction_factor=config.reduction_factor,
    )
    out.print(f"scheduler: {stops}", highlight=False)
    cost = study_cost(
        config,
        data.store,
        slots=slots,
        final_seeds=args.final_seeds,
        num_dev=data.num_dev,
    )
    for line in describe(cost, args.price_per_gpu_hour):
        out.print(line, highlight=False)
    out.print("Nothing was started (--dry-run).")
    return EXIT_OK
