"""A curriculum from its options to its end: checked, run or continued; or only measured."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from dmx import terminal
from dmx.cluster import connection
from dmx.cluster.capacity import Resources, local_resources
from dmx.costs.estimate import Cost, stage_cost
from dmx.curriculum import checks, planner
from dmx.curriculum.backend import RayBackend
from dmx.curriculum.config import CurriculumConfig, StageConfig, load_curriculum
from dmx.curriculum.controller import ClusterLost, Controller, CurriculumLog
from dmx.curriculum.planner import ResourcePlan
from dmx.curriculum.views import (
    TENSORBOARD_DIR,
    TensorBoardView,
    log_report,
    show_status,
    table,
    write_lineage,
)
from dmx.data.store import Store
from dmx.errors import ConfigError
from dmx.format import duration
from dmx.process import files_decide, terminate_like_interrupt
from dmx.runs import layout
from dmx.runs.curriculum import Curriculum
from dmx.runs.folder_sync import FolderSync
from dmx.schema import check_number, is_url
from dmx.storage.files import fsync_path, write_atomic
from dmx.storage.journal import Journal
from dmx.storage.remote import StorageLayout
from dmx.study.folder import RunLocation, append_settings, settings_event, stage_data_root
from dmx.tasks import NUM_IMAGES
from dmx.training.transfer import TransferReport

logger = logging.getLogger("dmx.curriculum")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a session ended.

    Attributes:
        passed: every selected stage was promoted.
        broken: why a stage could not run: its data, or the checkpoint it starts from.
    """

    record: Curriculum
    passed: bool
    broken: Mapping[str, str]


