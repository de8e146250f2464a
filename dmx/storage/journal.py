"""A run's journal, and the exclusive right of one process to write a run's folder.

The journal is append-only JSON lines with a checksum, durable before they count. A crash can tear
only the last line; it is dropped at the next open. A damaged line before the last was edited or
rotted, and is an error: nothing may be decided from half a history.

A worker may outlive its driver, or be cut off by a network and come back, while another one was
already started in its place. Two of them must never write the same checkpoints. The kernel drops
the claim's lock when its holder dies, so a kill -9 leaves nothing to clean up. The lock alone is
not enough where hosts share a folder: a file server takes it from a host that it does not hear
from (NFSv4 after 90 s), some have none, and none of them tells the holder. So the file also says
which process claimed the folder last, and a holder looks before it replaces anything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import secrets
import socket
import time
import zlib
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, Self

from dmx.errors import StageError, StorageError, TakenOverError
from dmx.storage.files import fsync_path, persist

logger = logging.getLogger("dmx.storage")


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


def encode(event: Mapping[str, Any]) -> bytes:
    """One line: the event as JSON, with `crc`, the checksum of all that stands before it."""
    body = json.dumps(dict(event), ensure_ascii=False)[:-1]
    return f'{body}, "crc": "{_checksum(body)}"}}\n'.encode()


def decode(line: bytes) -> dict[str, Any] | None:
    """The event of a line, or None where the line is damaged."""
    try:
        text = line.decode()
        body, marker, _ = text.rpartition(', "crc": "')
        event = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not marker or not isinstance(event, dict) or event.pop("crc", None) != _checksum(body):
        return None
    return event


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of a journal, and the length in bytes of its sound part.

    Raises:
        StageError: a line before the last is damaged, or the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise StageError(f"{path} cannot be read: {error.strerror}.") from None
    events: list[dict[str, Any]] = []
    sound = 0
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        event = decode(line) if line.endswith(b"\n") else None
        if event is None:
            if number < len(lines):
                raise StageError(
                    f"{path} line {number} is damaged; restore the file from a backup, or start "
                    "the run under a new name."
                )
            break
        events.append(event)
        sound += len(line)
    return events, sound


class Journal:
    """A journal open for appending, locked against a second process.

    Args:
        path: of the file. storage_timeout: seconds that a write waits for a storage that fails.

    Raises:
        StageError: another process holds it, or it is damaged.
    """

    def __init__(self, path: Path, *, storage_timeout: float = 0.0) -> None:
        self.path = path
        self._storage_timeout = storage_timeout
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            claim = functools.partial(Claim, path.parent, 0.0, f".{path.name}.lock")
            self._claim = persist(claim, path, seconds=storage_timeout)
        except StageError:
            raise StageError(
                f"{path.parent} is in use by another dmx process; wait or stop it."
            ) from None
        try:
            self.events, sound = read_journal(path)
        except StageError:
            self._claim.release()
            raise
        fresh = not path.exists()
        # Unbuffered: a failed write is not tried a second time at close.
        self._file: FileIO = path.open("ab", buffering=0)
        self._file.truncate(sound)
        self._size = sound
        if fresh:
            fsync_path(path.parent)

    def check(self) -> None:
        """See that no other process has opened it since, whatever became of the lock.

        Raises:
            TakenOverError: one has; this one may have been cut off for a while.
        """
        with contextlib.suppress(OSError):  # a storage that is away is the writer's to wait for
            self._claim.check()

    def append(self, **event: Any) -> None:
        """Write one event; when this returns, it survives a power cut.

        Raises:
            StorageError: the disk is full or gone; the journal is as it was before.
            TakenOverError: another process writes it now; nothing was changed.
        """
        line = encode(event)
        try:
            persist(lambda: self._write(line), self.path, seconds=self._storage_timeout)
        except TakenOverError:
            raise
        except StorageError:
            with contextlib.suppress(OSError, ValueError):
                self._file.truncate(self._size)
            raise
        self._size += len(line)
        self.events.append(event)

    def _write(self, line: bytes) -> None:
        """Write a line; a second call begins by undoing what the first one left."""
        self.check()
        if self._file.closed or os.fstat(self._file.fileno()).st_size != self._size:
            self._reopen()
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._reopen()  # after an unmount the open file may stay dead for ever
            raise

    def _reopen(self) -> None:
        """Open the file anew, at the end of what is known; never make another one."""
        file = self.path.open("r+b", buffering=0)
        if os.fstat(file.fileno()).st_size < self._size:  # an empty mount point, say
            file.close()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        self._file.close()
        self._file = file
        self._file.truncate(self._size)
        self._file.seek(self._size)

    def close(self) -> None:
        self._file.close()
        self._claim.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# -- the claim -----------------------------------------------------------------------------------

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
        take_over: after TAKE_OVER_SECONDS do without the lock. For a caller that knows that the
            former holder was given up: that one stops before it next replaces anything (`check`).

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
            OSError: its storage went away, or something else is mounted in its place; a write
                would go elsewhere.
            TakenOverError: another process has claimed it since.
        """
        own, found = os.fstat(self._file.fileno()), self.path.stat()
        if (own.st_dev, own.st_ino) != (found.st_dev, found.st_ino):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        # Opened anew: that is when a network file system asks its server.
        content = self.path.read_text(encoding="utf-8", errors="replace")
        if self.token not in content:
            raise taken_over(self.path.parent, _parsed(content))

    def release(self) -> None:
        self._file.close()


def taken_over(what: Path | str, holder: Mapping[str, Any]) -> TakenOverError:
    """The error of a process that was replaced while it was away."""
    who = f"process {holder['pid']} on {holder.get('host')}" if "pid" in holder else "another"
    return TakenOverError(f"{what} was taken over by {who}; this process writes there no more.")


def read_claim(folder: Path, file: str = CLAIM_FILE) -> dict[str, Any]:
    """{"host", "pid", "time", "token"} of the last claim; {} without one."""
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
