"""One session of a curriculum: check everything, take the run's lock, connect, run, report."""

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

from dmx.curriculum import checks, dryrun, planner
from dmx.curriculum.config import CurriculumConfig
from dmx.curriculum.history import History, fold
from dmx.curriculum.resources import local_means, means_of
from dmx.curriculum.views import LineageWriter, LogView, TensorBoardView, since, stages_table
from dmx.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PARTIAL,
    ConfigError,
    StageError,
)
from dmx.process import files_decide, terminate_like_interrupt
from dmx.registry import code_version
from dmx.runs import layout
from dmx.search.study_settings import settings_event
from dmx.storage.files import fsync_path, write_atomic
from dmx.storage.journal import Journal, read_journal
from dmx.storage.layout import SHARED_FILESYSTEM, FolderSync, StorageLayout
from dmx.study.folder import append_settings
from dmx.tensorboard import Column, announce_study
from dmx.terminal import console, verbatim

logger = logging.getLogger("dmx.curriculum")
CURRICULUM_FILE = "curriculum.yaml"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says.

    Attributes:
        folder: the run's. again: the command that continues it. given: its options, for the record.
        places: object storage and local copies. Others: see --help.
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
    again: str = ""
    given: Mapping[str, Any] = field(default_factory=dict)
    places: StorageLayout = SHARED_FILESYSTEM


def dry_run(curriculum: CurriculumConfig, options: Options) -> int:
    """Check and measure; the exit code."""
    checks.check_device(curriculum, local=options.address is None)
    data = {s.name: checks.find_data(s, options.data_root) for s in curriculum.stages}
    transfers = checks.check_transfers(curriculum, data)
    history = fold(read_journal(options.folder / layout.JOURNAL_FILE)[0])
    if history.stages and options.from_stage is None:
        checks.check_unchanged(curriculum, history)
    local = options.address is None
    means = local_means(curriculum, options.cpus, options.gpus, options.workers, check=local)
    threads = {s.name: max(int(means.of(s)[0]), 1) for s in curriculum.stages}
    dryrun.show(curriculum, data, transfers, data_root=options.data_root, threads=threads)
    return EXIT_OK


def show_status(curriculum: CurriculumConfig, options: Options) -> int:
    """Print where the run stands; reads the journal only, so it disturbs nobody."""
    events, _ = read_journal(options.folder / layout.JOURNAL_FILE)
    if not events:
        raise StageError(f"there is no run in {options.folder}; start it without --status.")
    history = fold(events)
    out = console()
    title = f"{options.folder.name}: begun {since(history.created)} ago, {_liveness(events)}"
    out.print(stages_table(curriculum, history, title))
    return EXIT_OK


def _liveness(events: list[dict[str, Any]]) -> str:
    """Whether a controller is at work, as far as this machine can tell."""
    session: dict[str, Any] = {}
    for event in events:
        if event["event"] == "session":
            session = event
        elif event["event"] in ("closed", "interrupted"):
            session = {}
    seen = f"last event {since(events[-1]['time'])} ago"
    if not session:
        return f"not running, {seen}"
    if session["host"] != socket.gethostname():
        return f"running on {session['host']}, {seen}"
    try:
        os.kill(session["pid"], 0)
    except ProcessLookupError:
        return f"stopped without a word (killed?), {seen}; the same command continues it"
    except PermissionError:
        pass
    return f"running (process {session['pid']}), {seen}"


def run_session(curriculum: CurriculumConfig, options: Options) -> int:
    """Run or continue the curriculum; the exit code."""
    checks.check_device(curriculum, local=options.address is None)
    if options.address is None:
        local_means(curriculum, options.cpus, options.gpus, options.workers)
        return _session(curriculum, options)
    from dmx.cluster import connection

    with connection.connect(options.address) as resources:  # refused before anything is written
        means_of(curriculum, resources, options.cpus, options.gpus, options.workers)
        return _session(curriculum, options)


