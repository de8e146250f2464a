# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.tune`: search an attention's hyperparameters on a task."""

from __future__ import annotations

import argparse
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmx import (
    cli,
    cluster,
    costs,
    gpu_packing,
    place_options,
    study_end,
    study_files,
    study_identity,
    tune_search,
)
from dmx.attention.base import split_name
from dmx.budget import Budget, fit_budget
from dmx.costing.stand_in import DryData, dry_data
from dmx.data.store import Store
from dmx.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PARTIAL,
    ConfigError,
    StorageError,
)
from dmx.folder_sync import FolderSync
from dmx.live_view import choose_view, write_json
from dmx.log import console
from dmx.object_storage import is_url
from dmx.overrides import flatten, parse_assignments
from dmx.places import SHARED, Places
from dmx.resources import shipped_names
from dmx.space import SearchSpace, load_space
from dmx.study import StudyConfig, run_study
from dmx.tasks import Task, task_for
from dmx.tune_options import check_limits, parser
from dmx.workers import check_batch

logger = logging.getLogger("dmx.tune")
MODULE = "dmx.tune"


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code says whether the study is complete."""
    started = time.monotonic()
    args = parser().parse_args(argv)
    task, space, overrides = _plan(args)
    folder, places = place_options.find_places(
        storage=args.storage,
        name=args.name,
        default=f"{args.attention}-{task.name}",
        scratch=args.scratch,
        data_root=args.data_root,
        node_data=args.node_data,
    )
    args.objectives = tune_search.choose(args, space)
    if args.final_seeds < 0:
        raise ConfigError(f"--final-seeds is {args.final_seeds}; it must not be negative.")
    costs.check_price(args.price_per_gpu_hour, dry_run=args.dry_run)
    if args.time_budget is not None and not args.time_budget > 0:
        raise ConfigError(f"--time-budget is {args.time_budget}; it must be positive.")
    check_limits(args)
    if args.address is None:
        budget = _budget(args, task, space, cluster.local_resources())
        cluster.check_request(cluster.local_resources(), cpus=budget.cpus, gpus=budget.gpus)
        _check_space(space, task, budget, overrides)
    sync = FolderSync(places)
    if not args.dry_run:
        sync.restore()
        _check_free(folder, resume=args.resume)
    if args.dry_run:
        root = None if args.data_root is None else Path(args.data_root)
        opened = functools.partial(_open_data, args, task, places)
        generate = args.prepare and not is_url(args.data_root or "")
        with dry_data(task, root, opened, generate=generate) as data:
            return _dry_run(args, task, space, overrides, data, folder)
    store = _open_data(args, task, places)
    again = cli.command_line(MODULE, argv, add="--resume")
    try:
        with cli.terminate_like_interrupt():
            return _search(args, task, space, overrides, store, folder, sync, again, started)
    except KeyboardInterrupt:  # outside of the trials' own time, which ends more gently
        logger.warning("interrupted. Continue with:\n%s", again)
        return EXIT_INTERRUPTED
    except StorageError as error:
        logger.error("%s\n%s", error, again)
        return EXIT_FAILED


def _open_data(args: argparse.Namespace, task: Task, places: Places) -> Store:
    return place_options.open_data(
        places,
        task.name,
        args.data_root,
        allow_sample=args.address is None,
        generate=args.prepare and not args.dry_run,
        address=args.address,
    )


def _search(
    args: argparse.Namespace,
    task: Task,
    space: SearchSpace,
    overrides: Mapping[str, Any],
    store: Store,
    folder: Path,
    sync: FolderSync,
    again: str,
    started: float,
) -> int:
    """Run the study, and what follows it."""

    def open_study(resources: cluster.Resources) -> StudyConfig:
        budget = _budget(args, task, space, resources)
        _check_space(space, task, budget, overrides)
        config = _study_config(args, task, space, budget, overrides, folder.name, sync.places)
        tune_search.open_study(args, config, store, folder)
        logger.info("study %s on data: %s; %s", folder, store.manifest.label, budget.reason)
        return config

    # Here all is known before Ray starts; of a cluster nothing before it is connected.
    here = None if args.address else open_study(cluster.local_resources())
    with sync, cluster.connect(args.address) as resources:
        config = here or open_study(resources)
        if args.trials_per_gpu == gpu_packing.AUTO:
            fitting = gpu_packing.measure(config, store)
            budget = _budget(args, task, space, resources, trials_per_gpu=fitting)
            config = _study_config(args, task, space, budget, overrides, folder.name, sync.places)
        cpus, gpus = config.cpus_per_trial, config.gpus_per_trial
        slots = cluster.check_request(resources, cpus=cpus, gpus=gpus)
        slots = min(slots, args.max_concurrent_trials or slots)
        tensorboard = study_identity.announce(folder, config, store)
        title = f"{folder.name} (data: {store.manifest.label})"
        view = choose_view(
            args.output, num_trials=config.num_trials, max_steps=config.max_steps, title=title
        )
        with view:
            result = run_study(config, store, folder, slots=slots, observers=(view, tensorboard))
        tensorboard.close()
        summary = study_end.finish(
            config, store, result, tensorboard, slots=slots, final_seeds=args.final_seeds
        )
        summary["seconds"] = time.monotonic() - started
        study_files.write_study(folder, summary)
    if args.output == "json":
        write_json(event="finished", **summary)
    else:
        study_end.show(summary, result, store)
    if not result.complete:
        out_of_time = (
            args.time_budget is not None and time.monotonic() - started >= args.time_budget
        )
        logger.warning(
            "the study is not complete (%d of %d trials ended). Continue with:\n%s",
            sum(t.status != "RUNNING" for t in result.trials),
            config.num_trials,
            again,
        )
        return EXIT_PARTIAL if out_of_time else EXIT_INTERRUPTED
    return EXIT_OK if result.best is not None else EXIT_FAILED


def _plan(args: argparse.Namespace) -> tuple[Task, SearchSpace, dict[str, Any]]:
    """Task, space and overrides; everything that needs no data and no cluster is checked here."""
    task = task_for(args.task)
    config_class, size = split_name(args.attention)
    overrides = flatten(parse_assignments(args.set))
    if size is not None:
        key = f"attention.{config_class.size_field}"
        if overrides.setdefault(key, size) != size:
            raise ConfigError(f"--attention {args.attention} and --set {key} contradict.")
    name = args.space or config_class.name
    if args.space is None and name not in shipped_names("search_spaces"):
        raise ConfigError(
            f"attention {name!r} has no search space in search_spaces/; give --space."
        )
    space = load_space(name, task.name, task.family)
    if space.attention != config_class.name:
        raise ConfigError(
            f"search space {name} is for attention {space.attention!r}, not {config_class.name!r}."
        )
    for key in ("task", "attention", "attention.name"):
        if key in overrides:
            raise ConfigError(f"--set {key} is not possible; use --attention and --task.")
    return task, space.without(overrides), overrides


def _check_free(folder: Path, *, resume: bool) -> None:
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} already exists; add --resume to continue it, or give --name.")


def _budget(
    args: argparse.Namespace,
    task: Task,
    space: SearchSpace,
    resources: cluster.Resources,
    trials_per_gpu: int | None = None,
) -> Budget:
    return fit_budget(
        task,
        resources,
        space.defaults,
        searched=space.distributions(),
        num_trials=args.num_trials,
        max_steps=args.max_steps,
        trials_per_gpu=trials_per_gpu or gpu_packing.wanted(args.trials_per_gpu),
        cpus_per_trial=args.cpus_per_trial,
        gpus_per_trial=args.gpus_per_trial,
        workers_per_trial=args.workers_per_trial,
    )


def _fixed(budget: Budget, overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {**overrides, **budget.settings}


def _check_space(
    space: SearchSpace, task: Task, budget: Budget, overrides: Mapping[str, Any]
) -> None:
    space.check(task.name, _fixed(budget, overrides))
    for corner in space.corners() if budget.workers > 1 else ():
        config = space.run_config(task.name, _fixed(budget, overrides), corner)
        check_batch(config.train.batch_size, budget.workers)


def _study_config(
    args: argparse.Namespace,
    task: Task,
    space: SearchSpace,
    budget: Budget,
    overrides: Mapping[str, Any],
    name: str,
    places: Places = SHARED,
) -> StudyConfig:
    return StudyConfig(
        name=name,
        task=task.name,
        space=space,
        overrides=_fixed(budget, overrides),
        num_trials=budget.num_trials,
        max_steps=budget.max_steps,
        grace_steps=budget.grace_steps,
        scheduler=args.scheduler,
        sampler=args.sampler,
        objectives=args.objectives,
        seed=args.seed,
        cpus_per_trial=budget.cpus,
        gpus_per_trial=budget.gpus,
        workers_per_trial=budget.workers,
        time_budget_seconds=args.time_budget,
        trial_timeout_seconds=args.trial_timeout,
        patience_seconds=args.storage_patience,
        places=places,
    )


def _dry_run(
    args: argparse.Namespace,
    task: Task,
    space: SearchSpace,
    overrides: Mapping[str, Any],
    data: DryData,
    folder: Path,
) -> int:
    with cluster.connect(args.address) if args.address else _Local() as resources:
        budget = _budget(args, task, space, resources)
        slots = cluster.check_request(resources, cpus=budget.cpus, gpus=budget.gpus)
        slots = min(slots, args.max_concurrent_trials or slots)
    fixed = _fixed(budget, overrides)
    space.check(task.name, fixed)
    config = _study_config(args, task, space, budget, overrides, folder.name)
    tune_search.check_study(args, config, data.store, folder)
    out = console()
    start = space.first()
    out.print(f"data: {data.words}", highlight=False)
    out.print(f"budget: {budget.reason}; {slots} at once")
    for name, dist in space.distributions().items():
        out.print(f"search {name}: {dist.kind} {list(dist.values)}", highlight=False)
    out.print("first trial:")
    out.print(space.run_config(task.name, fixed, start).to_yaml(), highlight=False)
    cost = costs.study_cost(
        config,
        data.store,
        slots=slots,
        final_seeds=args.final_seeds,
        price_per_gpu_hour=args.price_per_gpu_hour,
        num_dev=data.num_dev,
    )
    for line in costs.describe(cost):
        out.print(line, highlight=False)
    out.print("Nothing was started (--dry-run).")
    return EXIT_OK


class _Local:
    """The local resources as a context, where no cluster is asked."""

    def __enter__(self) -> cluster.Resources:
        return cluster.local_resources()

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


if __name__ == "__main__":
    cli.run("dmx.tune", main)
