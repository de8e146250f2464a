"""The terminal: one log handler for the process, and tables that fit its width."""

from __future__ import annotations

import contextvars
import functools
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dmx.format import duration

_LOG_EVERY_SECONDS = 15.0
_CONTEXT: contextvars.ContextVar[str] = contextvars.ContextVar("dmx_log_context", default="")
_WIDEST = 10_000


def console(*, stderr: bool = False) -> Console:
    """The terminal to draw tables and progress bars on; wide enough for a table in a log file."""
    piped = not (sys.stderr if stderr else sys.stdout).isatty()
    wanted = os.environ.get("COLUMNS", "")
    width = (int(wanted) if wanted.isdecimal() else 140) if piped else None
    return Console(stderr=stderr, width=width, soft_wrap=False)


def verbatim(text: str) -> None:
    """Print a line as it is: nothing in it is markup, and a path to be copied is not broken."""
    console().print(text, highlight=False, markup=False, soft_wrap=True)


@functools.cache
def shared_console() -> Console:
    """The one console on standard error that log lines and live displays share."""
    return console(stderr=True)


def setup_logging(level: int = logging.INFO) -> None:
    """Install dmx's only log handler on the `dmx` logger. Calling it again replaces the handler."""
    logger = logging.getLogger("dmx")
    for old in list(logger.handlers):
        logger.removeHandler(old)
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=shared_console(), show_path=False)
        form = logging.Formatter("%(context)s%(message)s", "[%X]")
    else:
        handler = logging.StreamHandler(sys.stderr)
        line = "%(asctime)s %(levelname)s %(context)s%(message)s"
        form = logging.Formatter(line, "%Y-%m-%d %H:%M:%S")
    handler.setFormatter(form)
    handler.addFilter(_add_context)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def _add_context(record: logging.LogRecord) -> bool:
    context = _CONTEXT.get()
    record.context = f"[{context}] " if context else ""
    return True


@contextmanager
def log_context(name: str) -> Iterator[None]:
    """Within the block, log records carry `[name]`: the trial or the stage they speak of."""
    token = _CONTEXT.set(name)
    try:
        yield
    finally:
        _CONTEXT.reset(token)


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show progress within the block: a bar on a terminal, a log line now and then elsewhere.

    It yields what takes the number of new `unit`s.

    Args:
        what: what is being made. total: units in all; 0 when unknown. done: units that an earlier
            run made already; they do not count for the speed.
    """
    if sys.stderr.isatty():
        from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        text, bar, _, left = Progress.get_default_columns()
        columns = (text, bar, MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), left)
        with Progress(*columns, console=shared_console()) as shown:
            task = shown.add_task(what, total=total or None, completed=done)
            yield lambda count: shown.advance(task, count)
        return
    start = last = time.monotonic()
    made = 0

    def advance(count: int) -> None:
        nonlocal made, last
        made += count
        now = time.monotonic()
        if now - last >= _LOG_EVERY_SECONDS:
            last, rate = now, made / (now - start)
            of = f" of {total}" if total else ""
            left = f", {duration((total - done - made) / rate)} left" if total else ""
            text = f"{what}: {done + made}{of} {unit}, {rate:.3g}/s{left}"
            logging.getLogger("dmx").info("%s", text)

    yield advance


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: its head, which a narrow table breaks at spaces and underscores.
        right: whether it is justified right, as numbers are.
        spare: 0 stays; of the others the highest goes first where there is no room.
        fold: whether its cells may go over several lines; numbers and names of states may not.
        width: characters that one whose cells may be folded should keep.
    """

    title: str
    right: bool = False
    spare: int = 0
    fold: bool = False
    width: int = 24


SETTINGS = Column("settings", fold=True, width=44)
"""Where a trial's settings stand in one cell (see format.settings_text)."""


class FittingTable:
    """Rows that rich prints as the roomiest table that the terminal has space for.

    Texts are what they are, not markup: errors and paths hold brackets.

    Args:
        narrow: the same rows told otherwise, which takes this one's place where it does not fit
            with all its columns.
        see: where the columns are that had no room.
    """

    def __init__(
        self,
        title: str,
        columns: Sequence[Column],
        *,
        narrow: FittingTable | None = None,
        see: str = "",
    ) -> None:
        self._title, self._columns, self._narrow, self._see = title, columns, narrow, see
        self._rows: list[tuple[tuple[str, ...], str | None]] = []
        self._sections: set[int] = set()

    def add_row(self, *cells: str, style: str | None = None) -> None:
        """One cell a column."""
        assert len(cells) == len(self._columns), (cells, self._columns)
        self._rows.append((cells, style))

    def add_section(self) -> None:
        """A line below the last row."""
        self._sections.add(len(self._rows))

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """The first form that fits, or the last."""
        unbounded = options.update(width=_WIDEST)
        table = Table()
        for table, spare in self._forms():
            if console.measure(table, options=unbounded).maximum - spare <= options.max_width:
                break
        yield table

    def _forms(self) -> Iterator[tuple[Table, int]]:
        """Ever narrower tables, and how many characters narrower each still is when folded."""
        shown = list(range(len(self._columns)))
        yield self._table(shown, tight=False)
        yield self._table(shown, tight=True)
        if self._narrow is not None:
            yield from self._narrow._forms()
            return
        spare = [i for i in shown if self._columns[i].spare]
        for i in sorted(spare, key=lambda i: -self._columns[i].spare):
            shown.remove(i)
            yield self._table(shown, tight=True)

    def _table(self, shown: Sequence[int], *, tight: bool) -> tuple[Table, int]:
        table, spare = Table(title=escape(self._title), title_justify="left"), 0
        if tight:
            table.box, table.show_edge, table.pad_edge = box.SIMPLE_HEAD, False, False
            table.padding = (0, 1, 0, 0)
        for i in shown:
            column = self._columns[i]
            table.add_column(
                re.sub(r" |(?<=_)", "\n", column.title) if tight else column.title,
                justify="right" if column.right else "left",
                no_wrap=not column.fold,
                overflow="fold",
            )
            if column.fold:
                widest = max((cell_len(cells[i]) for cells, _ in self._rows), default=0)
                spare += max(widest - column.width, 0)
        for number, (cells, style) in enumerate(self._rows, 1):
            end = number in self._sections
            table.add_row(*(Text(cells[i]) for i in shown), style=style, end_section=end)
        if gone := [c.title for i, c in enumerate(self._columns) if i not in shown]:
            table.caption = f"no room for {', '.join(gone)}{self._see}"
            table.caption_justify = "left"
        return table, spare
