"""What every hostile input is held to: one sentence or success, in time, no write elsewhere."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from dmx.errors import DmxError

TOTAL = int(os.environ.get("DMX_FUZZ", "1500"))
"""Inputs over all targets; `DMX_FUZZ=10000 pytest tests/fuzz` is the long run."""
LIMIT_SECONDS = 20.0
"""Of one input, on any machine; they take milliseconds."""


def share(part: float) -> settings:
    """Hypothesis settings for this part of all inputs. The short run is the same each time."""
    return settings(
        max_examples=max(int(TOTAL * part), 1),
        deadline=None,
        derandomize=TOTAL <= 1500,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate")
_OPEN_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class _Watch:
    """The files that this process writes to, by Python's audit events."""

    def __init__(self) -> None:
        self.on = False
        self.paths: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[0], str | bytes):
            # A folder is opened to make a file without a name: how a folder is tried.
            writes = isinstance(args[2], int) and args[2] & _OPEN_TO_WRITE
            if writes and not Path(os.fsdecode(args[0])).is_dir():
                self.paths.append(os.fsdecode(args[0]))
        elif event in _WRITES:
            self.paths += [os.fsdecode(a) for a in args[:2] if isinstance(a, str | bytes | Path)]


_watch = _Watch()


def _ring(*_: object) -> None:
    raise AssertionError(f"it took more than {LIMIT_SECONDS:.0f} s")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within the block only DmxErrors of one sentence may be raised, and only `folder` written."""
    before = signal.signal(signal.SIGALRM, _ring)
    began, (left, _) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    _watch.paths, _watch.on = [], True
    try:
        yield
    except DmxError as error:
        text = str(error)
        assert text and "\n" not in text and "Traceback" not in text, repr(text)
        assert text.rstrip().endswith((".", ")")), text
    finally:
        _watch.on = False
        signal.signal(signal.SIGALRM, before)
        if left:  # the test's own deadline
            left = max(left - (time.monotonic() - began), 0.001)
        signal.setitimer(signal.ITIMER_REAL, left)
    inside = os.path.realpath(folder) + os.sep
    outside = [p for p in _watch.paths if not os.path.realpath(p).startswith(inside)]
    assert not [p for p in outside if p != os.devnull], outside
