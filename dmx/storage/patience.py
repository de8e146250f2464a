"""Storage that fails for a while (full, read-only, gone): tried again before work is given up."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dmx.errors import StorageError

T = TypeVar("T")
logger = logging.getLogger("dmx.patience")

PATIENCE_SECONDS = 120.0
_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 10.0

STORAGE_ERRNOS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO),
        *(errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO),
    }
)
"""What a full, read-only, unmounted or unreachable storage answers."""


def is_storage_error(error: BaseException) -> bool:
    """Whether the storage, and not the code, is at fault."""
    return isinstance(error, OSError) and error.errno in STORAGE_ERRNOS


def persist(action: Callable[[], T], place: Path | str, *, seconds: float) -> T:
    """Do `action` on the storage; where it fails, again and again with growing pauses.

    Args:
        action: can be repeated from its beginning. place: what it writes or reads, for messages.
        seconds: how long to wait for the storage; 0 does not wait.

    Raises:
        StorageError: the storage still failed then.
    """
    began = time.monotonic()
    pause = _FIRST_WAIT_SECONDS
    warned = False
    while True:
        try:
            result = action()
        except OSError as error:
            if not is_storage_error(error):
                raise
            left = seconds - (time.monotonic() - began)
            reason = os.strerror(error.errno or errno.EIO)
            if left <= 0:
                waited = f" for {seconds:.0f} s" if seconds else ""
                raise StorageError(
                    f"{place} cannot be written{waited} ({reason}); make room or bring the storage "
                    "back, then continue."
                ) from error
            if not warned:
                logger.warning("%s: %s; waiting up to %.0f s for it.", place, reason, seconds)
                warned = True
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_WAIT_SECONDS)
        else:
            if warned:
                logger.info("%s can be used again.", place)
            return result


def same_file(descriptor: int, path: Path) -> bool:
    """Whether `path` still leads to the open file: not to another storage under the same name."""
    own, found = os.fstat(descriptor), path.stat()
    return (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino)
