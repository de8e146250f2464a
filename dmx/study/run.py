"""One study from its options to its report: checked, searched, tested, written down."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dmx import process
from dmx.cluster import capacity, connection
from dmx.costs import estimate
from dmx.costs.estimate import check_price, corner_runs, describe, dry_data
from dmx.data import prepare
from dmx.data.store import Store, open_store
from dmx.errors import InterruptedRun
from dmx.runs.folder_sync import FolderSync
from dmx.runs.run import Run
from dmx.runs.study import Study
from dmx.schema import is_url
from dmx.search.rungs import describe_rungs
from dmx.storage.remote import StorageLayout, copy_store
from dmx.study import results
from dmx.study.folder import check_free, check_unused, open_folder, settings_event
from dmx.study.plan import Plan, StudyOptions, check_space, check_study, fit, make_plan
from dmx.study.study import StudyConfig, train_trials
from dmx.study.views import TensorBoardView, choose_view, write_json
from dmx.terminal import console, verbatim

logger = logging.getLogger("dmx.tune")


def run_study(
    attention: str,
    task: str,
    *,
    recorded: Mapping[str, Any] | None = None,
    write_page: Callable[[Path], Path | None] = lambda folder: None,
    **asked: Any,
) -> Study:
    """Run or continue a study, print its end, and return it.

    Args:
        recorded: the options that its journal keeps for the next session.
        write_page: what writes a complete study's report into its folder.
        asked: the other fields of StudyOptions.

    Raises:
        DmxError: it cannot be run; nothing was started. InterruptedRun: a signal came while the
            study was under way. StorageError: its storage stayed away.
    """
    options = StudyOptions(attention=attention, task=task, **asked)
    folder, places = options.find(options.default_name)
    sync = FolderSync(places)
    sync.restore()
    record = Run.read(folder).session if options.resume else {}
    if not options.resume:
        check_free(folder)
    plan = make_plan(options, record.get("settings", {}))
    process.files_decide()
    begun = options.resume
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(process.terminate_like_interrupt())
            # What can be refused is refused before data are made, Ray is started, or a file is
            # written: a study that never began is in nobody's way.
            resources = _resources(options, stack)
            config = _fitted(plan, resources, folder.name, places)
            with capacity.for_task():  # a shard of data that waits for room is spoken of
                store = _open_data(plan, places, generate=options.prepare)
            settings, files = check_study(options, config, store, folder, record)
            if options.resume:
                check_unused(folder)
            logger.info("study %s on data: %s; %s", folder, store.manifest.label, config.reason)
            if options.address is None:
                resources = stack.enter_context(connection.connect(None))
            if options.trials_per_gpu == capacity.AUTO:
                fitting = capacity.measure_per_gpu(corner_runs(config), store)
                config = fit(plan, resources, folder.name, places, trials_per_gpu=fitting)
            slots = _slots(config, resources, options)
            kept = dict(recorded or {})
            if not store.manifest.is_sample and not is_url(options.data_root or ""):
                kept.setdefault("data_root", str(store.folder.parent))
            event = settings_event("study", settings, kept)
            open_folder(folder, event, resume=options.resume, files=files)
            begun = True
            stack.enter_context(sync)
            return _search(config, store, folder, options, slots, write_page)
    except KeyboardInterrupt:  # outside of the trials' own time, which ends more gently
        if not begun:
            raise
        raise InterruptedRun from None


def _resources(options: StudyOptions, stack: contextlib.ExitStack) -> capacity.Resources:
    """Of this machine, without starting Ray; only of a cluster must Ray be asked."""
    if options.address is None:
        return capacity.local_resources()
    return stack.enter_context(connection.connect(options.address))


def _fitted(
    plan: Plan, resources: capacity.Resources, name: str, places: StorageLayout
) -> StudyConfig:
    """The study on such resources, where it has room."""
    config = fit(plan, resources, name, places)
    _slots(config, resources, plan.options)
    check_space(config, here=plan.options.address is None)
    return config


def _slots(config: StudyConfig, resources: capacity.Resources, options: StudyOptions) -> int:
    """Trials at once."""
    slots = capacity.check_room(config.workers, resources)
    return min(slots, options.max_concurrent_trials or slots)


def _open_data(
    plan: Plan, places: StorageLayout, *, generate: bool, temporary: Path | None = None
) -> Store:
    """The task's data, copied to this node where `places` says so.

    With `temporary`, a folder, they are read where they are, or copied there and not to where the
    node keeps them.

    Raises:
        DataError: see prepare.open_data and copy_store.
    """
    options, task = plan.options, plan.task.name
    if places.data_source is not None and is_url(places.data_source):
        assert places.node_data is not None
        return open_store(copy_store(places.data_source, task, temporary or Path(places.node_data)))
    store = prepare.open_data(
        task,
        None if options.data_root is None else Path(options.data_root),
        allow_sample=options.address is None,
        generate=generate,
        on_cluster=options.address is not None,
        temporary=temporary,
    )
    here = store.folder if temporary is not None else places.data(str(store.folder))
    return store if here == store.folder else open_store(here)


def _search(
    config: StudyConfig,
    store: Store,
    folder: Path,
    options: StudyOptions,
    slots: int,
    write_page: Callable[[Path], Path | None],
) -> Study:
    """Train the trials, and what follows them."""
    label = store.manifest.label
    constants = {"attention": config.space.attention, "task": config.task, "data": label}
    tensorboard = TensorBoardView(folder, constants, config.space.names())
    view = choose_view(
        options.output,
        num_trials=config.num_trials,
        max_steps=config.max_steps,
        title=f"{folder.name} (data: {label})",
    )
    with view, contextlib.closing(tensorboard):
        study = train_trials(config, store, folder, slots=slots, observers=(view, tensorboard))
    results.finish(config, store, study, slots=slots, final_seeds=options.final_seeds)
    summary = results.write_files(study)
    page = write_page(folder) if study.complete else None
    if options.output == "json":
        write_json(event="finished", **summary, report=page)
    else:
        results.show(study, store)
        if page is not None:
            verbatim(f"report: {page}")
    return study


def dry_run(
    attention: str, task: str, *, price_per_gpu_hour: float | None = None, **asked: Any
) -> None:
    """Check all that run_study would check, print the plan and its cost, and start nothing."""
    options = StudyOptions(attention=attention, task=task, **asked)
    check_price(price_per_gpu_hour, dry_run=True)
    folder, places = options.find(options.default_name)
    record = Run.read(folder).session if options.resume else {}
    plan = make_plan(options, record.get("settings", {}))
    root = None if options.data_root is None else Path(options.data_root)

    def opened(temporary: Path) -> Store:
        return _open_data(plan, places, generate=False, temporary=temporary)

    generate = options.prepare and not is_url(options.data_root or "")
    with contextlib.ExitStack() as stack:
        resources = _resources(options, stack)
        config = _fitted(plan, resources, folder.name, places)
        slots = _slots(config, resources, options)
        data = stack.enter_context(dry_data(plan.task, root, opened, generate=generate))
        check_study(options, config, data.store, folder, record)
        out = console()
        out.print(f"data: {data.words}", highlight=False)
        out.print(f"budget: {config.reason}; {slots} at once")
        for name, dist in plan.space.distributions().items():
            out.print(f"search {name}: {dist.kind} {list(dist.values)}", highlight=False)
        out.print("first trial:")
        first = plan.space.run_config(plan.task.name, config.overrides, plan.space.first())
        verbatim(first.to_yaml())
        out.print(f"scheduler: {describe_rungs(config)}", highlight=False)
        cost = estimate.study_cost(
            *(config, data.store),
            slots=slots,
            final_seeds=options.final_seeds,
            num_dev=data.num_dev,
        )
        for line in describe(cost, price_per_gpu_hour):
            out.print(line, highlight=False)
    out.print("Nothing was started (--dry-run).")
