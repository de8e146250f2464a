"""Object storage (s3://, gs://, any URL that pyarrow opens), and where a node finds a run's files.

An object store replaces one object at once, but not a folder. So a folder is one zip archive,
`<folder>.zip`: a reader never meets half of one, and a push that was cut short leaves the former
one as it was. The archive's comment is a checksum of its contents, and its version.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from dmx.errors import CheckpointError, ConfigError, DataError, StorageError
from dmx.schema import is_url
from dmx.storage.files import (
    MANIFEST_FILE,
    exclusive_lock,
    fsync_tree,
    replace_folder,
    write_atomic,
)
from dmx.storage.journal import CLAIM_FILE, Claim, taken_over

logger = logging.getLogger("dmx.storage")
FOLDER_SUFFIX = ".zip"
RETRY_SECONDS = (1.0, 4.0, 15.0, 60.0)
"""Waits between attempts: a store that is away for a minute costs a minute, not the run."""
_BLOCK_BYTES = 1 << 24
_EPOCH = (1980, 1, 1, 0, 0, 0)

P = ParamSpec("P")
T = TypeVar("T")
_Method = Callable[Concatenate["ObjectStorage", str, P], T]


def _patiently(verb: str) -> Callable[[_Method[P, T]], _Method[P, T]]:
    """Do a method of ObjectStorage again after each of RETRY_SECONDS while it fails."""

    def decorate(once: _Method[P, T]) -> _Method[P, T]:
        @functools.wraps(once)
        def again(self: ObjectStorage, name: str, *args: P.args, **more: P.kwargs) -> T:
            what = f"{verb} {name or 'the storage'}"
            for wait in (*RETRY_SECONDS, None):
                try:
                    return once(self, name, *args, **more)
                except OSError as error:
                    reason = next(iter(str(error).splitlines()), type(error).__name__)
                    if wait is None:
                        raise StorageError(f"{self.url}: cannot {what}: {reason}.") from None
                    again_in = "%s: cannot %s (%s); again in %g s"
                    logger.warning(again_in, self.url, what, reason, wait)
                    time.sleep(wait)
            raise AssertionError

        return again

    return decorate


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
    """The objects below one URL. A StorageError says that it does not answer for a minute and more.

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
            files, root = fs.FileSystem.from_uri(_in_one_request(url))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(f"{url} is no storage URL that pyarrow can open: {reason}.") from None
        self._files = fs.SubTreeFileSystem(root.rstrip("/"), files)
        self._disk = Path(root) if isinstance(files, fs.LocalFileSystem) else None

    # -- single objects ---------------------------------------------------------------------

    @_patiently("write")
    def write(self, name: str, content: bytes) -> None:
        """Replace one object at once."""
        if self._disk is not None:  # pyarrow writes into the old file
            path = self._disk / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
            return
        with self._files.open_output_stream(name) as stream:
            stream.write(content)

    def _is_there(self, name: str) -> bool:
        return bool(self._files.get_file_info(name).type == self._fs.FileType.File)

    @_patiently("read")
    def read(self, name: str) -> bytes | None:
        """One object's content, or None where there is none."""
        if not self._is_there(name):
            return None
        with self._files.open_input_stream(name) as stream:
            return bytes(stream.read())

    @_patiently("read")
    def download(self, name: str, path: Path) -> None:
        """Copy one object, of any size, to a new file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._files.open_input_stream(name) as stream, path.open("wb") as file:
            shutil.copyfileobj(stream, file, _BLOCK_BYTES)

    @_patiently("list")
    def names(self, folder: str) -> list[str]:
        """Names of all objects below a folder ("" for all), sorted."""
        selector = self._fs.FileSelector(folder, recursive=True, allow_not_found=True)
        infos = self._files.get_file_info(selector)
        return sorted(info.path for info in infos if info.type == self._fs.FileType.File)

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

    @_patiently("read the version of")
    def version(self, name: str) -> str | None:
        """Of the stored folder `name`, from the end of its archive; None where there is none."""
        if not self._is_there(name + FOLDER_SUFFIX):
            return None
        with self._files.open_input_file(name + FOLDER_SUFFIX) as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    return archive.comment.decode()
            except (zipfile.BadZipFile, ValueError):
                return ""

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


def _version(contents: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for file in sorted(contents):
        digest.update(f"{file} {hashlib.sha256(contents[file]).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


# -- where a node finds a run's files -------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StorageLayout:
    """Plain texts that every worker gets; without any of them all paths are shared ones.

    Attributes:
        run: a run's folder, the same path on each node but not the same disk.
        run_url: its counterpart in object storage, where nodes meet.
        data_source: prepared data that all nodes see: a path or a URL.
        node_data: a folder of each node's own disk that keeps a copy of the data it uses.
    """

    run: str | None = None
    run_url: str | None = None
    data_source: str | None = None
    node_data: str | None = None

    def below(self, folder: Path) -> StorageLayout:
        """The layout of a run within the run."""
        name = self._name(folder)
        if name is None or self.run_url is None:
            return self
        return dataclasses.replace(self, run=str(folder), run_url=join(self.run_url, name))

    def claim(self, folder: Path, claim: Claim) -> None:
        """Write the claim of a folder to object storage as well."""
        if (name := self._name(folder)) is not None:
            self._storage().write(f"{name}/{CLAIM_FILE}", json.dumps(claim.holder).encode())

    def push(self, folder: Path, claim: Claim | None = None) -> None:
        """Bring a checkpoint folder of this node to object storage, as a whole.

        Args:
            claim: of the folder that it lies in, where that was claimed.

        Raises:
            StorageError: it does not answer for a minute and more.
            TakenOverError: another node has claimed it since.
        """
        name = self._name(folder)
        if name is None:
            return

        def check() -> None:
            if claim is not None:
                self._check(name.rpartition("/")[0], claim)

        write_atomic(_note(folder), self._storage().push(folder, name, check))

    def _check(self, name: str, claim: Claim) -> None:
        """Locks do not reach other nodes here; only what the last one wrote tells."""
        raw = self._storage().read(f"{name}/{CLAIM_FILE}")
        try:
            found = json.loads(raw or b"{}")
            ours = found["token"] == claim.token
        except (ValueError, LookupError, TypeError, RecursionError):
            found, ours = {}, False
        if raw is not None and not ours:
            raise taken_over(f"{self.run_url}/{name}", found)

    def pull(self, folder: Path) -> None:
        """Bring a checkpoint folder to this node if another node has a newer one, or any.

        Raises:
            StorageError: object storage does not answer. CheckpointError: what it holds is damaged.
        """
        name = self._name(folder)
        if name is None:
            return
        note = _note(folder)
        known = note.read_text() if folder.is_dir() and note.is_file() else None
        new = folder.parent / f".{folder.name}.pull-{os.getpid()}"
        try:
            version = self._storage().pull(name, new, known)
            if version is not None and version != known:
                note.unlink(missing_ok=True)
                replace_folder(new, folder)
                write_atomic(note, version)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _storage(self) -> ObjectStorage:
        assert self.run_url is not None
        return ObjectStorage(self.run_url)

    def _name(self, folder: Path) -> str | None:
        """The folder's name below the run, where the run has object storage."""
        if self.run is None or self.run_url is None or not folder.is_relative_to(self.run):
            return None  # also of weights from elsewhere, given as a path
        return folder.relative_to(self.run).as_posix()

    def data(self, folder: str) -> Path:
        """The store's folder on this node, copied there once from the source where need be.

        Args:
            folder: of a store, below `data_source` or already below `node_data`.

        Raises:
            DataError: the source has no such store, or this node's disk cannot hold it.
        """
        if self.node_data is not None and self.data_source is not None:
            for root in (self.node_data, self.data_source):
                if not is_url(root) and Path(folder).is_relative_to(root):
                    name = Path(folder).relative_to(root).as_posix()
                    return copy_store(self.data_source, name, Path(self.node_data))
        return Path(folder)  # on shared storage; or a sample, or data from elsewhere


