# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.train`: one run of one configuration, continued where it stopped; no Ray."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dmx import process
from dmx.cli import resuming, train_workers
from dmx.cli.options import run
from dmx.cli.train import parser
from dmx.config import RunConfig, parse_run_config, schedule
from dmx.costs import estimate
from dmx.costs.estimate import check_price, describe, dry_data
from dmx.costs.measure import check_memory
from dmx.data.prepare import open_data
from dmx.data.store import Store
from dmx.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    CheckpointError,
    ConfigError,
)
from dmx.format import command_line
from dmx.nn.device import pick_device
from dmx.process import num_cores
from dmx.runs import layout
from dmx.runs.layout import (
    BEST_DEV_ACCURACY,
    BEST_STEP,
    DEV_ACCURACY,
    DEV_LOSS,
    FAILURE,
    REPORT_KEYS,
    STEPS,
    TEST_ACCURACY,
    TEST_LOSS,
    TRAIN_LOSS,
    UNDER_WAY,
)
from dmx.schema import flatten, local_path, parse_assignments, read_yaml, to_dict
from dmx.search.study_settings import changes, settings_event
from dmx.storage.files import is_there, write_atomic
from dmx.study import folder as study_folder
from dmx.study.locations import run_folder
from dmx.tensorboard import RunWriter
from dmx.terminal import console, verbatim
from dmx.training.checkpoint import meant_checkpoint, open_checkpoint
from dmx.training.job import Job, Workers
from dmx.training.predictions import config_on, evaluate_checkpoint, write_samples
from dmx.training.runner import Runner
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


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    p = parser()
    args = resuming.parse(p, p.given(argv), "run", default_name=_default_name)
    for option, path in (
        ("--config", args.config),
        ("--init-from", args.init_from),
        ("--evaluate", args.evaluate),
    ):
        if path is not None:
            local_path(option, path)
    local_path("--storage", args.storage, "a single run is kept in a folder; name one")
    for name in ("config", "init_from", "evaluate"):
        if getattr(args, name) is not None:
            setattr(args, name, str(meant_checkpoint(Path(getattr(args, name)))))
    if args.evaluate is not None:
        return _evaluate(args)
    if "init_from" in args.given:
        args.given["init_from"] = args.init_from
    config = _config(args)
    if args.show:
        sys.stdout.write(config.to_yaml())
        return EXIT_OK
    workers = train_workers.choose(args, config)
    if args.address is None:
        check_memory([("", config)], pick_device(config.train.device))
    check_price(args.price_per_gpu_hour, dry_run=args.dry_run)
    if args.reinit and config.init is None:
        raise ConfigError("--reinit is given without --init-from; leave it out.")
    start = None
    if config.init is not None and (not args.resume or "init_from" in args.now):
        start = read_weights(Path(config.init.path))
        config = identified(config)
    if args.dry_run:
        return _dry_run(args, config, start)
    folder = _folder(args, config)
    store = open_data(
        config.task, _data_root(args, config), allow_sample=True, generate=args.prepare
    )
    resolved = resolve(config, store.manifest)
    _tell_transfer(start, resolved)
    again = command_line("dmx.train", argv, add="--resume")
    settings = {
        "config": to_dict(resolved),
        "data": store.manifest.label,
        "data_checksum": store.manifest.checksum,
    }
    if args.resume:
        _check_same(folder, args.record.get("settings") or _settings_of(folder), settings)
    record = settings_event("run", settings, resuming.options_of(args, store))
    process.files_decide()
    try:
        with (
            process.terminate_like_interrupt() as check,
            train_workers.connected(workers, args.address),
        ):
            return _train(args, config, store, folder, workers, record, check)
    except KeyboardInterrupt:
        logger.warning("stopped; what was trained is kept. Continue with:\n%s", again)
        return EXIT_INTERRUPTED


def _tell_transfer(start: Weights | None, resolved: RunConfig) -> None:
    """Say what the run takes over from --init-from, before anything is written.

    Raises:
        CheckpointError: it does not fit.
    """
    init = resolved.init
    if start is None or init is None:
        return
    target, tasks = shapes_of(resolved), (start.task, resolved.task_info)
    remedy = "; name what may start afresh with --reinit"
    try:
        check_reinit(init.reinit, [*start.shapes, *target], "--reinit")
        report = plan_transfer(start.shapes, target, init.reinit, tasks=tasks, remedy=remedy)
    except CheckpointError as error:
        raise CheckpointError(f"--init-from {init.path}: {error}") from None
    verbatim(f"from {init.path}: {report}")


