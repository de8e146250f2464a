"""A single run: one configuration, trained in this process or by a gang, then tested; continued."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dmx import process
from dmx.config import RunConfig, parse_run_config, schedule
from dmx.costs import estimate
from dmx.costs.estimate import check_price, describe, dry_data
from dmx.costs.measure import check_memory
from dmx.data.prepare import open_data
from dmx.data.store import Store
from dmx.errors import CheckpointError, ConfigError, InterruptedRun, RunFailedError
from dmx.nn.device import pick_device
from dmx.runs import layout
from dmx.runs.run import Run
from dmx.schema import check_number, flatten, is_url, local_path, read_yaml, to_dict
from dmx.storage.files import write_atomic
from dmx.study.folder import check_free, check_same, open_folder, run_folder, settings_event
from dmx.tensorboard import RunWriter
from dmx.terminal import console, verbatim
from dmx.training.checkpoint import meant_checkpoint
from dmx.training.evaluation import EvaluationJob, evaluate_checkpoint
from dmx.training.job import Job, Workers, check_batch, check_device, share_out
from dmx.training.passes import Evaluation
from dmx.training.runner import Runner
from dmx.training.samples import write_samples
from dmx.training.trainer import resolve
from dmx.training.transfer import (
    Weights,
    check_reinit,
    identified,
    plan_transfer,
    read_weights,
    shapes_of,
)

logger = logging.getLogger("dmx.train")
_SLICE_SECONDS = 1.0
"""How long a signal to stop waits at most, beside the step that is under way."""
_LEAST_FREE = 2**26


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a single run lies and who computes it.

    Attributes:
        name: its folder below `storage`; None is ATTENTION-TASK.
        data_root: prepared data; given, missing ones are an error, not a sample.
        prepare: generate missing data that dmx can generate.
        threads: CPU threads; 0 is all cores.
        gpus_per_trial, workers_per_trial: GPUs and processes that share the work, in a Ray cluster.
        address: of a running one; None is this machine.
        resume: continue the run that is in the folder.
    """

    name: str | None = None
    storage: str = "runs"
    data_root: str | None = None
    prepare: bool = True
    threads: int = 0
    gpus_per_trial: int | None = None
    workers_per_trial: int | None = None
    address: str | None = None
    resume: bool = False

    def folder(self, default_name: str) -> Path:
        """The run's own, absolute; nothing is created."""
        local_path("--storage", self.storage, "a single run is kept in a folder; name one")
        return run_folder(self.storage, self.name, default_name)

    def workers(self, config: RunConfig) -> Workers:
        """One with all of this machine's cores, or as many as the options say.

        Raises:
            ConfigError: the options do not go together, or ask for more than this machine has.
        """
        gpus = self.gpus_per_trial or 0
        check_number("--threads", self.threads, least=0)
        check_number("--gpus-per-trial", gpus, least=0)
        asked = max(gpus, self.workers_per_trial or 1)
        cpus = self.threads or (process.num_cores() if self.address is None else asked)
        workers = share_out(cpus=cpus, gpus=gpus, workers=self.workers_per_trial)
        check_batch(config.train.batch_size, workers.count)
        if workers.count == 1 and self.address is not None:
            raise ConfigError(
                "--address is for a run of several workers; add --gpus-per-trial, or leave it out."
            )
        if workers.count > 1:
            check_device(config.train.device, workers)
        if self.address is None:
            check_memory([("", config)], pick_device(config.train.device))
        if self.address is None and workers.count > 1:
            from dmx.cluster import capacity

            capacity.check_room(workers, capacity.local_resources())
        return workers


def read_config(path: Path) -> dict[str, Any]:
    """The plain RunConfig in a YAML file, of a checkpoint, or of a run's best one."""
    path = meant_checkpoint(local_path("--config", str(path)))
    return read_yaml(path / layout.CONFIG_FILE if path.is_dir() else path)


