"""The exclusive right of one process to write a run's folder.

A worker may outlive its driver, or be cut off by a network and come back, while another one was
already started in its place. Two of them must never write the same checkpoints. The kernel drops
the lock when its holder dies, so a kill -9 leaves nothing to clean up.

The lock alone is not enough where hosts share a folder: a file server takes it from a host that it
does not hear from (NFSv4 after 90 s), some have none, and none of them tells the holder. So the
file also says who claimed the folder last, and a holder looks before it replaces anything.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmx.errors import StageError, TakenOverError
from dmx.storage.patience import same_file

logger = logging.getLogger("dmx.claim")
CLAIM_FILE = "claim.json"
WAIT_SECONDS = 120.0
TAKE_OVER_SECONDS = 10.0
"""A killed process frees its lock at once; one that is cut off with its host, after minutes."""
_POLL_SECONDS = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class Claim:
    """A folder that is ours until `release`, or until this process dies.

    Args:
        folder: exists. wait_seconds: how long to wait for a former holder to die.
        file: in the folder; holds the claim.
        take_over: after TAKE_OVER_SECONDS do without the lock. For whoever knows that the former
            holder was given up: it stops before its next replacement of anything (see `check`).

    Raises:
        StageError: another process still holds it.
    """

    def __init__(
        self,
        folder: Path,
        wait_seconds: float = WAIT_SECONDS,
        file: str = CLAIM_FILE,
        *,
        take_over: bool = False,
    ) -> None:
        self.path = folder / file
        self.token = secrets.token_hex(8)
        self._file = self.path.open("a+", encoding="utf-8")
        deadline = time.monotonic() + (TAKE_OVER_SECONDS if take_over else wait_seconds)
        while not self._locked():
            if time.monotonic() > deadline:
                holder = read_claim(folder, file)
                if take_over:
                    who = f"process {holder.get('pid')} on {holder.get('host')}"
                    logger.warning("%s is taken over from %s, which was given up.", folder, who)
                    break
                self._file.close()
                raise StageError(
                    f"{folder} is still written by process {holder.get('pid')} on "
                    f"{holder.get('host')}; stop it."
                )
            time.sleep(_POLL_SECONDS)
        self._file.truncate(0)
        self.holder = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        self.holder["token"] = self.token
        self._file.write(json.dumps(self.holder) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # or a network file system keeps it to itself for a while

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
        """See that the folder is still the one that was claimed, and ours.

        Raises:
            OSError: its storage went away, or something else is mounted in its place; whoever
                writes now would write elsewhere.
            TakenOverError: another process has claimed it since.
        """
        if not same_file(self._file.fileno(), self.path):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        # Opened anew: that is when a network file system asks its server.
        content = self.path.read_text(encoding="utf-8", errors="replace")
        if self.token not in content:
            raise taken_over(self.path.parent, _parsed(content))

    def release(self) -> None:
        """Let the next process have the folder."""
        self._file.close()


def taken_over(what: Path | str, holder: Mapping[str, Any]) -> TakenOverError:
    """What a process hears that was replaced while it was away."""
    who = f"process {holder['pid']} on {holder.get('host')}" if "pid" in holder else "another"
    return TakenOverError(f"{what} was taken over by {who}; this process writes there no more.")


def read_claim(folder: Path, file: str = CLAIM_FILE) -> dict[str, Any]:
    """{"host", "pid", "time", "token"} of whoever claimed the folder last; or {}."""
    try:
        return _parsed((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _parsed(content: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