@dataclass(frozen=True)
class Session(RunLocation):
    """What a caller asks of a curriculum; the options of `dmx.curriculum`, by their names.

    Attributes:
        curriculum: a shipped name, a YAML path, or what such a file holds.
        attention, overrides: see load_curriculum.
        until: the last stage of this session. from_stage: train it and its descendants again.
        resume: continue a run. fresh: move an existing run aside.
    """

    curriculum: str | Path | Mapping[str, Any]
    _: KW_ONLY
    attention: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    until: str | None = None
    from_stage: str | None = None
    resume: bool = False
    fresh: bool = False
    cpus_per_trial: float | None = None
    gpus_per_trial: float | None = None
    workers_per_trial: int | None = None
    address: str | None = None

    # -- what it means ----------------------------------------------------------------------

    @functools.cached_property
    def config(self) -> CurriculumConfig:
        """The curriculum, checked."""
        return load_curriculum(self.curriculum, attention=self.attention, overrides=self.overrides)

    @functools.cached_property
    def _places(self) -> tuple[Path, StorageLayout]:
        return self.find(self.config.name)

    @property
    def folder(self) -> Path:
        """The run's, on this node."""
        return self._places[0]

    @property
    def places(self) -> StorageLayout:
        """Where the run's nodes meet."""
        return self._places[1]

    @functools.cached_property
    def _root(self) -> Path:
        tasks = {stage.task for stage in self.config.stages}
        return stage_data_root(self.places, self.data_root, tasks)

    def check(self) -> None:
        """See that the options make sense; nothing is created."""
        for given, option in ((self.until, "--until"), (self.from_stage, "--from-stage")):
            if given is not None:
                try:
                    self.config.stage(given)
                except ConfigError as error:
                    raise ConfigError(f"{option}: {error}") from None
        check_number("--cpus-per-trial", self.cpus_per_trial, above=0)
        check_number("--gpus-per-trial", self.gpus_per_trial, least=0)
        if self.fresh and (self.resume or self.from_stage):
            raise ConfigError("--fresh starts anew; it does not go with --resume or --from-stage.")
        if self.fresh and self.places.run_url is not None:
            raise ConfigError("--fresh moves a local run aside; with a URL give another --name.")

    def _plan(self, resources: Resources, *, check: bool = True) -> ResourcePlan:
        plan = planner.plan_resources(
            self.config,
            resources,
            cpus=self.cpus_per_trial,
            gpus=self.gpus_per_trial,
            workers=self.workers_per_trial,
        )
        if check:
            planner.check_plan(self.config, plan, local=self.address is None)
        return plan

    def _check_data(self) -> tuple[dict[str, Store | None], dict[str, TransferReport]]:
        """By stage: its data, where they are there, and what it takes over."""
        data = {s.name: checks.find_data(s, self._root) for s in self.config.stages}
        return data, checks.check_transfers(self.config, data)

    # -- a session --------------------------------------------------------------------------

    def run(self, recorded: Mapping[str, Any] | None = None) -> Outcome:
        """Run or continue the curriculum until nothing is left that could be done.

        Args:
            recorded: the options that the journal keeps for the next session.

        Raises:
            DmxError: something is wrong with the curriculum, its data or its record; nothing was
                begun.
            ClusterLost, KeyboardInterrupt: the session was cut off; the same call continues it.
        """
        self.check()
        with contextlib.ExitStack() as stack:
            resources = local_resources()
            if self.address is not None:  # refused before anything is written
                resources = stack.enter_context(connection.connect(self.address))
            self._plan(resources)
            sync = FolderSync(self.places)
            sync.restore(checkpoints=True)
            _, transfers = self._check_data()
            # What one that was cut off began is continued: starting over would lose its work.
            if self.fresh and not Curriculum.read(self.folder).cut_off(fresh=True):
                _move_aside(self.folder)
            files_decide()
            log = stack.enter_context(contextlib.closing(_open(self.folder)))
            selected = [s.name for s in self.config.stages]
            if self.until is not None:
                selected = list(self.config.until(self.until))
            self._begin(log, selected, recorded or {})
            write_lineage(self.config, log)
            if not planner.has_work(self.config, log, selected):
                logger.info("nothing is left to do")
                if not (self.folder / TENSORBOARD_DIR).is_dir():
                    TensorBoardView(self.config, self.folder, log.journal.events).close()
                passed = planner.all_passed(log, selected)
                return Outcome(record=log, passed=passed, broken={})
            for stage in self.config.stages:
                if stage.name in transfers and log.stage(stage.name).status == "waiting":
                    source = stage.parent or stage.init_path
                    logger.info("%s starts from %s: %s", stage.name, source, transfers[stage.name])
            with sync:
                return self._work(log, selected)

    def _begin(self, log: CurriculumLog, selected: list[str], recorded: Mapping[str, Any]) -> None:
        """Check the record, apply --from-stage, and write down that a session begins."""
        config = self.config
        if log.created:
            begun = duration(time.time() - log.created)
            logger.info("continuing %s, begun %s ago", self.folder, begun)
        again: tuple[str, ...] = ()
        if self.from_stage is not None:
            if log.cut_off(from_stage=self.from_stage):
                logger.info("continuing what --from-stage %s began", self.from_stage)
            else:
                again = config.descendants(self.from_stage)
        kept = [stage for stage in log.stages if stage.name not in again]
        checks.check_unchanged(config, kept)
        checks.check_checkpoints(kept, selected)
        plain = {"name": config.name, "stages": [s.plain() for s in config.stages]}
        options = dict(recorded)
        if not is_url(self.data_root or ""):
            options.setdefault("data_root", str(self._root))
        append_settings(log.journal, settings_event("curriculum", plain, options))
        log.record(
            "session",
            pid=os.getpid(),
            host=socket.gethostname(),
            argv=sys.argv[1:],
            fresh=self.fresh,
            from_stage=self.from_stage,
            stages=[s.brief() for s in config.stages],
            last_stage=config.last.name,
        )
        if again:
            log.record("reset", stages=list(again))
            names = ", ".join(again)
            logger.info("%s will be trained again; old attempts stay on disk", names)
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        write_atomic(self.folder / layout.CURRICULUM_FILE, text)

    def _work(self, log: CurriculumLog, selected: list[str]) -> Outcome:
        def keep_lineage(record: Curriculum, event: Mapping[str, Any]) -> None:
            if event["event"] in ("started", "decided", "tested"):
                write_lineage(self.config, record)

        with terminate_like_interrupt() as check:
            try:
                with (
                    connection.connect(self.address) as resources,
                    contextlib.closing(
                        TensorBoardView(self.config, self.folder, log.journal.events)
                    ) as tensorboard,
                    contextlib.closing(RayBackend(self.places)) as backend,
                ):
                    log.observers = (log_report, tensorboard.event, keep_lineage)
                    controller = Controller(
                        self.config,
                        log,
                        backend,
                        plan=self._plan(resources),
                        data_root=self._root,
                        selected=selected,
                    )
                    passed = controller.run(check)
                if controller.lost:
                    names = ", ".join(sorted(controller.lost))
                    raise ClusterLost(f"the workers of {names} died again and again")
            except (KeyboardInterrupt, ClusterLost) as error:
                log.record("interrupted", reason=str(error) or "interrupted")
                raise
        log.record("closed", passed=passed)
        return Outcome(record=log, passed=passed, broken=controller.broken)

    # -- without one --------------------------------------------------------------------------

    def show_status(self) -> None:
        """Print where the run stands; see views.show_status."""
        self.check()
        show_status(self.config, self.folder)

    def dry_run(self) -> None:
        """Check all that a session would; print what every stage takes over, needs and costs."""
        self.check()
        plan = self._plan(local_resources(), check=self.address is None)
        data, transfers = self._check_data()
        if self.from_stage is None:
            checks.check_unchanged(self.config, Curriculum.read(self.folder).stages)
        name, stages, out = self.config.name, self.config.stages, terminal.console()
        terminal.verbatim(f"curriculum {name}: {len(stages)} stages; data in {self._root}")
        rows = [_chain_row(s, data[s.name], transfers.get(s.name)) for s in stages]
        text = ("stage", "task", "attention", "starts from", "gate", "data")
        out.print(table("what is trained, and from what", rows, text, {"seeds": 1, "warmup": 2}))
        rows, total, threads, device = [], 0.0, 1, ""
        for stage in stages:
            cores = max(int(plan.request_for(stage)[0]), 1)
            cost, measured_on = _cost(stage, data[stage.name], cores)
            seconds = cost.wall_seconds * (stage.search.num_trials if stage.search else 1)
            rows.append(_cost_row(stage, cost, seconds, measured_on))
            total, threads = total + seconds, max(threads, cores)
            device = device or cost.probes[0].device
        where = f"{device}, {threads} thread{'s' * (threads > 1)}"
        if device == "cuda":
            where = torch.cuda.get_device_name()
        out.print(
            table(
                f"what it costs, measured on this device ({where})",
                rows,
                ("stage", "measured on"),
                {"dev pass": 1, "GFLOPs a step": 2, "measured on": 3},
                end={"stage": "all", "stage takes": duration(total)},
            )
        )
        if device == "cpu":
            out.print(
                "memory: weights, AdamW and the tensors that one micro batch saves for the "
                "backward pass, in float32; the process itself needs about 400 MiB more.",
                highlight=False,
            )
        for task, stage in {s.task: s for s in stages if data[s.name] is None}.items():
            images, rate = _images(stage), _images_per_second(task)
            out.print(
                f"data: {task} will be generated beside the training before it: {images:,} "
                f"images, {duration(images / rate)} of one core ({rate:,.0f} images/s).",
                highlight=False,
            )
        out.print("All checks passed. Nothing was started (--dry-run).")