def configure(
    attention: str | None = None,
    task: str | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    base: Path | None = None,
    init_from: Path | None = None,
    reinit: Iterable[str] = (),
    recorded: Mapping[str, Any] | None = None,
) -> RunConfig:
    """One experiment from what is given; the task's preset lies under it.

    Args:
        attention: `butterfly-64`. settings: dotted, as {"train.num_steps": 2000}.
        base: a config to start from (see read_config). recorded: of the run that is continued.
        init_from: a checkpoint or *_output.model to start from. reinit: what may start afresh.

    Raises:
        ConfigError: it is not enough, or does not go together.
    """
    if recorded is None and base is None and None in (attention, task):
        raise ConfigError("give --attention and --task, --config FILE, or --resume RUN.")
    layers: list[Mapping[str, Any]] = [] if recorded is None else [recorded]
    layers += [] if base is None else [read_config(base)]
    named = {"task": task, "attention": attention}
    layers += [{key: value} for key, value in named.items() if value is not None]
    if init_from is not None:
        path = meant_checkpoint(local_path("--init-from", str(init_from)))
        layers += [{"init": None}, {"init.path": str(path.absolute())}]
    layers.append(settings or {})
    given = {key for layer in layers for key in flatten(layer)}
    if reinit := list(reinit):
        if "init.path" not in given:
            raise ConfigError("--reinit is given without --init-from; leave it out.")
        layers.append({"init.reinit": reinit})
    config = parse_run_config(*layers)
    follow = schedule(config.task_info, config.train.num_steps)
    if follow := {key: value for key, value in follow.items() if key not in given}:
        logger.info(
            "%s: they follow from train.num_steps",
            ", ".join(f"{key} is {value:,}" for key, value in follow.items()),
        )
    return config


