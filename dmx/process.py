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
from collections.abc import Callable, Iterator, Mapping
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
    _handle(dict.fromkeys(_heeded(), _leave))


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


# -- signals ----------------------------------------------------------------------------------


def _heeded() -> list[signal.Signals]:
    """The signals that end this process."""
    return [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]


def _leave(number: int, frame: object) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted; nothing was started.\n")
    os._exit(EXIT_INTERRUPTED)  # an exception is lost in some modules' imports


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _handle(handlers: Mapping[signal.Signals, Any]) -> dict[signal.Signals, Any]:
    """Set handlers; those that were there, or {} in a thread whose business signals are not."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    # One that was not set from Python, None, cannot be set again.
    return {n: signal.signal(n, handler) for n, handler in handlers.items() if handler is not None}


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """Handlers that are set within the block, by foreign code too, are gone after it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        _handle(before)


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

    def terminate(number: int, frame: object) -> None:
        asked.set()
        act = signal.getsignal(signal.SIGINT)  # that of foreign code, if it has set one since
        # A shell's job in the background ignores Ctrl-C, but not this.
        (act if callable(act) else _interrupt)(signal.SIGINT, frame)  # type: ignore[arg-type]

    def interrupt(number: int, frame: object) -> None:
        asked.set()
        first(number, frame)

    with own_signals():
        first: Any = signal.getsignal(signal.SIGINT)
        others = (s for s in _heeded() if s is not signal.SIGINT)
        _handle(dict.fromkeys(others, terminate))
        if callable(first):
            _handle({signal.SIGINT: interrupt})
        yield check


@contextlib.contextmanager
def stop_between_steps() -> Iterator[Callable[[], bool]]:
    """Within the block the first signal to stop is only noted; one more acts as it did before.

    It yields what says whether one has come. Work that can be stopped without loss between two of
    its steps asks there.
    """
    asked = threading.Event()

    def note(number: int, frame: object) -> None:
        asked.set()
        logger.warning("stopping at the next step; once more stops at once")
        _handle(before)

    before = {number: signal.getsignal(number) for number in _heeded()}
    _handle(dict.fromkeys(before, note))
    try:
        yield asked.is_set
    finally:
        _handle(before)


# -- streams ----------------------------------------------------------------------------------


class Stream:
    """A standard stream whose reader may go away and whose disk may be full: writing goes on."""

    def __init__(self, stream: Any, number: int) -> None:
        self._stream, self._number = stream, number
        self.lost: OSError | None = None
        if hasattr(stream, "reconfigure"):  # what the terminal's encoding lacks is written as \\x..
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write, or find out that nobody will read it."""
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or find out that nobody will read it."""
        with self._losing():
            self._stream.flush()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = self.lost or error
            null = os.open(os.devnull, os.O_WRONLY)  # for what is buffered, and Python's last flush
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
    before = _handle(dict.fromkeys(_heeded(), _interrupt))
    try:
        yield held
    finally:
        held.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = out, err
        # Of a process that ends what the exit code says is decided.
        _handle(dict.fromkeys(before, signal.SIG_IGN) if _began else before)


def files_decide() -> None:
    """From here on what a command did is in files: a standard output that fails is not its end."""
    _files_decide.append(True)


def output_counts() -> bool:
    """Whether what the command was asked for is what it prints."""
    return not _files_decide


def command() -> list[str]:
    """The words by which this process was called: `python -m dmx.tune ...`."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is None:
        return list(sys.argv)
    return ["python", "-m", module.name.removesuffix(".__main__"), *sys.argv[1:]]


def num_cores() -> int:
    """CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1
