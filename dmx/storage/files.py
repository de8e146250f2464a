"""Durable files: atomic writes, whole folders, checksums, and storage that fails for a while."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dmx.errors import DataError, StorageError

T = TypeVar("T")
logger = logging.getLogger("dmx.storage")

MANIFEST_FILE = "manifest.json"
"""Of prepared data; written last, so that a folder which has one is whole."""

# -- whole files and folders --------------------------------------------------------------------


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems refuse to fsync a folder
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `path` so that even after a crash it holds its old content or all of the new."""
    data = content.encode() if isinstance(content, str) else content
    # Hosts and containers have process ids of their own: those of two writers may be equal.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; a crash leaves the old one whole, at worst as `.X.old`.

    A reader of such a folder calls `put_back` first.
    """
    old = _old(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    fsync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync_tree(folder: Path) -> None:
    """Flush all that lies below a folder, and the folder."""
    for path in (*folder.rglob("*"), folder):
        fsync_path(path)


def copy_folder(source: Path, folder: Path) -> None:
    """Put a copy of `source` in the place of `folder`, as `replace_folder` does."""
    new = folder.parent / f".{folder.name}.new"
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(source, new)
    fsync_tree(new)
    replace_folder(new, folder)


def put_back(folder: Path) -> None:
    """Finish what a crash between the two renames of `replace_folder` left undone."""
    if not folder.exists() and _old(folder).exists():
        _old(folder).rename(folder)


def is_there(folder: Path) -> bool:
    """Whether the folder exists, or waits to be put back."""
    return folder.exists() or _old(folder).exists()


def _old(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


@contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; a second process waits until the first is done or dead.

    The kernel drops the lock when its holder dies, so a kill -9 leaves nothing to clean up. On a
    file system without locks a warning is logged; the atomic rename still keeps results whole.
    """
    with explained(path, "create"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is preparing %s; waiting for it", what)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("no file locks under %s (%s); do not prepare twice", path.parent, error)
        yield
    finally:
        os.close(descriptor)


# -- checksums ----------------------------------------------------------------------------------

SMALL_BYTES = 4 << 20
"""Files up to this size are checksummed whole by `quick_checksum`: a few milliseconds."""
_BLOCK_BYTES = 4096
_NUM_BLOCKS = 64


def sha256_file(path: Path) -> str:
    """SHA-256 of the whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def quick_checksum(path: Path) -> str:
    """SHA-256 over a sample of the file: all of a small one, else 64 evenly spaced 4 KiB blocks.

    It costs milliseconds whatever the size, and sees truncation, zero-filled tails after a crash
    and overwritten stretches; a change of single bytes between blocks needs `sha256_file`.
    """
    size = path.stat().st_size
    if size <= SMALL_BYTES:
        return sha256_file(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for block in range(_NUM_BLOCKS):
            file.seek((size - _BLOCK_BYTES) * block // (_NUM_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


# -- storage that fails -------------------------------------------------------------------------

STORAGE_TIMEOUT = 120.0
"""Seconds that a write waits for a storage that fails, unless the user says otherwise."""
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


_REMEDIES = {
    errno.ENOSPC: "the disk is full; free space or choose another --data-root",
    errno.EDQUOT: "the disk quota is used up; free space or choose another --data-root",
    errno.EROFS: "the file system is read-only; choose another --data-root",
    errno.EACCES: "permission denied; choose another --data-root or fix its permissions",
    errno.EPERM: "operation not permitted; choose another --data-root or fix its permissions",
    errno.ENOTDIR: "part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "it is a folder where a file is needed",
}


@contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Within the block an OSError becomes a DataError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        named = os.fsdecode(error.filename) if error.filename else path
        remedy = _REMEDIES.get(error.errno or 0, error.strerror or str(error))
        raise DataError(f"Cannot {doing} {named}: {remedy}.") from error
