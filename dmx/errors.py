"""The errors a user can cause: single sentences that say what, where, and the remedy."""

EXIT_OK = 0
EXIT_BAD_INPUT = 2
"""Exit code of a command that refused its input and changed nothing."""
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, SIGTERM or SIGHUP: work is kept, the last line says how to continue."""
EXIT_PARTIAL = 75
"""Exit code of a run that its time budget stopped and that can be continued (EX_TEMPFAIL)."""


class DmxError(Exception):
    """Base of every error that a user can cause or must act on.

    Shown on one line: what a file or an argument smuggled into it, a terminal does not obey.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ConfigError(DmxError):
    """A setting is unknown, of the wrong type, out of range, or impossible in combination."""


class DataError(DmxError):
    """Data are missing, damaged, or not what their name says."""


class CheckpointError(DmxError):
    """A checkpoint is missing, damaged, or does not fit the model it should start."""


class RunFailedError(DmxError):
    """A run that was started ended in failure: not the input's fault, so the exit code is 1."""


class StorageError(RunFailedError):
    """The storage stayed full, read-only or unreachable; what was kept can be continued."""


class TakenOverError(StorageError):
    """Another process continues the run, since this one was away for long; it must not write."""


class StageError(DmxError):
    """A curriculum stage cannot be launched, or its journal contradicts its configuration."""


class InterruptedRun(KeyboardInterrupt):
    """Ctrl-C or SIGTERM while a run was under way: what it did is kept and can be continued."""