def _default_name(given: Mapping[str, Any]) -> str | None:
    attention, task = given.get("attention"), given.get("task")
    if given.get("config") is not None and not (attention and task):
        found = parse_run_config(_read_config(Path(given["config"])))
        attention, task = attention or found.attention.name, task or found.task
    return f"{attention}-{task}" if attention and task else None


def _read_config(path: Path) -> dict[str, Any]:
    path = meant_checkpoint(path)
    return read_yaml(path / layout.CONFIG_FILE if path.is_dir() else path)


def _dry_run(args: argparse.Namespace, config: RunConfig, start: Weights | None) -> int:
    """What the run would cost; nothing is written."""
    root = _data_root(args, config)

    def prepared(temporary: Path) -> Store:
        return open_data(config.task, root, allow_sample=True, temporary=temporary)

    with dry_data(config.task_info, root, prepared, generate=args.prepare) as data:
        _tell_transfer(start, resolve(config, data.store.manifest))
        cost = estimate.run_cost(
            config,
            data.store,
            threads=args.threads or num_cores(),
            num_dev=data.num_dev,
        )
    out = console()
    out.print(f"data: {data.words}", highlight=False)
    for line in describe(cost, args.price_per_gpu_hour):
        out.print(line, highlight=False)
    out.print("Nothing was started (--dry-run).")
    return EXIT_OK


def _data_root(args: argparse.Namespace, config: RunConfig) -> Path | None:
    root = args.data_root or config.data.root
    return None if root is None else local_path("--data-root", root)


def _config(args: argparse.Namespace) -> RunConfig:
    layers: list[dict[str, Any]] = []
    known = args.record.get("settings", {}).get("config")
    if known is not None:
        layers.append(known)
    if args.config is not None and (known is None or "config" in args.now):
        layers.append(_read_config(Path(args.config)))
    for key in ("task", "attention"):
        if getattr(args, key) is not None:
            layers.append({key: getattr(args, key)})
    if args.init_from is not None and (known is None or "init_from" in args.now):
        layers.append({"init": None})
        layers.append({"init.path": str(Path(args.init_from).absolute())})
    starts = any("init.path" in flatten(layer) for layer in layers)
    if args.reinit and starts and (known is None or "reinit" in args.now):
        layers.append({"init.reinit": args.reinit})
    layers.append(flatten(parse_assignments(args.settings)))
    named = None not in (args.task, args.attention)
    if known is None and args.config is None and not named:
        raise ConfigError("give --attention and --task, --config FILE, or --resume RUN.")
    config = parse_run_config(*layers)
    given = {key for layer in layers for key in flatten(layer)}
    follow = schedule(config.task_info, config.train.num_steps)
    if follow := {k: v for k, v in follow.items() if k not in given}:
        logger.info(
            "%s: they follow from train.num_steps",
            ", ".join(f"{key} is {value:,}" for key, value in follow.items()),
        )
    return config


def _folder(args: argparse.Namespace, config: RunConfig) -> Path:
    attention = args.attention or config.attention.name
    folder = run_folder(args.storage, args.name, f"{attention}-{config.task}")
    if not args.resume:
        study_folder.check_free(folder)
    if args.resume and not folder.exists():
        raise ConfigError(f"there is no run to resume in {folder}; leave --resume out.")
    place = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < 2**26:
        raise ConfigError(f"{folder} has {free >> 20} MB free; give a --storage with room.")
    return folder


def _settings_of(folder: Path) -> dict[str, Any]:
    """Of a run of an earlier dmx, which left them in its checkpoints alone."""
    try:
        return {"config": to_dict(open_checkpoint(folder / layout.LAST_DIR).config)}
    except CheckpointError:
        return {}


def _check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if not is_there(folder / layout.LAST_DIR):
        return  # it was stopped before its first evaluation: it starts again
    compared = {key: new[key] for key in old if key in new}
    changed = changes(old, compared, free=("config.data.root", "config.init.path"))
    if any(text.startswith("train.num_steps") for text in changed):
        raise ConfigError(
            f"{folder} holds another run ({'; '.join(changed[:3])}); the learning rate's schedule "
            f"spans all steps, so train on in another run: --init-from {folder / layout.BEST_DIR}."
        )
    if changed:
        raise ConfigError(
            f"{folder} holds another run ({'; '.join(changed[:3])}); repeat its settings or give "
            "--name."
        )


