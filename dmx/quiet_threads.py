"""TensorBoard's writing threads print no tracebacks of their own where a disk is full."""

from __future__ import annotations

import threading

_WRITER = "_AsyncWriterThread"


def keep_writers_quiet() -> None:
    """Leave it to the next write to say what failed: the thread keeps its error for that one.

    Any other thread's error, and any other error of a writer, is shown as ever.
    """
    before = threading.excepthook
    if getattr(before, "knows_writers", False):
        return

    def hook(caught: threading.ExceptHookArgs) -> None:
        writer = type(caught.thread).__name__ == _WRITER
        if not (writer and isinstance(caught.exc_value, OSError)):
            before(caught)

    hook.knows_writers = True  # type: ignore[attr-defined]
    threading.excepthook = hook
