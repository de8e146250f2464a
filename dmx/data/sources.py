"""A source of raw data: a folder, a tar or a zip behind one interface, with every path checked.

Archives are streamed and never unpacked: lra_release has 2.4 million files.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import logging
import lzma
import os
import posixpath
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from dmx.data.progress import progress
from dmx.errors import DataError

log = logging.getLogger(__name__)
MAX_SMALL_BYTES = 256 << 20
"""Limit of `read_small`: no file that is read whole (an image, a CIFAR batch) is larger."""
_DEPTH = 2
_MAX_FOLDERS = 500
"""A folder is searched so many levels deep, in so many folders of each."""
_MAX_MEMBERS = 10_000_000
_TAR_BLOCK_BYTES = 1 << 14
_MAC_FOLDER = "__MACOSX/"
_HEAD_BYTES = 1024
_OTHER_FORMATS = {
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
}
"""First bytes of archives that Python 3.11 cannot read."""
_DAMAGE = (
    *(tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError),
    zipfile.BadZipFile,
)


class Source(ABC):
    """Files by relative path with `/`; "" is the top folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a file or folder `name` exists."""

    @abstractmethod
    def files(self, folder: str) -> list[str]:
        """Names of the files directly in `folder`, sorted; [] if there is no such folder. Hidden
        ones, whose names begin with a dot, belong to a file system and are left out.
        """

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in `folder`, sorted, without hidden ones."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of the file `name`.

        Raises:
            DataError: there is no such file.
        """

    @abstractmethod
    def open(self, names: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
        """(name, stream) of the files; in the given order for a folder, an archive's own order
        for an archive. A stream is valid until the next one is asked for.

        Raises:
            DataError: a file is missing, or the archive is damaged.
        """

    @abstractmethod
    def locate(self, tails: Sequence[str], probe: str) -> str | None:
        """The folder whose path ends with one of `tails`, an earlier one rather than a later, and
        that holds `probe`; None where there is none.

        Raises:
            DataError: there are several.
        """

    def read_small(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of files that are read whole.

        Raises:
            DataError: also when a file is larger than 256 MiB.
        """
        for name, stream in self.open(names):
            # Not read(limit): that would reserve the limit's memory for each of 50,000 reviews.
            if self.size(name) > MAX_SMALL_BYTES:
                limit = f"{MAX_SMALL_BYTES >> 20} MiB"
                raise DataError(f"{self.describe(name)} is larger than {limit}.")
            yield name, stream.read()

    def describe(self, name: str) -> str:
        """A file of the source, for messages."""
        return f"{self.path}/{name}" if name else str(self.path)


class FolderSource(Source):
    """A folder on disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._levels = [[""]]

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def files(self, folder: str) -> list[str]:
        return self._entries(folder, files=True)

    def folders(self, folder: str) -> list[str]:
        return self._entries(folder, files=False)

    def _entries(self, folder: str, *, files: bool) -> list[str]:
        path = self.path / folder
        if not path.is_dir():
            return []
        try:
            with os.scandir(path) as entries:  # far fewer stat calls than iterdir: 200,000 images
                found = [e.name for e in entries if (e.is_file() if files else e.is_dir())]
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror}.") from error
        return sorted(name for name in found if not name.startswith("."))

    def size(self, name: str) -> int:
        try:
            return (self.path / name).stat().st_size
        except OSError as error:
            raise DataError(
                f"{self.describe(name)} is missing; the source is incomplete."
            ) from error

    def open(self, names: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
        for name in names:
            path = self.path / name
            try:
                with path.open("rb") as stream:
                    yield name, stream
            except FileNotFoundError as error:
                raise DataError(f"{path} is missing; the source is incomplete.") from error
            except OSError as error:
                raise DataError(f"Cannot read {path}: {error.strerror}.") from error

    def locate(self, tails: Sequence[str], probe: str) -> str | None:
        """Looks in the folder itself, then one level deeper, then two; see Source.locate."""
        for depth in range(_DEPTH + 1):
            for tail in tails:
                places = [posixpath.join(f, tail).rstrip("/") for f in self._level(depth)]
                found = [p for p in places if self.has(posixpath.join(p, probe))]
                if len(found) > 1:
                    raise DataError(
                        f"{self.path} holds the data more than once, in {' and in '.join(found)}; "
                        "give one of these folders as --source."
                    )
                if found:
                    return found[0]
        return None

    def _level(self, depth: int) -> list[str]:
        """The folders `depth` levels below: a source may hold millions of files, so not all."""
        if depth == len(self._levels):
            below = []
            for parent in self._level(depth - 1):
                with suppress(DataError):  # a folder that cannot be read holds nothing for us
                    below += [posixpath.join(parent, name) for name in self.folders(parent)]
            self._levels.append(below[:_MAX_FOLDERS])
        return self._levels[depth]


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
        folder, base = posixpath.split(name)
        return name in self.index or base in self.index.get(folder, ())

    def files(self, folder: str) -> list[str]:
        return sorted(self.index.get(folder, ()))

    def folders(self, folder: str) -> list[str]:
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
        with self.explained(), zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                name = safe_name(info.filename, self.path)
                if not info.is_dir():
                    yield name, info.file_size

    def open(self, names: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
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
        with self._members() as members:
            for name, member, _ in members:
                yield name, member.size

    def open(self, names: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
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


def open_source(path: Path) -> Source:
    """The folder, tar archive (plain, gz, bz2 or xz) or zip archive at `path`.

    Raises:
        DataError: it does not exist, or is none of them; says what it is.
    """
    path = Path(path).expanduser().absolute()
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise DataError(f"Source {path} does not exist.")
    if not path.is_file():
        raise DataError(f"Source {path} is neither a folder nor an archive.")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    for magic, what in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise DataError(
                f"Source {path} is {what}, which dmx does not read; unpack it and give the folder."
            )
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return ZipSource(path)
    if head.lstrip(codecs.BOM_UTF8 + b" \r\n").startswith(b"<"):
        raise DataError(
            f"Source {path} is a web page, not an archive: the server sent a message instead of "
            "the file; download it again."
        )
    if _is_text(head) or head.startswith((b"\x80", b"\x89PNG", b"\x93NUMPY")):
        raise DataError(
            f"Source {path} is a single file and no archive; give the folder that holds it, in the "
            "layout that the data were published in."
        )
    return TarSource(path)


def _is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are a text's; those of a tar hold zeros."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # it may end in a letter
    except UnicodeDecodeError:
        return False
    return bool(text) and all(c.isprintable() or c.isspace() for c in text)


def without_bom(stream: IO[bytes], where: str) -> IO[bytes]:
    """The stream of a text, behind the byte order mark that some editors put before it.

    Raises:
        DataError: the mark is UTF-16's.
    """
    assert isinstance(stream, io.BufferedReader), "as every source opens its files"
    mark = stream.peek(3)[:3]
    if mark.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{where} is UTF-16; save it as UTF-8.")
    if mark == codecs.BOM_UTF8:
        stream.read(3)
    return stream