SHARED_FILESYSTEM = StorageLayout()
"""All nodes see all paths."""


def _note(folder: Path) -> Path:
    """Which version a node's copy is."""
    return folder.parent / f".{folder.name}.version"


def copy_store(source: str, name: str, target_root: Path) -> Path:
    """Copy store `name` from below `source` to `target_root`, once per node and content.

    Processes of one node wait for each other. A store whose manifest has changed is copied again
    under its old name; a process that still reads the old files keeps them.

    Raises:
        DataError: the source has no such store, or it cannot be copied.
    """
    target = target_root / name
    try:
        manifest = _read_manifest(source, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(target.parent / f".{target.name}.lock", str(target)):
            here = target / MANIFEST_FILE
            if here.is_file() and here.read_bytes() == manifest:
                return target
            new = target.parent / f".{target.name}.new"
            shutil.rmtree(new, ignore_errors=True)
            _copy_files(source, name, new)
            fsync_tree(new)
            write_atomic(new / MANIFEST_FILE, manifest)
            replace_folder(new, target)
    except OSError as error:
        raise DataError(
            f"{source}/{name} cannot be copied to {target} ({error.strerror or error}); give a "
            "--node-data folder with room."
        ) from None
    return target


def _read_manifest(source: str, name: str) -> bytes:
    path = Path(source) / name / MANIFEST_FILE
    if is_url(source):
        found = ObjectStorage(source).read(f"{name}/{MANIFEST_FILE}")
    else:
        found = path.read_bytes() if path.is_file() else None
    if found is None:
        raise DataError(
            f"{source} has no prepared data for {name}; prepare them with python -m dmx.data "
            f"{name} --data-root FOLDER, and copy FOLDER/{name} there."
        )
    return found


def _copy_files(source: str, name: str, new: Path) -> None:
    if not is_url(source):
        shutil.copytree(Path(source) / name, new, ignore=shutil.ignore_patterns(".*"))
        return
    storage = ObjectStorage(source)
    for file in storage.names(name):
        storage.download(file, new / Path(file).relative_to(name))