def _session(curriculum: CurriculumConfig, options: Options) -> int:
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
        _prepare_journal(curriculum, options, journal, selected)
        history = fold(journal.events)
        if not planner.has_work(curriculum, history, selected):
            logger.info("nothing is left to do")
            return _finish(curriculum, options, history, {}, planner.all_passed(history, selected))
        for stage in curriculum.stages:
            if stage.name in transfers and history.stage(stage.name).status == "waiting":
                source = stage.parent or stage.init_path
                logger.info("%s starts from %s: %s", stage.name, source, transfers[stage.name])
        with sync:
            return _connected(curriculum, options, journal, selected)


def _open(folder: Path) -> Journal:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Journal(folder / layout.JOURNAL_FILE)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); give another --storage."
        ) from None


def _prepare_journal(
    curriculum: CurriculumConfig, options: Options, journal: Journal, selected: list[str]
) -> None:
    """Check the history, apply --from-stage, and write down that a session begins."""
    history = fold(journal.events)
    if history.stages:
        logger.info("continuing %s, begun %s ago", options.folder, since(history.created))
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
    write_atomic(options.folder / CURRICULUM_FILE, text)


def _connected(
    curriculum: CurriculumConfig, options: Options, journal: Journal, selected: list[str]
) -> int:
    from dmx.cluster import connection
    from dmx.curriculum.backend import RayBackend
    from dmx.curriculum.controller import ClusterLost, Controller

    code = code_version()
    lineage = LineageWriter(curriculum, options.folder, code)
    _announce(curriculum, options.folder)
    with terminate_like_interrupt() as check:
        try:
            with (
                connection.connect(options.address) as resources,
                contextlib.closing(
                    TensorBoardView(curriculum, options.folder, journal.events)
                ) as tensorboard,
                contextlib.closing(RayBackend(options.places)) as backend,
            ):
                lineage.write(fold(journal.events))
                controller = Controller(
                    curriculum,
                    options.folder,
                    journal,
                    backend,
                    means=means_of(
                        curriculum, resources, options.cpus, options.gpus, options.workers
                    ),
                    data_root=options.data_root,
                    selected=selected,
                    code=code,
                    observers=(LogView(), tensorboard, lineage),
                )
                passed = controller.run(check)
        except KeyboardInterrupt:
            return _interrupted(options, journal, "interrupted", EXIT_INTERRUPTED)
        except ClusterLost as error:
            return _interrupted(options, journal, f"the cluster was lost ({error})", EXIT_PARTIAL)
    if controller.lost:
        what = f"the workers of {', '.join(sorted(controller.lost))} died again and again"
        return _interrupted(options, journal, what, EXIT_PARTIAL)
    journal.append(event="closed", passed=passed, time=time.time())
    return _finish(curriculum, options, controller.history, controller.broken, passed)


def _announce(curriculum: CurriculumConfig, folder: Path) -> None:
    """The columns of TensorBoard's HParams: what tells the stages apart."""
    announce_study(
        folder,
        {
            "stage": Column(tuple(s.name for s in curriculum.stages)),
            "task": Column(tuple(sorted({s.task for s in curriculum.stages}))),
            "attention": Column(
                tuple(sorted({s.config.attention.name for s in curriculum.stages}))
            ),
        },
    )


def _interrupted(options: Options, journal: Journal, what: str, code: int) -> int:
    journal.append(event="interrupted", reason=what, time=time.time())
    logger.warning("%s; everything up to the last evaluation is kept. Continue with:", what)
    sys.stderr.write(options.again + "\n")
    return code


def _finish(
    curriculum: CurriculumConfig,
    options: Options,
    history: History,
    broken: Mapping[str, str],
    passed: bool,
) -> int:
    out = console()
    out.print(stages_table(curriculum, history, f"{options.folder.name}: {curriculum.name}"))
    verbatim(f"files: {options.folder}  (lineage.json, lineage.md, journal.jsonl, stages/)")
    verbatim(f"curves: tensorboard --logdir {options.folder}")
    if passed:
        return EXIT_OK
    for name, reason in broken.items():
        logger.error("stage %s could not run: %s", name, reason)
    for stage in curriculum.stages:
        state = history.stage(stage.name)
        if state.status == "failed" and state.current is not None and state.current.decision:
            logger.error(
                "stage %s was not promoted: %s. Edit its gate or on_fail and run the same command, "
                "or train it again with --from-stage %s.",
                stage.name,
                state.current.decision["reason"],
                stage.name,
            )
    return EXIT_FAILED


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
