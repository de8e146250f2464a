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
from dmx.curriculum.views import TENSORBOARD_DIR, TensorBoardView, log_report, write_lineage
from dmx.data.store import Store
from dmx.errors import ConfigError
from dmx.format import duration
from dmx.process import files_decide, terminate_like_interrupt
from dmx.registry import code_version
from dmx.runs import layout
from dmx.runs.curriculum import Curriculum
from dmx.runs.folder_sync import FolderSync
from dmx.schema import check_number, is_url
from dmx.storage.files import fsync_path, write_atomic
from dmx.storage.journal import Journal
from dmx.storage.remote import StorageLayout
from dmx.study.folder import append_settings, find_places, settings_event, stage_data_root
from dmx.tasks import NUM_IMAGES
from dmx.terminal import Column, FittingTable
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
class Session:
    """What a caller asks of a curriculum; the options of `dmx.curriculum`, by their names.

    Attributes:
        curriculum: a shipped name, a YAML path, or what such a file holds.
        attention, overrides: see load_curriculum.
        name: the run's folder below the storage; None is the curriculum's own name.
        until: the last stage of this session. from_stage: train it and its descendants again.
        resume: continue a run. fresh: move an existing run aside.
    """

    curriculum: str | Path | Mapping[str, Any]
    _: KW_ONLY
    attention: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    storage: str = "runs"
    scratch: str | None = None
    data_root: str | None = None
    node_data: str | None = None
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
        return find_places(
            storage=self.storage,
            name=self.name,
            default=self.config.name,
            scratch=self.scratch,
            data_root=self.data_root,
            node_data=self.node_data,
        )

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
        """See that the options make sense; nothing is created.

        Raises:
            ConfigError: they do not, or the curriculum does not.
        """
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
            planner.check_plan(self.config, plan, resources, local=self.address is None)
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
            if self.fresh and not _unfinished(Curriculum.read(self.folder), "fresh", True):
                _move_aside(self.folder)
            files_decide()
            log = stack.enter_context(contextlib.closing(_open(self.folder)))
            selected = [s.name for s in self.config.stages]
            if self.until is not None:
                selected = list(self.config.until(self.until))
            self._begin(log, selected, recorded or {})
            write_lineage(self.config, log, code_version())
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
        if not log.empty:
            begun = duration(time.time() - log.created)
            logger.info("continuing %s, begun %s ago", self.folder, begun)
        again: tuple[str, ...] = ()
        if self.from_stage is not None:
            if _unfinished(log, "from_stage", self.from_stage):
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
        code = code_version()

        def keep_lineage(record: Curriculum, event: Mapping[str, Any]) -> None:
            if event["event"] in ("started", "decided", "tested"):
                write_lineage(self.config, record, code)

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
                        code=code,
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

    # -- a dry run --------------------------------------------------------------------------

    def dry_run(self) -> None:
        """Check all that a session would, and print what every stage takes over, needs and costs.

        Raises:
            DmxError: what a session would be refused for.
        """
        self.check()
        resources = local_resources()
        plan = self._plan(resources, check=self.address is None)
        data, transfers = self._check_data()
        if self.from_stage is None:
            checks.check_unchanged(self.config, Curriculum.read(self.folder).stages)
        stages = self.config.stages
        threads = {s.name: max(int(plan.request_for(s)[0]), 1) for s in stages}
        terminal.verbatim(
            f"curriculum {self.config.name}: {len(stages)} stages; data in {self._root}"
        )
        out = terminal.console()
        out.print(_chain(self.config, data, transfers))
        costs = {}
        for stage in stages:
            store = data[stage.name]
            dev = round(_DEV_SHARE * _images(stage))
            if store is not None:
                dev = int(store.manifest.splits["dev"])
            config = checks.resolve(stage.config, store)
            costs[stage.name] = stage_cost(config, store, dev, threads=threads[stage.name])
        out.print(_costs(self.config, costs, max(threads.values())))
        for line in _remarks(self.config, data, costs):
            out.print(line, highlight=False)
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


def _unfinished(record: Curriculum, option: str, value: object) -> bool:
    """Whether a session was begun with the option, and none has come to its end since.

    Then the same command must continue it: starting over once more would lose work.
    """
    return any(session.get(option) == value for session in record.sessions)


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


# -- the tables of a dry run --------------------------------------------------------------------

_DEV_SHARE = 0.1
_SPARE = {
    **{"seeds": 1, "dev pass": 1, "warmup": 2, "GFLOPs a step": 2},
    **{"measured on": 3},
}
"""Columns that a narrow terminal does without, the highest first."""


