"""One study from its options to its report: checked, searched, tested, written down."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmx import process
from dmx.cluster import capacity, connection
from dmx.costs import estimate
from dmx.costs.estimate import check_price, corner_runs, describe, dry_data
from dmx.data.store import Store
from dmx.errors import InterruptedRun
from dmx.runs.folder_sync import FolderSync
from dmx.schema import is_url
from dmx.search.rungs import describe_rungs
from dmx.storage.remote import StorageLayout
from dmx.study import folder as study_folder
from dmx.study import locations
from dmx.study import results as study_results
from dmx.study.plan import Plan, StudyOptions, check_study, make_plan
from dmx.study.study import StudyConfig, train_trials
from dmx.study.views import choose_view, write_json
from dmx.terminal import console, verbatim

logger = logging.getLogger("dmx.tune")


@dataclass(frozen=True)
class StudyOutcome:
    """How a session of a study ended.

    Attributes:
        summary: the content of study.json. ended: trials that have ended. out_of_time: whether
            the time budget was used up.
    """

    folder: Path
    summary: Mapping[str, Any]
    ended: int
    out_of_time: bool


def _prepared(options: StudyOptions, record: Mapping[str, Any]) -> tuple[Plan, Path, StorageLayout]:
    """The plan, the study's folder and where its nodes meet; all that needs no data is checked."""
    plan = make_plan(options, record.get("settings", {}))
    folder, places = locations.find_places(
        storage=options.storage,
        name=options.name,
        default=options.default_name or "",
        scratch=options.scratch,
        data_root=options.data_root,
        node_data=options.node_data,
    )
    if options.address is None:
        _check_budget(plan, capacity.local_resources())
    return plan, folder, places


def _check_budget(plan: Plan, resources: capacity.Resources) -> None:
    budget = plan.budget(resources)
    capacity.check_request(resources, cpus=budget.cpus, gpus=budget.gpus, workers=budget.workers)
    plan.check(budget)


def _open_data(
    plan: Plan, places: StorageLayout, *, generate: bool, temporary: Path | None = None
) -> Store:
    return locations.open_data(
        places,
        plan.task.name,
        plan.options.data_root,
        allow_sample=plan.options.address is None,
        generate=generate,
        on_cluster=plan.options.address is not None,
        temporary=temporary,
    )


def run_study(
    options: StudyOptions,
    *,
    recorded: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    write_page: Callable[[Path], Path | None] = lambda folder: None,
) -> StudyOutcome:
    """Run or continue a study, and print its end.

    Args:
        write_page: what writes a complete study's report into its folder.
        recorded: the options that its journal keeps for the next session. record: what the
            journal of the study that is continued says of it (its latest `settings` event).

    Raises:
        DmxError: it cannot be run; nothing was started. InterruptedRun: a signal came while the
            study was under way. StorageError: its storage stayed away.
    """
    started = time.monotonic()
    record = record or {}
    plan, folder, places = _prepared(options, record)
    sync = FolderSync(places)
    sync.restore()
    if not options.resume:
        study_folder.check_free(folder)
    process.files_decide()
    with contextlib.ExitStack() as stack:
        if options.address is not None:  # what cannot be met there is refused before data are made
            _check_budget(plan, stack.enter_context(connection.connect(options.address)))
        with capacity.for_task():  # a shard of data that waits for room is spoken of
            store = _open_data(plan, places, generate=options.prepare)
        kept = dict(recorded or {})
        if not store.manifest.is_sample and not is_url(options.data_root or ""):
            kept.setdefault("data_root", str(store.folder.parent))
        code = record.get("environment", {}).get("code")
        try:
            with process.terminate_like_interrupt():
                return _search(plan, store, folder, sync, kept, code, write_page, started)
        except KeyboardInterrupt:  # outside of the trials' own time, which ends more gently
            raise InterruptedRun from None