def _train(
    args: argparse.Namespace,
    config: RunConfig,
    store: Store,
    folder: Path,
    workers: Workers,
    record: Mapping[str, Any],
    check: Callable[[], None],
) -> int:
    if not args.resume:
        study_folder.clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    study_folder.note_settings(folder, record)
    job = Job(
        run_config=to_dict(config),
        data_folder=str(store.folder),
        folder=str(folder),
        slice_seconds=_SLICE_SECONDS,
        **workers.job_fields(),
    )
    events = RunWriter(folder)
    shown = flatten(to_dict(config))
    values = {k: "-" if v is None else v for k, v in shown.items()}
    events.start({**values, "data": store.manifest.label}, folder.name)
    logger.info("run %s on data: %s", folder, store.manifest.label)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
    )
    out = console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=out, disable=not out.is_terminal) as bar:
        row = bar.add_task("training", total=config.train.num_steps)

        def show(step: int) -> None:
            bar.update(row, completed=step)

        with _opened(job, args.address, show) as runner:
            while True:
                with process.stop_between_steps() as stopped:
                    report = runner.step()
                if stopped():
                    raise KeyboardInterrupt
                check()
                if report.get(UNDER_WAY):
                    continue
                if report.get(FAILURE):
                    logger.error("the run failed: %s", report[FAILURE])
                    events.end("FAILED")
                    return EXIT_FAILED
                show(int(report[STEPS]))
                events.scalars(report, int(report[STEPS]))
                if report[BEST_STEP] == report[STEPS]:
                    write_samples(events, folder / layout.BEST_DIR, int(report[STEPS]))
                logger.info(
                    "step %d: train loss %.4f, dev loss %.4f, dev accuracy %.4f (best %.4f)",
                    *(report[k] for k in (STEPS, TRAIN_LOSS, DEV_LOSS)),
                    *(report[k] for k in (DEV_ACCURACY, BEST_DEV_ACCURACY)),
                )
                if report["done"]:
                    break
            runner.close()
            result = runner.evaluate(folder / layout.BEST_DIR, "test")
    events.scalars({TEST_ACCURACY: result["accuracy"]}, int(report[STEPS]))
    events.end("COMPLETE")
    summary = {
        "data": store.manifest.label,
        "is_sample": store.manifest.is_sample,
        TEST_ACCURACY: result["accuracy"],
        TEST_LOSS: result["loss"] if math.isfinite(result["loss"]) else None,
        **{k: report[k] for k in REPORT_KEYS if k in report},
    }
    write_atomic(folder / layout.RESULT_FILE, json.dumps(summary, indent=2) + "\n")
    verbatim(
        f"test accuracy {result['accuracy']:.4f} over {result['num_examples']:.0f} examples "
        f"(best dev accuracy {report[BEST_DEV_ACCURACY]:.4f}; data: {store.manifest.label})\n"
        f"files: {folder}  (best/, last/, result.json)"
    )
    return EXIT_OK


def _opened(
    job: Job, address: str | None, show: Callable[[int], None]
) -> contextlib.AbstractContextManager[Any]:
    """The job's runner, closed at the end of the block."""
    if job.workers > 1:
        return train_workers.opened(job, address)
    return contextlib.closing(Runner(job, on_step=lambda step, _: show(step)))


def _evaluate(args: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(Path(args.evaluate))
    task = args.task or checkpoint.config.task
    config = config_on(checkpoint, task, flatten(parse_assignments(args.settings)))
    weights = Weights(checkpoint.model_state(), checkpoint.config.task_info)
    tasks = weights.task, config.task_info
    try:
        report = plan_transfer(weights.shapes, shapes_of(config), tasks=tasks, remedy="")
    except CheckpointError as error:
        raise CheckpointError(f"{args.evaluate} on task {task}: {error}") from None
    root = _data_root(args, checkpoint.config)
    store = open_data(task, root, allow_sample=True, generate=args.prepare)
    threads = args.threads or num_cores()
    result = evaluate_checkpoint(
        args.evaluate, str(store.folder), args.split, threads, config=to_dict(config)
    )
    out = {
        "checkpoint": args.evaluate,
        "task": task,
        "data": store.manifest.label,
        "split": args.split,
    }
    if report.positions:  # else the model is the checkpoint's own
        out["weights"] = f"of {checkpoint.config.task}, {report.positions}"
    sys.stdout.write(yaml.safe_dump({**out, **result}, sort_keys=False))
    return EXIT_OK


if __name__ == "__main__":
    run("dmx.train", main)
