"""A command's process: the signals that end it in order, and standard streams that may fail.

Ctrl-C, SIGTERM (a batch system) and SIGHUP (a closed terminal, a lost ssh) all end a command with
exit code 130 and nothing lost. One that was ignored when the command began (SIGHUP under nohup,
SIGINT in a shell's background) stays ignored. Nothing heavy is imported here: dmx/__init__.py calls
`begin` before torch and Ray, whose import takes seconds.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from dmx.errors import EXIT_INTERRUPTED

logger = logging.getLogger("dmx")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_began: list[bool] = []
_files_decide: list[bool] = []


def begin() -> None:
    """Before a command's imports: open what is closed of 0, 1 and 2, and leave at a signal."""
    _began.append(True)
    _open_streams()
    _handle(_leave)


def _open_streams() -> None:
    """The next file that is opened would be standard output, and hold what a library writes."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def heeded() -> tuple[signal.Signals, ...]:
    """The signals that end this process."""
    return tuple(s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN)


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A handler: all of them are Ctrl-C."""
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted; nothing was started.\n")
    os._exit(EXIT_INTERRUPTED)  # an exception is lost in some modules' imports


def _handle(handler: Any) -> None:
    for number in heeded():
        signal.signal(number, handler)


class Stream:
    """A standard stream whose reader may go away and whose disk may be full: writing goes on."""

    def __init__(self, stream: Any, number: int) -> None:
        self._stream, self._number = stream, number
        self.lost: OSError | None = None
        if hasattr(stream, "reconfigure"):  # what the terminal's encoding lacks is written as \\x..
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write, or find out that nobody will read it."""
        try:
            return int(self._stream.write(text) or 0)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or find out that nobody will read it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = self.lost or error
        null = os.open(os.devnull, os.O_WRONLY)  # for what is buffered, and for Python's last flush
        os.dup2(null, self._number)
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def broken(self) -> bool:
        """Whether a pipe's reader went away, as `| head` does."""
        return self.lost is not None and self.lost.errno == errno.EPIPE


@contextlib.contextmanager
def running() -> Iterator[Stream]:
    """Within the block signals are KeyboardInterrupt, and streams never raise; yields stdout."""
    _open_streams()
    out, err = sys.stdout, sys.stderr
    held = Stream(out, 1)
    _files_decide.clear()
    sys.stdout, sys.stderr = held, Stream(err, 2)
    try:
        before = {number: signal.getsignal(number) for number in heeded()}
        _handle(interrupt)
    except ValueError:  # not the main thread: signals are someone else's business
        before = {}
    try:
        yield held
    finally:
        held.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = out, err
        for number, handler in before.items():  # what the exit code says is decided
            signal.signal(number, signal.SIG_IGN if _began else handler or signal.SIG_DFL)


def files_decide() -> None:
    """From here on what a command did is in files: a standard output that fails is not its end."""
    _files_decide.append(True)


def output_counts() -> bool:
    """Whether what the command was asked for is what it prints."""
    return not _files_decide


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """Handlers that foreign code sets within the block are gone after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that was not set from Python cannot be set again
                signal.signal(number, handler)


def num_cores() -> int:
    """CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


@contextlib.contextmanager
def terminate_like_interrupt() -> Iterator[Callable[[], None]]:
    """Within the block SIGTERM (a batch system's preemption) and SIGHUP act like Ctrl-C.

    It yields a check that raises KeyboardInterrupt once either has come. A loop around foreign
    code calls it: an exception that a signal raises in the middle of that may be lost there.
    """
    asked = threading.Event()

    def check() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    def terminate(number: int, frame: FrameType | None) -> None:
        asked.set()
        act = signal.getsignal(signal.SIGINT)
        if not callable(act):  # a shell's job in the background ignores Ctrl-C, but not this
            raise KeyboardInterrupt
        act(signal.SIGINT, frame)

    try:
        before = {s: signal.getsignal(s) for s in SIGNALS}
        for number in (signal.SIGTERM, signal.SIGHUP):
            if before[number] is not signal.SIG_IGN:  # nohup
                signal.signal(number, terminate)
    except ValueError:  # not the main thread: signals are someone else's business
        yield check
        return
    act = before[signal.SIGINT]
    if callable(act):

        def interrupt(number: int, frame: FrameType | None) -> None:
            asked.set()
            act(number, frame)

        signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that was not set from Python cannot be set again
                signal.signal(number, handler)


@contextlib.contextmanager
def stop_between_steps() -> Iterator[Callable[[], bool]]:
    """Within the block the first signal to stop is only noted; one more acts as it did before.

    It yields what says whether one has come. Work that can be stopped without loss between two of
    its steps asks there.
    """
    asked = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        asked.set()
        logger.warning("stopping at the next step; once more stops at once")
        put_back()

    def put_back() -> None:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)

    for number in heeded():
        with contextlib.suppress(ValueError):  # not the main thread
            before[number] = signal.signal(number, note)
    try:
        yield asked.is_set
    finally:
        put_back()
