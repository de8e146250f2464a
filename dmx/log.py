"""Logging: one handler for the whole process; rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextvars
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler

_CONTEXT: contextvars.ContextVar[str] = contextvars.ContextVar("dmx_log_context", default="")


class _ContextFilter(logging.Filter):
    """Puts the current trial or stage in front of each message."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Attach the context; never drops a record."""
        context = _CONTEXT.get()
        record.context = f"[{context}] " if context else ""
        return True


def console(*, stderr: bool = False) -> Console:
    """The terminal to draw tables and progress bars on; wide enough for a table in a log file."""
    piped = not (sys.stderr if stderr else sys.stdout).isatty()
    wanted = os.environ.get("COLUMNS", "")
    width = (int(wanted) if wanted.isdecimal() else 140) if piped else None
    return Console(stderr=stderr, width=width, soft_wrap=False)


def verbatim(text: str) -> None:
    """Print a line as it is: nothing in it is markup, and a path to be copied is not broken."""
    console().print(text, highlight=False, markup=False, soft_wrap=True)


_terminal: list[Console] = []


def terminal() -> Console:
    """The one console on standard error that log lines and live displays share."""
    if not _terminal:
        _terminal.append(console(stderr=True))
    return _terminal[0]


def setup(level: int = logging.INFO) -> None:
    """Install dmx's only log handler on the `dmx` logger. Calling it again replaces the handler."""
    logger = logging.getLogger("dmx")
    for old in list(logger.handlers):
        logger.removeHandler(old)
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=terminal(), show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(context)s%(message)s", datefmt="[%X]"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            logging.Formatter(
                "%(asctime)s %(levelname)s %(context)s%(message)s", "%Y-%m-%d %H:%M:%S"
            )
        )
    handler.addFilter(_ContextFilter())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


@contextmanager
def context(name: str) -> Iterator[None]:
    """Within the block, log records carry `[name]`: the trial or the stage they speak of."""
    token = _CONTEXT.set(name)
    try:
        yield
    finally:
        _CONTEXT.reset(token)
