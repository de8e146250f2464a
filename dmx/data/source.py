"""A source of raw data: a folder, a tar or a zip behind one interface, with every path checked."""

from __future__ import annotations

import codecs
import io
import os
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from dmx.errors import DataError

MAX_SMALL_BYTES = 256 << 20
"""Limit of `read_small`: no file that is read whole (an image, a CIFAR batch) is larger."""
_DEPTH = 2
_MAX_FOLDERS = 500
"""A folder is searched so many levels deep, in so many folders of each."""


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
        """Whether a file or folder `name` exists."""
        return (self.path / name).exists()

    def files(self, folder: str) -> list[str]:
        """Names of the files directly in `folder`, sorted."""
        return self._entries(folder, files=True)

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in `folder`, sorted."""
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
        """Bytes of the file `name`; see Source.size."""
        try:
            return (self.path / name).stat().st_size
        except OSError as error:
            raise DataError(
                f"{self.describe(name)} is missing; the source is incomplete."
            ) from error

    def open(self, names: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
        """(name, stream) of the files in the given order; see Source.open."""
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


_FORMATS = {
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
}
"""First bytes of archives that Python 3.11 cannot read."""
_HEAD_BYTES = 1024


def open_source(path: Path) -> Source:
    """The folder, tar archive (plain, gz, bz2 or xz) or zip archive at `path`.

    Raises:
        DataError: it does not exist, or is none of them; says what it is.
    """
    from dmx.data.archive import TarSource, ZipSource

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
    for magic, what in _FORMATS.items():
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
