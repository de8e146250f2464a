# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.tune`: search an attention's hyperparameters on a task."""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmx import process
from dmx.cli import resuming, tune_dryrun, tune_search
from dmx.cli.options import run
from dmx.cli.tune import check_limits, parser
from dmx.cli.tune_plan import Plan, make_plan
from dmx.cluster import capacity, connection, gpu_packing
from dmx.costs.estimate import check_price, corner_runs, dry_data
from dmx.data.store import Store
from dmx.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PARTIAL,
    ConfigError,
    StorageError,
)
from dmx.format import command_line
from dmx.runs.folder_sync import FolderSync
from dmx.schema import is_url
from dmx.storage.layout import StorageLayout
from dmx.study import folder as study_folder
from dmx.study import locations
from dmx.study import results as study_results
from dmx.study.study import StudyConfig
from dmx.study.views import choose_view, write_json
from dmx.tasks import Task, task_for
from dmx.terminal import verbatim

logger = logging.getLogger("dmx.tune")
MODULE = "dmx.tune"


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code says whether the study is complete."""
    started = time.monotonic()
    p = parser()
    args = resuming.parse(p, p.given(argv), "study", default_name=_default_name)
    plan = make_plan(args)
    task = plan.task
    folder, places = locations.find_places(
        storage=args.storage,
        name=args.name,
        default=_default_name(vars(args)) or "",
        scratch=args.scratch,
        data_root=args.data_root,
        node_data=args.node_data,
    )
    args.objectives = tune_search.choose(args, plan.space)
    if args.final_seeds < 0:
        raise ConfigError(f"--final-seeds is {args.final_seeds}; it must not be negative.")
    check_price(args.price_per_gpu_hour, dry_run=args.dry_run)
    if args.time_budget is not None and not args.time_budget > 0:
        raise ConfigError(f"--time-budget is {args.time_budget}; it must be positive.")
    check_limits(args)
    if args.address is None:
        _check_budget(plan, capacity.local_resources())
    sync = FolderSync(places)
    if not args.dry_run:
        sync.restore()
        _check_free(folder, resume=args.resume)
    if args.dry_run:
        root = None if args.data_root is None else Path(args.data_root)

        def opened(temporary: Path) -> Store:
            return _open_data(args, task, places, temporary)

        generate = args.prepare and not is_url(args.data_root or "")
        with dry_data(task, root, opened, generate=generate) as data:
            return tune_dryrun.show(plan, data, folder)
    again = command_line(MODULE, argv, add="--resume")
    process.files_decide()
    with contextlib.ExitStack() as stack:
        if args.address is not None:  # what cannot be met there is refused before data are made
            _check_budget(plan, stack.enter_context(connection.connect(args.address)))
        store = _open_data(args, task, places)
        try:
            with process.terminate_like_interrupt():
                return _search(plan, store, folder, sync, again, started)
        except KeyboardInterrupt:  # outside of the trials' own time, which ends more gently
            logger.warning("interrupted. Continue with:\n%s", again)
            return EXIT_INTERRUPTED
        except StorageError as error:
            logger.error("%s\n%s", error, again)
            return EXIT_FAILED


def _check_budget(plan: Plan, resources: capacity.Resources) -> None:
    budget = plan.budget(resources)
    capacity.check_request(resources, cpus=budget.cpus, gpus=budget.gpus, workers=budget.workers)
    plan.check(budget)


def _default_name(given: Mapping[str, Any]) -> str | None:
    if not given.get("attention") or not given.get("task"):
        return None
    return f"{given['attention']}-{task_for(given['task']).name}"


def _open_data(
    args: argparse.Namespace, task: Task, places: StorageLayout, temporary: Path | None = None
) -> Store:
    return locations.open_data(
        places,
        task.name,
        args.data_root,
        allow_sample=args.address is None,
        generate=args.prepare and not args.dry_run,
        address=args.address,
        temporary=temporary,
    )


def _check_free(folder: Path, *, resume: bool) -> None:
    if not resume:
        study_folder.check_free(folder)


def _search(
    plan: Plan, store: Store, folder: Path, sync: FolderSync, again: str, started: float
) -> int:
    """Run the study, and what follows it."""
    args = plan.args

    def checked(resources: capacity.Resources) -> tuple[StudyConfig, dict[str, Any], Any]:
        budget = plan.budget(resources)
        plan.check(budget)
        config = plan.study(budget, folder.name, sync.layout)
        settings, files = tune_search.check_study(args, config, store, folder)
        if args.resume:
            study_folder.check_unused(folder)
        logger.info("study %s on data: %s; %s", folder, store.manifest.label, budget.reason)
        return config, settings, files

    # Here all is known before Ray starts; of a cluster nothing before it is connected.
    here = None if args.address else checked(capacity.local_resources())
    with contextlib.ExitStack() as stack:
        resources = stack.enter_context(connection.connect(args.address))
        config, settings, files = here or checked(resources)
        if args.trials_per_gpu == gpu_packing.AUTO:
            fitting = gpu_packing.measure(corner_runs(config), store)
            budget = plan.budget(resources, trials_per_gpu=fitting)
            config = plan.study(budget, folder.name, sync.layout)
        cpus, gpus = config.cpus_per_trial, config.gpus_per_trial
        workers = config.workers.count
        slots = capacity.check_request(resources, cpus=cpus, gpus=gpus, workers=workers)
        slots = min(slots, args.max_concurrent_trials or slots)
        # Not before all that can be refused: a study that never began is in nobody's way.
        options = resuming.options_of(args, None if is_url(args.data_root or "") else store)
        study_folder.open_folder(folder, settings, resume=args.resume, options=options, files=files)
        stack.enter_context(sync)
        from dmx.reporting.page import (
            write_page,  # seconds that a refusal need not wait, as Ray Tune's
        )
        from dmx.study.study import train_trials

        tensorboard = study_results.tensorboard_view(folder, config, store)
        title = f"{folder.name} (data: {store.manifest.label})"
        view = choose_view(
            args.output, num_trials=config.num_trials, max_steps=config.max_steps, title=title
        )
        earlier = study_results.seconds_so_far(folder)
        with view:
            result = train_trials(config, store, folder, slots=slots, observers=(view, tensorboard))
        tensorboard.close()
        summary = study_results.finish(
            config, store, result, tensorboard, slots=slots, final_seeds=args.final_seeds
        )
        summary["seconds"] = earlier + time.monotonic() - started
        study_folder.write_study(folder, summary)
        page = write_page(folder) if result.complete else None
    if args.output == "json":
        write_json(event="finished", **summary, report=page)
    else:
        study_results.show(summary, result, store)
        if page is not None:
            verbatim(f"report: {page}")
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


if __name__ == "__main__":
    run("dmx.tune", main)