def _images(stage: StageConfig) -> int:
    return stage.generate.num_images or NUM_IMAGES


def _columns(names: str, *, right: bool = False, fold: str = "") -> list[Column]:
    return [
        Column(name, right=right, fold=name in fold.split("|"), spare=_SPARE.get(name, 0))
        for name in names.split("|")
    ]


def _chain(
    curriculum: CurriculumConfig,
    data: Mapping[str, Store | None],
    transfers: Mapping[str, TransferReport],
) -> FittingTable:
    names = "stage|task|attention|batch|steps|warmup|seeds|starts from|gate|data"
    columns = _columns(names, fold="stage|task|starts from|gate|data")
    table = FittingTable("what is trained, and from what", columns)
    for stage in curriculum.stages:
        config = stage.config
        batch, micro = config.train.batch_size, config.train.micro_batch_size
        table.add_row(
            stage.name,
            stage.task if stage.task != stage.name else "same",
            config.attention.label,
            f"{batch} by {micro}" if micro not in (None, batch) else str(batch),
            f"{config.train.num_steps:,}",
            str(config.optim.warmup_steps),
            f"{config.train.seed}/{config.data.seed}",
            _source(stage, transfers.get(stage.name)),
            stage.gate.name + (f", search {stage.search.space}" if stage.search else ""),
            "present" if data[stage.name] is not None else f"generate {_images(stage):,}",
        )
    return table


def _source(stage: StageConfig, report: TransferReport | None) -> str:
    if report is None:
        return "nothing"
    parts = [f"{len(report.moved)} equal"]
    parts += [report.positions] if report.positions else []
    parts += [f"{len(report.fresh)} afresh"] if report.fresh else []
    parts += [f"{len(report.dropped)} left out"] if report.dropped else []
    return f"{stage.parent or stage.init_path} ({', '.join(parts)})"


def _costs(
    curriculum: CurriculumConfig, costs: Mapping[str, tuple[Cost, str]], most_threads: int
) -> FittingTable:
    device = _device(costs)
    where = f"{device}, {most_threads} thread{'s' * (most_threads > 1)}"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    names = "parameters|real tokens|GFLOPs a step|memory|step|dev pass|stage takes"
    table = FittingTable(
        f"what it costs, measured on this device ({where})",
        (
            *_columns("stage", fold="stage"),
            *_columns(names, right=True),
            *_columns("measured on", fold="measured on"),
        ),
    )
    total = 0.0
    for stage in curriculum.stages:
        cost, measured_on = costs[stage.name]
        seconds = cost.wall_seconds * (stage.search.num_trials if stage.search else 1)
        total += seconds
        model, train = cost.models[0], stage.config.train
        table.add_row(
            stage.name,
            f"{model.parameters:,}",
            f"{model.tokens / train.batch_size:,.0f} of {stage.config.task_info.max_length:,}",
            f"{model.flops / 1e9:,.1f}",
            f"{cost.memory_bytes / 2**20:,.0f} MiB",
            f"{cost.step_seconds:.3g} s",
            duration(cost.eval_seconds),
            duration(seconds),
            measured_on,
        )
    table.add_section()
    table.add_row("all", *[""] * 6, duration(total), "")
    return table


def _device(costs: Mapping[str, tuple[Cost, str]]) -> str:
    return next(iter(costs.values()))[0].probes[0].device


def _remarks(
    curriculum: CurriculumConfig,
    data: Mapping[str, Store | None],
    costs: Mapping[str, tuple[Cost, str]],
) -> list[str]:
    lines = []
    if _device(costs) == "cpu":
        lines.append(
            "memory: weights, AdamW and the tensors that one micro batch saves for the backward "
            "pass, in float32; the process itself needs about 400 MiB more."
        )
    missing = {s.task: s for s in curriculum.stages if data[s.name] is None}
    for task, stage in missing.items():
        images, rate = _images(stage), _images_per_second(task)
        lines.append(
            f"data: {task} will be generated beside the training before it: {images:,} images, "
            f"{duration(images / rate)} of one core ({rate:,.0f} images/s)."
        )
    return lines


def _images_per_second(task: str, images: int = 12) -> float:
    from dmx.data.pathfinder import Generator

    generator = Generator(task, 123)
    generator.image(0)  # compiles what has to be compiled
    started = time.perf_counter()
    for index in range(1, images + 1):
        generator.image(index)
    return images / (time.perf_counter() - started)