def _search(
    plan: Plan,
    store: Store,
    folder: Path,
    sync: FolderSync,
    recorded: Mapping[str, Any],
    code: str | None,
    write_page: Callable[[Path], Path | None],
    started: float,
) -> StudyOutcome:
    """Run the study, and what follows it."""
    options = plan.options

    def checked(resources: capacity.Resources) -> tuple[StudyConfig, dict[str, Any], Any]:
        budget = plan.budget(resources)
        plan.check(budget)
        config = plan.study(budget, folder.name, sync.layout)
        settings, files = check_study(options, config, store, folder, code)
        if options.resume:
            study_folder.check_unused(folder)
        logger.info("study %s on data: %s; %s", folder, store.manifest.label, budget.reason)
        return config, settings, files

    # Here all is known before Ray starts; of a cluster nothing before it is connected.
    here = None if options.address else checked(capacity.local_resources())
    with contextlib.ExitStack() as stack:
        resources = stack.enter_context(connection.connect(options.address))
        config, settings, files = here or checked(resources)
        if options.trials_per_gpu == capacity.AUTO:
            fitting = capacity.measure_per_gpu(corner_runs(config), store)
            budget = plan.budget(resources, trials_per_gpu=fitting)
            config = plan.study(budget, folder.name, sync.layout)
        cpus, gpus = config.cpus_per_trial, config.gpus_per_trial
        workers = config.workers.count
        slots = capacity.check_request(resources, cpus=cpus, gpus=gpus, workers=workers)
        slots = min(slots, options.max_concurrent_trials or slots)
        # Not before all that can be refused: a study that never began is in nobody's way.
        study_folder.open_folder(
            folder, settings, resume=options.resume, options=recorded, files=files
        )
        stack.enter_context(sync)
        tensorboard = study_results.tensorboard_view(folder, config, store)
        title = f"{folder.name} (data: {store.manifest.label})"
        view = choose_view(
            options.output, num_trials=config.num_trials, max_steps=config.max_steps, title=title
        )
        earlier = study_results.seconds_so_far(folder)
        with view:
            result = train_trials(config, store, folder, slots=slots, observers=(view, tensorboard))
        tensorboard.close()
        summary = study_results.finish(
            config, store, result, tensorboard, slots=slots, final_seeds=options.final_seeds
        )
        summary["seconds"] = earlier + time.monotonic() - started
        study_folder.write_study(folder, summary)
        page = write_page(folder) if result.complete else None
    if options.output == "json":
        write_json(event="finished", **summary, report=page)
    else:
        study_results.show(summary, result, store)
        if page is not None:
            verbatim(f"report: {page}")
    budget_seconds = options.time_budget
    return StudyOutcome(
        folder,
        summary,
        ended=sum(t.status != "RUNNING" for t in result.trials),
        out_of_time=budget_seconds is not None and time.monotonic() - started >= budget_seconds,
    )


def dry_run(
    options: StudyOptions,
    *,
    record: Mapping[str, Any] | None = None,
    price_per_gpu_hour: float | None = None,
) -> None:
    """Check all that the study would check, print the plan and its cost, and start nothing."""
    record = record or {}
    check_price(price_per_gpu_hour, dry_run=True)
    plan, folder, places = _prepared(options, record)
    root = None if options.data_root is None else Path(options.data_root)

    def opened(temporary: Path) -> Store:
        return _open_data(plan, places, generate=False, temporary=temporary)

    generate = options.prepare and not is_url(options.data_root or "")
    with dry_data(plan.task, root, opened, generate=generate) as data:
        # Of this machine without starting Ray; only of a cluster must Ray be asked.
        with (
            contextlib.nullcontext(capacity.local_resources())
            if options.address is None
            else connection.connect(options.address)
        ) as resources:
            budget = plan.budget(resources)
            slots = capacity.check_request(
                resources, cpus=budget.cpus, gpus=budget.gpus, workers=budget.workers
            )
            slots = min(slots, options.max_concurrent_trials or slots)
        plan.check(budget)
        config = plan.study(budget, folder.name)
        code = record.get("environment", {}).get("code")
        check_study(options, config, data.store, folder, code)
        out = console()
        out.print(f"data: {data.words}", highlight=False)
        out.print(f"budget: {budget.reason}; {slots} at once")
        for name, dist in plan.space.distributions().items():
            out.print(f"search {name}: {dist.kind} {list(dist.values)}", highlight=False)
        out.print("first trial:")
        point = plan.space.first()
        verbatim(plan.space.run_config(plan.task.name, plan.fixed(budget), point).to_yaml())
        out.print(f"scheduler: {describe_rungs(config)}", highlight=False)
        cost = estimate.study_cost(
            config,
            data.store,
            slots=slots,
            final_seeds=options.final_seeds,
            num_dev=data.num_dev,
        )
        for line in describe(cost, price_per_gpu_hour):
            out.print(line, highlight=False)
    out.print("Nothing was started (--dry-run).")
