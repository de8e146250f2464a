"""The exclusive right of one process to write a run's folder.

A worker may outlive its driver, or be cut off by a network and come back, while another one was
already started in its place. Two of them must never write the same checkpoints. The kernel drops
the lock when its holder dies, so a kill -9 leaves nothing to clean up.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from dmx.errors import StageError
from dmx.patience import same_file

logger = logging.getLogger("dmx.claim")
CLAIM_FILE = "claim.json"
WAIT_SECONDS = 120.0
_POLL_SECONDS = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class Claim:
    """A folder that is ours until `release`, or until this process dies.

    Args:
        folder: exists. wait_seconds: how long to wait for a former holder to die.

    Raises:
        StageError: another process still holds it.
    """

    def __init__(self, folder: Path, wait_seconds: float = WAIT_SECONDS) -> None:
        self.path = folder / CLAIM_FILE
        self._file = self.path.open("a+", encoding="utf-8")
        deadline = time.monotonic() + wait_seconds
        while not self._locked():
            if time.monotonic() > deadline:
                holder = read_claim(folder)
                self._file.close()
                raise StageError(
                    f"{folder} is still written by process {holder.get('pid')} on "
                    f"{holder.get('host')}; stop it."
                )
            time.sleep(_POLL_SECONDS)
        self._file.truncate(0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        self._file.write(json.dumps(holder) + "\n")
        self._file.flush()

    def _locked(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("no file locks under %s; do not run anything twice.", self.path.parent)
        return True

    def check(self) -> None:
        """See that the folder is still the one that was claimed.

        Raises:
            OSError: its storage went away, or something else is mounted in its place; whoever
                writes now would write elsewhere.
        """
        if not same_file(self._file.fileno(), self.path):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def release(self) -> None:
        """Let the next process have the folder."""
        self._file.close()


def read_claim(folder: Path) -> dict[str, Any]:
    """{"host", "pid", "time"} of the process that holds the folder, or held it last; or {}."""
    try:
        found = json.loads((folder / CLAIM_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
