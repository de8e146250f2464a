"""Object storage (s3://, gs://, any URL that pyarrow opens): single objects, and folders as one.

An object store replaces one object at once, but not a folder. So a folder is one zip archive,
`<folder>.zip`: a reader never meets half of one, and a push that was cut short leaves the former
one as it was. The archive's comment is a checksum of its contents, and its version.
"""

from __future__ import annotations

import hashlib
import io
import logging
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from dmx.errors import CheckpointError, ConfigError, StorageError
from dmx.storage.files import fsync_tree, write_atomic

logger = logging.getLogger("dmx.storage")
FOLDER_SUFFIX = ".zip"
RETRY_SECONDS = (1.0, 4.0, 15.0, 60.0)
"""Waits between attempts: a store that is away for a minute costs a minute, not the run."""
_BLOCK_BYTES = 1 << 24
_EPOCH = (1980, 1, 1, 0, 0, 0)

T = TypeVar("T")


def join(url: str, name: str) -> str:
    """The URL of `name` below `url`, whose options stay."""
    base, mark, query = url.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def _in_one_request(url: str) -> str:
    """The URL with pyarrow's option that a small object on S3 is one PUT, not three requests."""
    if not url.startswith("s3://") or "allow_delayed_open" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}allow_delayed_open=true"


class ObjectStorage:
    """The objects below one URL.

    Args:
        url: s3://bucket/prefix, gs://..., file:///...; options in its query as pyarrow has them
            (s3://bucket/runs?endpoint_override=HOST:PORT&scheme=http&region=...).

    Raises:
        ConfigError: pyarrow knows no such scheme, or the URL is malformed.
    """

    def __init__(self, url: str) -> None:
        import pyarrow
        from pyarrow import fs

        self.url = url
        self._fs = fs
        try:
            self._files, root = fs.FileSystem.from_uri(_in_one_request(url))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(f"{url} is no storage URL that pyarrow can open: {reason}.") from None
        self._root = root.rstrip("/")

    # -- single objects ---------------------------------------------------------------------

    def write(self, name: str, content: bytes) -> None:
        """Replace one object at once."""

        def once() -> None:
            path = f"{self._root}/{name}"
            if isinstance(self._files, self._fs.LocalFileSystem):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                write_atomic(Path(path), content)  # pyarrow writes into the old file
                return
            with self._files.open_output_stream(path) as stream:
                stream.write(content)

        self._patiently(f"write {name}", once)

    def read(self, name: str) -> bytes | None:
        """One object's content, or None where there is none."""

        def once() -> bytes | None:
            path = f"{self._root}/{name}"
            if self._files.get_file_info(path).type != self._fs.FileType.File:
                return None
            with self._files.open_input_stream(path) as stream:
                return bytes(stream.read())

        return self._patiently(f"read {name}", once)

    def download(self, name: str, path: Path) -> None:
        """Copy one object, of any size, to a new file."""

        def once() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            source = self._files.open_input_stream(f"{self._root}/{name}")
            with source as stream, path.open("wb") as file:
                while block := stream.read(_BLOCK_BYTES):
                    file.write(block)

        self._patiently(f"read {name}", once)

    def names(self, prefix: str = "") -> list[str]:
        """Names of all objects below a folder, sorted."""

        def once() -> list[str]:
            base = f"{self._root}/{prefix}".rstrip("/")
            selector = self._fs.FileSelector(base, recursive=True, allow_not_found=True)
            infos = self._files.get_file_info(selector)
            skip = len(self._root) + 1
            return sorted(i.path[skip:] for i in infos if i.type == self._fs.FileType.File)

        return self._patiently(f"list {prefix or 'the storage'}", once)

    # -- folders ----------------------------------------------------------------------------

    def push(self, folder: Path, name: str, before: Callable[[], None] = lambda: None) -> str:
        """Store a folder's files as `name`, in the place of what is stored; returns the version.

        Args:
            before: called right before the archive is written; may raise.
        """
        contents = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
        version = _version(contents)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:  # uncompressed: weights do not shrink
            for file, content in contents.items():
                archive.writestr(zipfile.ZipInfo(file, _EPOCH), content)
            archive.comment = version.encode()
        if self.version(name) != version:
            before()
            self.write(name + FOLDER_SUFFIX, buffer.getvalue())
        return version

    def version(self, name: str) -> str | None:
        """Of the stored folder `name`, from the end of its archive; None where there is none."""

        def once() -> str | None:
            path = f"{self._root}/{name}{FOLDER_SUFFIX}"
            if self._files.get_file_info(path).type != self._fs.FileType.File:
                return None
            with self._files.open_input_file(path) as file:
                try:
                    with zipfile.ZipFile(file) as archive:
                        return archive.comment.decode()
                except (zipfile.BadZipFile, ValueError):
                    return ""

        return self._patiently(f"read {name}{FOLDER_SUFFIX}", once)

    def pull(self, name: str, folder: Path, known: str | None = None) -> str | None:
        """Write the stored folder `name` into the new folder `folder`; None if there is none.

        Args:
            known: a version that is here already; where it is the stored one, nothing is written.

        Raises:
            CheckpointError: what is stored is not what was written.
        """
        if known is not None and self.version(name) == known:
            return known
        raw = self.read(name + FOLDER_SUFFIX)
        if raw is None:
            return None
        try:
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                contents = {file: archive.read(file) for file in archive.namelist()}
                version = archive.comment.decode()
            plain = all("/" not in file and not file.startswith(".") for file in contents)
            if not plain or version != _version(contents):
                raise ValueError
        except Exception:  # zipfile raises whatever a damaged archive leads it to
            raise CheckpointError(
                f"{self.url}: {name}{FOLDER_SUFFIX} is damaged; remove it, and the run starts it "
                "again."
            ) from None
        folder.mkdir(parents=True)
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        fsync_tree(folder)
        return version

    def _patiently(self, what: str, once: Callable[[], T]) -> T:
        for wait in (*RETRY_SECONDS, None):
            try:
                return once()
            except OSError as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                if wait is None:
                    raise StorageError(f"{self.url}: cannot {what}: {reason}.") from None
                logger.warning("%s: cannot %s (%s); again in %g s", self.url, what, reason, wait)
                time.sleep(wait)
        raise AssertionError


def _version(contents: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for file in sorted(contents):
        digest.update(f"{file} {hashlib.sha256(contents[file]).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
