"""What can be asked of a curriculum without running it: `--dry-run` and `--status`."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmx import records as keys
from dmx.cluster.size import local_means
from dmx.curriculum import dryrun, edits, precheck
from dmx.curriculum.history import fold
from dmx.curriculum.stages import CurriculumConfig
from dmx.curriculum.view import since, stages_table
from dmx.errors import EXIT_OK, StageError
from dmx.log import console
from dmx.storage.journal import read_journal
from dmx.storage.places import SHARED, Places


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
    places: Places = SHARED


def dry_run(curriculum: CurriculumConfig, options: Options) -> int:
    """Check and measure; the exit code."""
    precheck.check_device(curriculum, local=options.address is None)
    data = {s.name: precheck.find_data(s, options.data_root) for s in curriculum.stages}
    transfers = precheck.check_transfers(curriculum, data)
    history = fold(read_journal(options.folder / keys.JOURNAL_FILE)[0])
    if history.stages and options.from_stage is None:
        edits.check_unchanged(curriculum, history)
    local = options.address is None
    means = local_means(curriculum, options.cpus, options.gpus, options.workers, check=local)
    threads = {s.name: max(int(means.of(s)[0]), 1) for s in curriculum.stages}
    dryrun.show(curriculum, data, transfers, data_root=options.data_root, threads=threads)
    return EXIT_OK


def show_status(curriculum: CurriculumConfig, options: Options) -> int:
    """Print where the run stands; reads the journal only, so it disturbs nobody."""
    events, _ = read_journal(options.folder / keys.JOURNAL_FILE)
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
