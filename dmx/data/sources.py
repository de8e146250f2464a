"""A source of raw data: a folder, a tar or a zip behind one interface, with every path checked.

Archives are streamed and never unpacked: lra_release has 2.4 million files.
"""

from __future__ import annotations

import bz2
import codecs
import copy
import gzip
import logging
import lzma
import os
import posixpath
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

from dmx.errors import DataError
from dmx.terminal import progress

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
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_DAMAGE = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


class Source(ABC):
    """Files by relative path with `/`; "" is the top folder.

    Hidden ones, whose names begin with a dot, belong to a file system and are left out of lists.

    Attributes:
        path: its top folder, for messages; in an archive it is no path on the disk.
        given: the folder or archive that the user gave.
    """

    def __init__(self, path: Path) -> None:
        self.path = self.given = path

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a file or folder `name` exists."""

    @abstractmethod
    def files(self, folder: str) -> list[str]:
        """Names of the files directly in `folder`, sorted; [] if there is no such folder."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in `folder`, sorted."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of the file `name`; DataError: there is none."""

    @abstractmethod
    def open(self, names: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
        """(name, stream) of the files; in the given order for a folder, in its own for an archive.

        A stream is valid until the next one is asked for, and read where errors are `explained`.
        """

    @abstractmethod
    def places(self, tails: Sequence[str]) -> Iterator[list[str]]:
        """Folders that end with one of `tails`, the likeliest first; a list's are equally so."""

    def locate(self, tails: Sequence[str], probe: str) -> str | None:
        """The likeliest folder that ends with one of `tails` and holds `probe`, or None.

        Raises:
            DataError: there are several.
        """
        for places in self.places(tails):
            found = [place for place in places if self.has(posixpath.join(place, probe))]
            if len(found) > 1:
                raise DataError(
                    f"{self.path} holds the data more than once, in {' and in '.join(found)}; "
                    "give one of these folders as --source."
                )
            if found:
                return found[0]
        return None

    @abstractmethod
    def at(self, folder: str) -> Source:
        """One of its folders as a source."""

    def read_small(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of files that are read whole; none is larger than 256 MiB."""
        with self.explained():
            for name, stream in self.open(names):
                # Not read(limit): that would reserve the limit's memory for each of 50,000 reviews.
                if self.size(name) > MAX_SMALL_BYTES:
                    limit = f"{MAX_SMALL_BYTES >> 20} MiB"
                    raise DataError(f"{self.describe(name)} is larger than {limit}.")
                yield name, stream.read()

    def describe(self, name: str) -> str:
        """A file of the source, for messages."""
        return f"{self.path}/{name}"

    def missing(self, name: str) -> DataError:
        """The error of a file that is not there."""
        return DataError(f"{self.describe(name)} is missing; the source is incomplete.")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Within the block an error of reading becomes a DataError that names the source."""
        try:
            yield
        except _DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(
                    f"Cannot read {error.filename or self.given}: {error.strerror}."
                ) from error
            raise DataError(
                f"{self.given} is truncated or damaged, or no archive ({error})."
            ) from error


class FolderSource(Source):
    """A folder on disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._levels = [[""]]

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def files(self, folder: str) -> list[str]:
        return self._names(folder, os.DirEntry.is_file)

    def folders(self, folder: str) -> list[str]:
        return self._names(folder, os.DirEntry.is_dir)

    def _names(self, folder: str, kind: Callable[[os.DirEntry[str]], bool]) -> list[str]:
        path = self.path / folder
        if not path.is_dir():
            return []
        with self.explained(), os.scandir(path) as entries:  # no stat: there are 200,000 images
            return sorted(e.name for e in entries if not e.name.startswith(".") and kind(e))

    def size(self, name: str) -> int:
        try:
            return (self.path / name).stat().st_size
        except OSError as error:
            raise self.missing(name) from error

    def open(self, names: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
        for name in names:
            try:
                stream = (self.path / name).open("rb")
            except FileNotFoundError as error:
                raise self.missing(name) from error
            with stream:
                yield name, stream

    def places(self, tails: Sequence[str]) -> Iterator[list[str]]:
        """Of the folder itself, then one level deeper, then two."""
        for depth in range(_DEPTH + 1):
            for tail in tails:
                yield [posixpath.join(f, tail).rstrip("/") for f in self._level(depth)]

    def _level(self, depth: int) -> list[str]:
        """The folders `depth` levels below: a source may hold millions of files, so not all."""
        if depth == len(self._levels):
            below = []
            for parent in self._level(depth - 1):
                with suppress(DataError):  # a folder that cannot be read holds nothing for us
                    below += [posixpath.join(parent, name) for name in self.folders(parent)]
            self._levels.append(below[:_MAX_FOLDERS])
        return self._levels[depth]

    def at(self, folder: str) -> Source:
        inner = FolderSource(self.path / folder)
        inner.given = self.given
        return inner


_Member = tuple[str, int, Callable[[], IO[bytes] | None]]
"""Name, bytes, and what opens it."""


class ArchiveSource(Source):
    """An archive. The first question lists it once from end to end."""

    _root = ""

    @abstractmethod
    def members(self) -> Generator[_Member]:
        """All its files, each name checked by `safe_name`."""

    @cached_property
    def index(self) -> dict[str, dict[str, int]]:
        """Folder -> the files directly in it and their bytes, for every folder."""
        index: dict[str, dict[str, int]] = {"": {}}
        count = 0
        with progress(f"listing {self.given.name}", 0, "files") as step, self.explained():
            for name, size, _ in self.members():
                step(1)
                count += 1
                if count > _MAX_MEMBERS:
                    raise DataError(f"{self.given} has more than {_MAX_MEMBERS:,} files.")
                if name.startswith((".", _MAC_FOLDER)) or "/." in name:
                    continue  # hidden, or a Mac's own notes on files
                folder, base = posixpath.split(name)
                parent = folder
                while parent and parent not in index:
                    index[parent] = {}
                    parent = posixpath.dirname(parent)
                index[folder][base] = size
        if not count:
            raise DataError(f"{self.given} holds no files.")
        return index

    def has(self, name: str) -> bool:
        folder, base = posixpath.split(name)
        return name in self.index or base in self.index.get(folder, {})

    def files(self, folder: str) -> list[str]:
        return sorted(self.index.get(folder, ()))

    def folders(self, folder: str) -> list[str]:
        prefix = f"{folder}/" if folder else ""
        below = (f[len(prefix) :] for f in self.index if f.startswith(prefix) and f != folder)
        return sorted({name.split("/")[0] for name in below if name})

    def size(self, name: str) -> int:
        folder, base = posixpath.split(name)
        try:
            return self.index[folder][base]
        except KeyError:
            raise self.missing(name) from None

    def open(self, names: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
        wanted = {posixpath.join(self._root, name): name for name in names}
        for name in wanted.values():
            self.size(name)  # which it has
        with self.explained(), closing(self.members()) as members:
            for full, _, opener in members:
                if full in wanted:
                    name = wanted.pop(full)
                    try:
                        stream = opener()
                    except (RuntimeError, NotImplementedError) as error:  # a password, a method
                        raise DataError(
                            f"{self.describe(name)} cannot be read ({error}); unpack the archive "
                            "and give the folder."
                        ) from error
                    assert stream is not None
                    yield name, stream
                    if not wanted:
                        return

    def places(self, tails: Sequence[str]) -> Iterator[list[str]]:
        """The deepest first: lra_release.gz has two copies; everybody uses the inner one."""
        for tail in tails:
            fitting = [f for f in self.index if not tail or f == tail or f.endswith(f"/{tail}")]
            for place in sorted(fitting, key=lambda folder: (-folder.count("/"), folder)):
                yield [place]

    def at(self, folder: str) -> Source:
        if not folder:
            return self
        inner = copy.copy(self)
        inner.path, inner._root = self.path / folder, posixpath.join(self._root, folder)
        below = {f: files for f, files in self.index.items() if f"{f}/".startswith(f"{folder}/")}
        inner.index = {f[len(folder) + 1 :]: files for f, files in below.items()}
        return inner


class ZipSource(ArchiveSource):
    """A zip archive."""

    def members(self) -> Generator[_Member]:
        with zipfile.ZipFile(self.given) as archive:
            for info in archive.infolist():
                name = safe_name(info.filename, self.given)
                if not info.is_dir():
                    yield name, info.file_size, partial(archive.open, info)


class TarSource(ArchiveSource):
    """A tar archive, streamed; compressed or not, whatever its name says."""

    def members(self) -> Generator[_Member]:
        with self.given.open("rb") as file:
            head = file.read(6)
        opener: Any = next((o for magic, o in _COMPRESSED.items() if head.startswith(magic)), open)
        # Decompressed by us, in small blocks: tarfile's own stream copies its whole buffer for
        # every header, which took most of the time.
        with (
            opener(self.given, "rb") as stream,
            tarfile.open(fileobj=stream, mode="r|", bufsize=_TAR_BLOCK_BYTES) as archive,
        ):
            while (member := archive.next()) is not None:
                # tarfile keeps every header otherwise: 2.4 million in lra_release.
                archive.members = []  # type: ignore[attr-defined]
                name = safe_name(member.name, self.given)
                if member.isfile():
                    yield name, member.size, partial(archive.extractfile, member)
                elif not member.isdir():
                    log.warning("%s: %s is a link or a device; ignored", self.given, member.name)


def safe_name(name: str, archive: Path | str) -> str:
    """A member's path, normalised and relative; DataError: it leads outside the archive."""
    clean = name.replace("\\", "/")
    parts = [part for part in clean.split("/") if part not in ("", ".")]
    if clean.startswith("/") or ".." in parts or (parts and parts[0].endswith(":")):
        raise DataError(f"{archive} contains the unsafe path {name!r}; it is refused as a whole.")
    return "/".join(parts)


def open_source(path: Path) -> Source:
    """The folder, tar archive (plain, gz, bz2 or xz) or zip archive at `path`.

    Raises:
        DataError: it is none of them; says what it is.
    """
    path = Path(path).expanduser().absolute()
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise DataError(f"Source {path} does not exist.")
    if not path.is_file():
        raise DataError(f"Source {path} is neither a folder nor an archive.")
    source = TarSource(path)
    with source.explained(), path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return ZipSource(path)
    if what := next((what for magic, what in _OTHER_FORMATS.items() if head.startswith(magic)), ""):
        what += ", which dmx does not read; unpack it and give the folder"
    elif head.lstrip(codecs.BOM_UTF8 + b" \r\n").startswith(b"<"):
        what = (
            "a web page, not an archive: the server sent a message instead of the file; download "
            "it again"
        )
    elif _is_text(head) or head.startswith((b"\x80", b"\x89PNG", b"\x93NUMPY")):
        what = (
            "a single file and no archive; give the folder that holds it, in the layout that the "
            "data were published in"
        )
    if what:
        raise DataError(f"Source {path} is {what}.")
    return source


def _is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are a text's; those of a tar hold zeros."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # it may end in a letter
    except UnicodeDecodeError:
        return False
    return bool(text) and all(c.isprintable() or c.isspace() for c in text)


def without_bom(stream: Any, where: str) -> Any:
    """The stream of a text, behind the byte order mark that some editors put before it."""
    mark = stream.peek(3)[:3]
    if mark.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{where} is UTF-16; save it as UTF-8.")
    if mark == codecs.BOM_UTF8:
        stream.read(3)
    return stream
