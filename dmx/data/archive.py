"""Tar archives as a source: streamed, never unpacked, every member's path checked."""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from dmx.data.progress import progress
from dmx.data.source import Source
from dmx.errors import DataError

log = logging.getLogger(__name__)
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
_MAX_MEMBERS = 10_000_000
_TAR_BLOCK_BYTES = 1 << 14


class TarSource(Source):
    """A tar archive. The first question reads it once from end to end to list it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._files: dict[str, dict[str, int]] | None = None

    @property
    def index(self) -> dict[str, dict[str, int]]:
        """Folder -> the files directly in it and their bytes, for every folder of the archive."""
        if self._files is None:
            self._files = self._list()
        return self._files

    def has(self, name: str) -> bool:
        """Whether the archive has a file or folder `name`."""
        folder, base = posixpath.split(name)
        return name in self.index or base in self.index.get(folder, ())

    def files(self, folder: str) -> list[str]:
        """Names of the files directly in `folder`, sorted."""
        return sorted(self.index.get(folder, ()))

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in `folder`, sorted."""
        prefix = f"{folder}/" if folder else ""
        below = (f[len(prefix) :] for f in self.index if f.startswith(prefix) and f != folder)
        return sorted({name.split("/")[0] for name in below if name})

    def roots(self, tail: str) -> list[str]:
        """Folders whose path ends with `tail` (all folders for ""), the deepest first."""
        # lra_release.gz has two copies; everybody uses the inner, deeper one.
        fitting = [f for f in self.index if not tail or f == tail or f.endswith(f"/{tail}")]
        return sorted(fitting, key=lambda folder: (-folder.count("/"), folder))

    def size(self, name: str) -> int:
        """Bytes of the file `name`; see Source.size."""
        folder, base = posixpath.split(name)
        try:
            return self.index[folder][base]
        except KeyError:
            raise DataError(
                f"{self.describe(name)} is missing; the archive is incomplete."
            ) from None

    def open(self, names: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
        """(name, stream) of the files in the archive's own order; see Source.open."""
        wanted = set(names)
        for name in wanted:
            if not self.has(name):
                raise DataError(f"{self.describe(name)} is missing; the archive is incomplete.")
        with self._members() as members:
            for name, member, archive in members:
                if name in wanted:
                    wanted.remove(name)
                    stream = archive.extractfile(member)
                    assert stream is not None
                    buffer = min(max(member.size, 1 << 12), 1 << 18)
                    yield name, io.BufferedReader(_Guarded(stream, self), buffer)
                    if not wanted:
                        return

    def _list(self) -> dict[str, dict[str, int]]:
        index: dict[str, dict[str, int]] = {"": {}}
        count = 0
        with self._members() as members, progress(f"listing {self.path.name}", 0, "files") as step:
            for name, member, _ in members:
                folder, base = posixpath.split(name)
                parent = folder
                while parent and parent not in index:
                    index[parent] = {}
                    parent = posixpath.dirname(parent)
                index[folder][base] = member.size
                step(1)
                count += 1
                if count > _MAX_MEMBERS:
                    raise DataError(f"{self.path} has more than {_MAX_MEMBERS:,} files.")
        if not count:
            raise DataError(f"{self.path} holds no files.")
        return index

    @contextmanager
    def _members(self) -> Iterator[Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]]:
        # Decompressed by us, in small blocks: tarfile's own stream copies its whole buffer for
        # every header, which took most of the time.
        with (
            self.explained(),
            _plain(self.path) as stream,
            tarfile.open(fileobj=stream, mode="r|", bufsize=_TAR_BLOCK_BYTES) as archive,
        ):
            yield self._walk(archive)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Within the block, damage of the archive becomes a DataError that names it."""
        try:
            yield
        except tarfile.ReadError as error:
            raise DataError(
                f"{self.path} is truncated, damaged, or no tar archive ({error})."
            ) from error
        except _DAMAGE as error:
            raise DataError(f"{self.path} is truncated or damaged ({error}).") from error
        except OSError as error:
            if error.errno is None:  # how bz2 says that its data are wrong
                raise DataError(f"{self.path} is truncated or damaged ({error}).") from error
            raise DataError(f"Cannot read {self.path}: {error.strerror}.") from error

    def _walk(
        self, archive: tarfile.TarFile
    ) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
        while (member := archive.next()) is not None:
            # tarfile keeps every header otherwise: 2.4 million in lra_release.
            archive.members = []  # type: ignore[attr-defined]
            name = safe_name(member.name, self.path)
            if member.isfile():
                yield name, member, archive
            elif not member.isdir():
                log.warning("%s: %s is a link or a device; ignored", self.path, member.name)


def _plain(path: Path) -> IO[bytes]:
    """The archive's uncompressed stream, by the file's first bytes, whatever its name."""
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(path))
    if magic.startswith(b"BZh"):
        return cast(IO[bytes], bz2.open(path))
    if magic == b"\xfd7zXZ\0":
        return cast(IO[bytes], lzma.open(path))
    return path.open("rb")


class _Guarded(io.RawIOBase):
    """A member's stream whose reader, outside the archive's own loop, gets a DataError too."""

    def __init__(self, stream: IO[bytes], source: TarSource) -> None:
        self._stream = stream
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._source.explained():
            content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def safe_name(name: str, archive: Path | str) -> str:
    """A member's path, normalised and relative.

    Raises:
        DataError: it is absolute or leads outside (`..`).
    """
    clean = name.replace("\\", "/")
    parts = [part for part in clean.split("/") if part not in ("", ".")]
    if clean.startswith("/") or ".." in parts or (parts and parts[0].endswith(":")):
        raise DataError(f"{archive} contains the unsafe path {name!r}; it is refused as a whole.")
    return "/".join(parts)
