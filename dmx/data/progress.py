"""Progress of long preparations: a rich bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dmx.format import duration
from dmx.terminal import console

log = logging.getLogger(__name__)
_LOG_EVERY_SECONDS = 15.0


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show progress within the block; call what it yields with the number of new `unit`s.

    Args:
        what: what is being made. total: units in all; 0 when unknown. done: units that an earlier
            run made already; they do not count for the speed.
    """
    if sys.stderr.isatty():
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console(stderr=True),
        )
        with bar:
            task = bar.add_task(what, total=total or None, completed=done)
            yield lambda count: bar.advance(task, count)
        return
    start = last = time.monotonic()
    made = 0

    def advance(count: int) -> None:
        nonlocal made, last
        made += count
        now = time.monotonic()
        if now - last < _LOG_EVERY_SECONDS:
            return
        last = now
        rate = made / (now - start)
        if total:
            left = duration((total - done - made) / rate)
            log.info("%s: %d of %d %s, %.3g/s, %s left", what, done + made, total, unit, rate, left)
        else:
            log.info("%s: %d %s, %.3g/s", what, made, unit, rate)

    yield advance
