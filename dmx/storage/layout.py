"""Where a node finds a run's files: shared storage, or local copies of object storage and data."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from dmx.errors import DataError
from dmx.schema import is_url
from dmx.storage.files import (
    MANIFEST_FILE,
    exclusive_lock,
    fsync_tree,
    replace_folder,
    write_atomic,
)
from dmx.storage.journal import CLAIM_FILE, Claim, taken_over
from dmx.storage.object_storage import ObjectStorage, join


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

    # -- checkpoints ------------------------------------------------------------------------

    def claim(self, folder: Path, claim: Claim) -> None:
        """Write the claim of a folder to object storage as well."""
        name = self._name(folder)
        if name is not None:
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
            StorageError: object storage does not answer.
            CheckpointError: what it holds is damaged.
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
        if self.run is None or self.run_url is None:
            return None
        try:
            return folder.relative_to(self.run).as_posix()
        except ValueError:  # weights from elsewhere, given as a path
            return None

    # -- data -------------------------------------------------------------------------------

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


def copy_store(source: str, name: str, target_root: Path) -> Path:
    """Copy store `name` from below `source` to `target_root`, once per node and content.

    Processes of one node wait for each other. A store whose manifest has changed is copied again
    under its old name; a process that still reads the old files keeps them.

    Raises:
        DataError: the source has no such store, or it cannot be copied.
    """
    target = target_root / name
    try:
        manifest = _source_manifest(source, name)
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


def _source_manifest(source: str, name: str) -> bytes:
    if is_url(source):
        found = ObjectStorage(source).read(f"{name}/{MANIFEST_FILE}")
    else:
        path = Path(source) / name / MANIFEST_FILE
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


def _note(folder: Path) -> Path:
    """Which version a node's copy is."""
    return folder.parent / f".{folder.name}.version"
