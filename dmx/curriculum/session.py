"""One session of a curriculum: check everything, take the run's lock, connect, run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dmx.cluster.capacity import local_resources
from dmx.curriculum import checks, planner
from dmx.curriculum.config import CurriculumConfig
from dmx.curriculum.resources import plan_resources
from dmx.curriculum.views import TENSORBOARD_DIR, LineageWriter, TensorBoardView, log_report
from dmx.errors import ConfigError
from dmx.format import duration
from dmx.process import files_decide, terminate_like_interrupt
from dmx.registry import code_version
from dmx.runs import layout
from dmx.runs.folder_sync import FolderSync
from dmx.runs.stages import History, fold
from dmx.search.study_settings import settings_event
from dmx.storage.files import fsync_path, write_atomic
from dmx.storage.journal import Journal, read_journal
from dmx.storage.remote import SHARED_FILESYSTEM, StorageLayout
from dmx.study.folder import append_settings

logger = logging.getLogger("dmx.curriculum")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a curriculum is run; nothing here changes what its stages learn.

    Attributes:
        folder: the run's. data_root: of prepared data.
        until: the last stage of this session. from_stage: train it and its descendants again.
        fresh: move an existing run aside.
        cpus, gpus, workers: of a run; None lets the cluster decide. address: of Ray.
        given: the options of the command, for the record.
        places: object storage and local copies.
    """

    folder: Path
    data_root: Path
    until: str | None = None
    from_stage: str | None = None
    fresh: bool = False
    cpus: float | None = None
    gpus: float | None = None
    workers: int | None = None
    address: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    places: StorageLayout = SHARED_FILESYSTEM

    @property
    def request(self) -> dict[str, Any]:
        """What plan_resources is told of a run."""
        return {"cpus": self.cpus, "gpus": self.gpus, "workers": self.workers}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a session ended.

    Attributes:
        passed: every selected stage was promoted.
        broken: why a stage could not run: its data, or the checkpoint it starts from.
    """

    history: History
    passed: bool
    broken: Mapping[str, str]


def run_curriculum(curriculum: CurriculumConfig, options: Options) -> Outcome:
    """Run or continue a curriculum until nothing is left that could be done.

    Raises:
        DmxError: something is wrong with the curriculum, its data or its record; nothing was begun.
        ClusterLost, KeyboardInterrupt: the session was cut off; the same call continues it.
    """
    checks.check_device(curriculum, local=options.address is None)
    if options.address is None:
        plan_resources(curriculum, local_resources(), **options.request)
        return _session(curriculum, options)
    from dmx.cluster import connection

    with connection.connect(options.address) as resources:  # refused before anything is written
        plan_resources(curriculum, resources, **options.request)
        return _session(curriculum, options)


def _session(curriculum: CurriculumConfig, options: Options) -> Outcome:
    sync = FolderSync(options.places)
    sync.restore(checkpoints=True)
    data = {s.name: checks.find_data(s, options.data_root) for s in curriculum.stages}
    transfers = checks.check_transfers(curriculum, data)
    selected = [s.name for s in curriculum.stages]
    if options.until is not None:
        selected = list(curriculum.until(options.until))
    if options.fresh and not _unfinished(options.folder, "fresh", True):
        _move_aside(options.folder)
    files_decide()
    with _open(options.folder) as journal:
        _begin(curriculum, options, journal, selected)
        history = fold(journal.events)
        lineage = LineageWriter(curriculum, options.folder, code_version())
        lineage.write(history)
        if not planner.has_work(curriculum, history, selected):
            logger.info("nothing is left to do")
            if not (options.folder / TENSORBOARD_DIR).is_dir():
                TensorBoardView(curriculum, options.folder, journal.events).close()
            passed = planner.all_passed(history, selected)
            return Outcome(history=history, passed=passed, broken={})
        for stage in curriculum.stages:
            if stage.name in transfers and history.stage(stage.name).status == "waiting":
                source = stage.parent or stage.init_path
                logger.info("%s starts from %s: %s", stage.name, source, transfers[stage.name])
        with sync:
            return _connected(curriculum, options, journal, selected, lineage)


def _open(folder: Path) -> Journal:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Journal(folder / layout.JOURNAL_FILE)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); give another --storage."
        ) from None


def _begin(
    curriculum: CurriculumConfig, options: Options, journal: Journal, selected: list[str]
) -> None:
    """Check the history, apply --from-stage, and write down that a session begins."""
    history = fold(journal.events)
    if history.stages:
        logger.info(
            "continuing %s, begun %s ago", options.folder, duration(time.time() - history.created)
        )
    again: tuple[str, ...] = ()
    if options.from_stage is not None:
        if _unfinished(options.folder, "from_stage", options.from_stage):
            logger.info("continuing what --from-stage %s began", options.from_stage)
        else:
            again = curriculum.descendants(options.from_stage)
    kept = dataclasses.replace(
        history, stages={n: s for n, s in history.stages.items() if n not in again}
    )
    checks.check_unchanged(curriculum, kept)
    checks.check_checkpoints(curriculum, kept, options.folder, selected)
    if not journal.events:
        journal.append(event="created", curriculum=curriculum.name, time=time.time())
    plain = {"name": curriculum.name, "stages": [s.plain() for s in curriculum.stages]}
    append_settings(journal, settings_event("curriculum", plain, options.given))
    journal.append(
        event="session",
        pid=os.getpid(),
        host=socket.gethostname(),
        argv=sys.argv[1:],
        fresh=options.fresh,
        from_stage=options.from_stage,
        stages=[s.brief() for s in curriculum.stages],
        last_stage=curriculum.last.name,
        time=time.time(),
    )
    if again:
        journal.append(event="reset", stages=list(again), time=time.time())
        logger.info("%s will be trained again; old attempts stay on disk", ", ".join(again))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    write_atomic(options.folder / layout.CURRICULUM_FILE, text)


def _connected(
    curriculum: CurriculumConfig,
    options: Options,
    journal: Journal,
    selected: list[str],
    lineage: LineageWriter,
) -> Outcome:
    from dmx.cluster import connection
    from dmx.curriculum.backend import RayBackend
    from dmx.curriculum.controller import ClusterLost, Controller

    with terminate_like_interrupt() as check:
        try:
            with (
                connection.connect(options.address) as resources,
                contextlib.closing(
                    TensorBoardView(curriculum, options.folder, journal.events)
                ) as tensorboard,
                contextlib.closing(RayBackend(options.places)) as backend,
            ):
                plan = plan_resources(curriculum, resources, **options.request)
                controller = Controller(
                    curriculum,
                    options.folder,
                    journal,
                    backend,
                    plan=plan,
                    data_root=options.data_root,
                    selected=selected,
                    code=lineage.code,
                    observers=(log_report, tensorboard.event, lineage.event),
                )
                passed = controller.run(check)
            if controller.lost:
                names = ", ".join(sorted(controller.lost))
                raise ClusterLost(f"the workers of {names} died again and again")
        except (KeyboardInterrupt, ClusterLost) as error:
            reason = str(error) or "interrupted"
            journal.append(event="interrupted", reason=reason, time=time.time())
            raise
    journal.append(event="closed", passed=passed, time=time.time())
    return Outcome(history=controller.history, passed=passed, broken=controller.broken)


def _unfinished(folder: Path, option: str, value: object) -> bool:
    """Whether the last session was begun with the option and never came to its end.

    Then the same command must continue it: starting over once more would lose work.
    """
    events, _ = read_journal(folder / layout.JOURNAL_FILE)
    for event in reversed(events):
        if event["event"] == "closed":
            return False
        if event["event"] == "session" and event.get(option) == value:
            return True
    return False


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
