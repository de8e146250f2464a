"""Folders in object storage (s3://, gs://, any pyarrow URL): whole versions behind one pointer.

An object store replaces one object at once, but not a folder. So a folder's files go under a name
of their own, `<folder>@<version>/`, and `<folder>.version.json` then says which version counts. A
reader never meets half of one, and a push that was cut short leaves the version before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dmx.errors import CheckpointError, ConfigError, StorageError
from dmx.storage.files import write_atomic

logger = logging.getLogger("dmx.storage")
POINTER_SUFFIX = ".version.json"
RETRY_SECONDS = (1.0, 4.0, 15.0, 60.0)
"""Waits between attempts: a store that is away for a minute costs a minute, not the run."""
_BLOCK_BYTES = 1 << 24

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
                _write_file(Path(path), content)  # a plain file is not replaced at once otherwise
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
        """Store a folder's files as the newest version of `name`; its version comes back.

        Args:
            before: called before the version counts; may raise.
        """
        contents = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
        entries = {n: {"bytes": len(c), "sha256": _sha256(c)} for n, c in contents.items()}
        version = _sha256(json.dumps(entries, sort_keys=True).encode())[:16]
        old = self.pointer(name)
        if old is not None and old["version"] == version:
            return version
        for file, content in contents.items():
            self.write(f"{name}@{version}/{file}", content)
        pointer = json.dumps({"version": version, "files": entries}, indent=1)
        before()
        self.write(name + POINTER_SUFFIX, pointer.encode())
        if old is not None:
            self._forget(f"{name}@{old['version']}")
        return version

    def pointer(self, name: str) -> Mapping[str, Any] | None:
        """{"version", "files"} of a folder's newest version, or None where there is none.

        Raises:
            CheckpointError: the pointer is damaged.
        """
        raw = self.read(name + POINTER_SUFFIX)
        if raw is None:
            return None
        try:
            pointer = json.loads(raw)
            files = pointer["files"]
            sound = str(pointer["version"]).isalnum() and all(
                "/" not in n and not n.startswith(".") and str(e["sha256"]).isalnum()
                for n, e in files.items()
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise CheckpointError(f"{self.url}: {name}{POINTER_SUFFIX} is damaged; remove it.")
        assert isinstance(pointer, dict)
        return pointer

    def pull(self, name: str, folder: Path, known: str | None = None) -> str | None:
        """Write the newest version of `name` into the new folder `folder`; None if there is none.

        Args:
            known: a version that is here already; when it is the newest, nothing is written.

        Raises:
            CheckpointError: what is stored is not what was written.
        """
        for _ in range(5):  # a newer version may replace the one that is being read
            pointer = self.pointer(name)
            if pointer is None or pointer["version"] == known:
                return known if pointer else None
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            if self._pull_files(name, pointer, folder):
                return str(pointer["version"])
        raise CheckpointError(f"{self.url}: {name} is not whole; remove {name}{POINTER_SUFFIX}.")

    def _pull_files(self, name: str, pointer: Mapping[str, Any], folder: Path) -> bool:
        for file, entry in pointer["files"].items():
            content = self.read(f"{name}@{pointer['version']}/{file}")
            if content is None:
                return False
            if _sha256(content) != entry["sha256"]:
                raise CheckpointError(
                    f"{self.url}: {name}@{pointer['version']}/{file} is damaged; "
                    f"remove {name}{POINTER_SUFFIX}, and the run starts it again."
                )
            _write_file(folder / file, content)
        return True

    def _forget(self, name: str) -> None:
        """Old versions only cost room; failing to delete one is no failure."""
        with contextlib.suppress(OSError):
            self._files.delete_dir(f"{self._root}/{name}")

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


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


def files_below(folder: Path) -> Iterator[Path]:
    """All plain files below a folder that are not hidden, sorted."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from files_below(path)
        elif path.is_file():
            yield path