def run_training(
    experiment: RunConfig | str,
    task: str | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    recorded: Mapping[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Train one configuration, test its best checkpoint, and print the end.

    Args:
        experiment: see configure; or an attention's name, with `task` and dotted `settings`.
        recorded: the command's options that the journal keeps for the next session.
        options: the fields of RunOptions.

    Raises:
        DmxError: it cannot be run; nothing was started. RunFailedError: it cannot go on.
        InterruptedRun: a signal came; what was trained is kept.
    """
    asked = RunOptions(**options)
    called = experiment if isinstance(experiment, str) else experiment.attention.name
    config = configure(experiment, task, settings) if isinstance(experiment, str) else experiment
    workers = asked.workers(config)
    folder = asked.folder(f"{called}-{config.task}")
    if not asked.resume:
        check_free(folder)
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if free < _LEAST_FREE:
        raise ConfigError(f"{folder} has {free >> 20} MB free; give a --storage with room.")
    before = Run.read(folder).settings if asked.resume else {}
    config, start = _source(config, before)
    root = asked.data_root or config.data.root
    store = open_data(config.task, root, allow_sample=True, generate=asked.prepare)
    resolved = resolve(config, store.manifest)
    _tell_transfer(start, resolved)
    data = {"data": store.manifest.label, "data_checksum": store.manifest.checksum}
    now = {"config": to_dict(resolved), **data}
    if asked.resume:
        check_same(folder, now, "run")
    kept = dict(recorded or {})
    if not store.manifest.is_sample:
        kept.setdefault("data_root", str(store.folder.parent))
    job = Job(
        run_config=to_dict(config),
        data_folder=str(store.folder),
        folder=str(folder),
        slice_seconds=_SLICE_SECONDS,
        workers=workers,
    )
    process.files_decide()
    try:
        with process.terminate_like_interrupt() as check, contextlib.ExitStack() as stack:
            gang = None
            if workers.count > 1:  # what does not fit into the cluster is refused before it begins
                from dmx.cluster import connection

                gang = stack.enter_context(connection.opened(job, asked.address))
            open_folder(folder, settings_event("run", now, kept), resume=asked.resume)
            _train(job, config, store, gang, check)
    except KeyboardInterrupt:
        raise InterruptedRun from None
    return Run.read(folder)


def dry_run(config: RunConfig, *, price_per_gpu_hour: float | None = None, **options: Any) -> None:
    """Check what can be checked before a run, and print what it would cost; nothing is written."""
    asked = RunOptions(**options)
    check_price(price_per_gpu_hour)
    asked.workers(config)
    default = f"{config.attention.name}-{config.task}"
    before = Run.read(asked.folder(default)).settings if asked.resume else {}
    config, start = _source(config, before)
    root = asked.data_root or config.data.root

    def opened(temporary: Path) -> Store:
        return open_data(
            config.task, root, allow_sample=True, generate=asked.prepare, temporary=temporary
        )

    generate = asked.prepare and not is_url(root or "")
    at = Path(root) if root else None
    with dry_data(config.task_info, at, opened, generate=generate) as data:
        _tell_transfer(start, resolve(config, data.store.manifest))
        threads = asked.threads or process.num_cores()
        cost = estimate.run_cost(config, data.store, threads=threads, num_dev=data.num_dev)
    out = console()
    out.print(f"data: {data.words}", highlight=False)
    for line in describe(cost, price_per_gpu_hour):
        out.print(line, highlight=False)
    out.print("Nothing was started (--dry-run).")


def _source(config: RunConfig, before: Mapping[str, Any]) -> tuple[RunConfig, Weights | None]:
    """The config with the weights that it starts from identified, and those.

    A run that goes on from what it was begun with needs them no more: they may be gone.
    """
    if config.init is None or to_dict(config.init) == before.get("config", {}).get("init"):
        return config, None
    weights = read_weights(Path(config.init.path))
    return identified(config), weights


def _tell_transfer(start: Weights | None, resolved: RunConfig) -> None:
    """Say what the run takes over from other weights, before anything is written."""
    init = resolved.init
    if start is None or init is None:
        return
    target, tasks = shapes_of(resolved), (start.task, resolved.task_info)
    try:
        check_reinit(init.reinit, [*start.shapes, *target])
        report = plan_transfer(start.shapes, target, init.reinit, tasks=tasks)
    except CheckpointError as error:
        raise CheckpointError(f"--init-from {init.path}: {error}") from None
    verbatim(f"from {init.path}: {report}")


def _train(job: Job, config: RunConfig, store: Store, gang: Any, check: Callable[[], None]) -> None:
    """Train to the end, test, and write result.json.

    Args:
        gang: what trains it; None is a Runner in this process. check: raises KeyboardInterrupt
            once a signal has come.
    """
    folder, data = Path(job.folder), store.manifest.label
    events = RunWriter(folder)
    shown = {k: "-" if v is None else v for k, v in flatten(job.run_config).items()}
    events.start({**shown, "data": data}, folder.name)
    logger.info("run %s on data: %s", folder, data)
    count = TextColumn("{task.completed}/{task.total} steps")
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    out = console(stderr=True)
    with Progress(*columns, console=out, disable=not out.is_terminal) as bar:
        row = bar.add_task("training", total=config.train.num_steps)

        def show(step: int, _: int = 0) -> None:
            bar.update(row, completed=step)

        with contextlib.closing(gang or Runner(job, on_step=show)) as runner:
            report: Mapping[str, Any] = {}
            while not report.get("done"):
                with process.stop_between_steps() as stopped:
                    report = runner.step()
                if stopped():
                    raise KeyboardInterrupt
                check()
                if report.get(layout.FAILURE):
                    events.end("FAILED")
                    raise RunFailedError(f"the run failed: {report[layout.FAILURE]}")
                if not report.get(layout.UNDER_WAY):
                    show(int(report[layout.STEPS]))
                    _tell_report(events, folder, report)
    result = _test(job)
    events.scalars({layout.TEST_ACCURACY: result.accuracy}, int(report[layout.STEPS]))
    events.end("COMPLETE")
    summary = {
        "data": data,
        "is_sample": store.manifest.is_sample,
        layout.TEST_ACCURACY: result.accuracy,
        layout.TEST_LOSS: result.loss,
        **{k: report[k] for k in layout.REPORT_KEYS if k in report},
    }
    write_atomic(
        folder / layout.RESULT_FILE, json.dumps(to_dict(summary, finite=True), indent=2) + "\n"
    )
    verbatim(
        f"test accuracy {result.accuracy:.4f} over {result.num_examples} examples "
        f"(best dev accuracy {report[layout.BEST_DEV_ACCURACY]:.4f}; data: {data})\n"
        f"files: {folder}  (best/, last/, result.json)"
    )


def _test(job: Job) -> Evaluation:
    """The best checkpoint's; by one worker."""
    best = str(Path(job.folder) / layout.BEST_DIR)
    wanted = EvaluationJob(checkpoint=best, data_folder=job.data_folder)
    if job.workers.count == 1:
        return evaluate_checkpoint(wanted, job.workers.threads)
    from dmx.cluster import gang

    return gang.evaluate(wanted, job.workers)


def _tell_report(events: RunWriter, folder: Path, report: Mapping[str, Any]) -> None:
    step = int(report[layout.STEPS])
    events.scalars(report, step)
    if report[layout.BEST_STEP] == step:
        write_samples(events, folder / layout.BEST_DIR, step)
    logger.info(
        "step %d: train loss %.4f, dev loss %.4f, dev accuracy %.4f (best %.4f)",
        *(step, report[layout.TRAIN_LOSS], report[layout.DEV_LOSS]),
        *(report[layout.DEV_ACCURACY], report[layout.BEST_DEV_ACCURACY]),
    )
