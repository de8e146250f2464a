"""Tar and zip archives as a source: streamed, never unpacked, every member's path checked."""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import posixpath
import tarfile
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from dmx.data.progress import progress
from dmx.data.source import Source
from dmx.errors import DataError

log = logging.getLogger(__name__)
_DAMAGE = (
    *(tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError),
    zipfile.BadZipFile,
)
_MAC_FOLDER = "__MACOSX/"
_MAX_MEMBERS = 10_000_000
_TAR_BLOCK_BYTES = 1 << 14


class ArchiveSource(Source):
    """An archive. The first question lists it once from end to end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._files: dict[str, dict[str, int]] | None = None

    @abstractmethod
    def entries(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every file in it, each name checked by `safe_name`.

        Raises:
            DataError: it is damaged.
        """

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

    def locate(self, tails: Sequence[str], probe: str) -> str | None:
        """Of several folders that fit a tail the deepest; see Source.locate."""
        for tail in tails:
            # lra_release.gz has two copies; everybody uses the inner, deeper one.
            fitting = [f for f in self.index if not tail or f == tail or f.endswith(f"/{tail}")]
            for root in sorted(fitting, key=lambda folder: (-folder.count("/"), folder)):
                if self.has(posixpath.join(root, probe)):
                    return root
        return None

    def size(self, name: str) -> int:
        """Bytes of the file `name`; see Source.size."""
        folder, base = posixpath.split(name)
        try:
            return self.index[folder][base]
        except KeyError:
            raise DataError(
                f"{self.describe(name)} is missing; the archive is incomplete."
            ) from None

    def wanted(self, names: Iterable[str]) -> set[str]:
        """The names, once it is known that the archive has them all."""
        found = set(names)
        for name in found:
            self.size(name)
        return found

    def _list(self) -> dict[str, dict[str, int]]:
        index: dict[str, dict[str, int]] = {"": {}}
        count = 0
        with progress(f"listing {self.path.name}", 0, "files") as step:
            for name, size in self.entries():
                step(1)
                count += 1
                if count > _MAX_MEMBERS:
                    raise DataError(f"{self.path} has more than {_MAX_MEMBERS:,} files.")
                if name.startswith((".", _MAC_FOLDER)) or "/." in name:
                    continue  # hidden, or a Mac's own notes on files
                folder, base = posixpath.split(name)
                parent = folder
                while parent and parent not in index:
                    index[parent] = {}
                    parent = posixpath.dirname(parent)
                index[folder][base] = size
        if not count:
            raise DataError(f"{self.path} holds no files.")
        return index

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


class ZipSource(ArchiveSource):
    """A zip archive."""

    def entries(self) -> Iterator[tuple[str, int]]:
        """See ArchiveSource.entries."""
        with self.explained(), zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                name = safe_name(info.filename, self.path)
                if not info.is_dir():
                    yield name, info.file_size

    def open(self, names: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
        """(name, stream) of the files in the archive's own order; see Source.open."""
        wanted = self.wanted(names)
        with self.explained(), zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                name = safe_name(info.filename, self.path)
                if name in wanted and not info.is_dir():
                    try:
                        stream = archive.open(info)
                    except (RuntimeError, NotImplementedError) as error:  # a password, a method
                        raise DataError(
                            f"{self.describe(name)} cannot be read ({error}); unpack the archive "
                            "and give the folder."
                        ) from error
                    with stream:
                        yield name, io.BufferedReader(_Guarded(stream, self), 1 << 16)


class TarSource(ArchiveSource):
    """A tar archive, streamed."""

    def entries(self) -> Iterator[tuple[str, int]]:
        """See ArchiveSource.entries."""
        with self._members() as members:
            for name, member, _ in members:
                yield name, member.size

    def open(self, names: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
        """(name, stream) of the files in the archive's own order; see Source.open."""
        wanted = self.wanted(names)
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

    def __init__(self, stream: IO[bytes], source: ArchiveSource) -> None:
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