def run_curriculum(curriculum: str | Path | Mapping[str, Any], **options: Any) -> Outcome:
    """Run or continue a curriculum; see Session and its `run`."""
    return Session(curriculum, **options).run()


def _open(folder: Path) -> CurriculumLog:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return CurriculumLog(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); give another --storage."
        ) from None


def _move_aside(folder: Path) -> None:
    """Keep an old run beside the new one; a run that is in use is refused."""
    if not folder.exists():
        return
    Journal(folder / layout.JOURNAL_FILE).close()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target = folder.with_name(f"{folder.name}.until-{stamp}")
    folder.rename(target)
    fsync_path(target.parent)
    logger.info("the old run is now %s", target)


# -- what a dry run shows -----------------------------------------------------------------------

_DEV_SHARE = 0.1


def _images(stage: StageConfig) -> int:
    return stage.generate.num_images or NUM_IMAGES


def _chain_row(
    stage: StageConfig, store: Store | None, report: TransferReport | None
) -> dict[str, str]:
    train, source = stage.config.train, "nothing"
    micro = train.micro_batch_size or train.batch_size
    if report is not None:
        parts = (
            f"{len(report.moved)} equal",
            report.positions,
            f"{len(report.fresh)} afresh" if report.fresh else "",
            f"{len(report.dropped)} left out" if report.dropped else "",
        )
        source = f"{stage.parent or stage.init_path} ({', '.join(filter(None, parts))})"
    return {
        "stage": stage.name,
        "task": stage.task if stage.task != stage.name else "same",
        "attention": stage.config.attention.label,
        "batch": str(train.batch_size) + (f" by {micro}" if micro != train.batch_size else ""),
        "steps": f"{train.num_steps:,}",
        "warmup": str(stage.config.optim.warmup_steps),
        "seeds": f"{train.seed}/{stage.config.data.seed}",
        "starts from": source,
        "gate": stage.gate.name + (f", search {stage.search.space}" if stage.search else ""),
        "data": f"generate {_images(stage):,}" if store is None else "present",
    }


def _cost(stage: StageConfig, store: Store | None, threads: int) -> tuple[Cost, str]:
    """What one of its runs costs, and on which data that was measured."""
    dev = round(_DEV_SHARE * _images(stage))
    if store is not None:
        dev = int(store.manifest.splits["dev"])
    return stage_cost(checks.resolve(stage.config, store), store, dev, threads=threads)


def _cost_row(stage: StageConfig, cost: Cost, seconds: float, measured_on: str) -> dict[str, str]:
    model = cost.models[0]
    tokens = f"{model.tokens / stage.config.train.batch_size:,.0f}"
    return {
        "stage": stage.name,
        "parameters": f"{model.parameters:,}",
        "real tokens": f"{tokens} of {stage.config.task_info.max_length:,}",
        "GFLOPs a step": f"{model.flops / 1e9:,.1f}",
        "memory": f"{cost.memory_bytes / 2**20:,.0f} MiB",
        "step": f"{cost.step_seconds:.3g} s",
        "dev pass": duration(cost.eval_seconds),
        "stage takes": duration(seconds),
        "measured on": measured_on,
    }


def _images_per_second(task: str, images: int = 12) -> float:
    from dmx.data.pathfinder import Generator

    generator = Generator(task, 123)
    generator.image(0)  # compiles what has to be compiled
    started = time.perf_counter()
    for index in range(1, images + 1):
        generator.image(index)
    return images / (time.perf_counter() - started)
