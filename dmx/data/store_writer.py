"""Write a store: temporary sibling folder, lock, fsync, checksums, manifest last, atomic rename."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

import dmx
from dmx.data.manifest import DTYPES, Manifest, lacking, read_manifest
from dmx.errors import DataError
from dmx.storage.files import (
    MANIFEST_FILE,
    exclusive_lock,
    explained,
    fsync_path,
    put_back,
    quick_checksum,
    replace_folder,
    sha256_file,
)
from dmx.tasks import SPLITS

log = logging.getLogger(__name__)


class AlreadyPreparedError(DataError):
    """The store to be written exists already."""


def write_store(
    folder: Path,
    manifest: Manifest,
    fill: Callable[[StoreWriter], Mapping[str, Any] | None],
    *,
    replace_existing: bool = False,
) -> None:
    """Write the store `folder` unless it exists; `fill` adds the examples.

    What `fill` returns is added to the manifest's parameters (counts of skipped examples). When
    two processes call this at once, the second waits and then uses what the first wrote.
    """
    try:
        with StoreWriter(folder, manifest, replace=replace_existing) as writer:
            parameters = {**manifest.parameters, **(fill(writer) or {})}
            writer.manifest = replace(manifest, parameters=parameters)
    except AlreadyPreparedError:
        _refuse_other(folder, manifest)
        log.info("%s is prepared already; --force replaces it", folder)


def _refuse_other(folder: Path, wanted: Manifest) -> None:
    """Raise when the store that exists is not the one asked for (other source, seed, ...)."""
    found = read_manifest(folder)
    old = {"data": found.data_name, "sizes": dict(found.splits), **found.parameters}
    new = json.loads(json.dumps({"data": wanted.data_name, **wanted.parameters}))
    differing = [key for key, value in new.items() if old.get(key) != value]
    if differing:
        has = ", ".join(f"{key}={str(old.get(key))[:60]}" for key in differing)
        asked = ", ".join(f"{key}={str(new[key])[:60]}" for key in differing)
        raise DataError(
            f"{folder} is prepared already, with {has} instead of {asked}; pass --force to replace "
            "it, or choose another --data-root."
        )


class StoreWriter:
    """Context manager that writes one store; on an exception nothing remains under its name.

    Examples are stored in the order in which they are added; a split is a list of their numbers.

    Args:
        folder: the store's final place, `<data root>/<task>`.
        manifest: what is being written; splits, files, version and time are filled in here.
        replace: overwrite a store that is already there instead of refusing.

    Raises:
        DataError: the folder exists already, the disk is full or read-only, an id or a label is
            out of range, or a split stayed empty.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, replace: bool = False) -> None:
        self.folder = folder
        self.manifest = manifest
        self._replace = replace
        self._partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
        self._stack = ExitStack()
        self._sides: list[_TokenFile] = []
        self._labels: list[npt.NDArray[np.int64]] = []
        self._count = 0
        self._index: dict[str, list[npt.NDArray[np.int64]]] = {split: [] for split in SPLITS}
        self._counts = dict.fromkeys(SPLITS, 0)
        self._remarks: list[str] = []

    def __enter__(self) -> StoreWriter:
        lock = self.folder.with_name(f".{self.folder.name}.lock")
        with ExitStack() as stack:
            stack.enter_context(exclusive_lock(lock, self.folder.name))
            put_back(self.folder)
            if not self._replace:
                if (self.folder / MANIFEST_FILE).exists():
                    raise AlreadyPreparedError(f"{self.folder} is prepared already.")
                if self.folder.exists():
                    raise DataError(
                        f"{self.folder} exists but is no prepared data set; move it away or pass "
                        "--force to replace it."
                    )
            with explained(self._partial, "write"):
                self._remove("partial")  # left by a killed process
                self._partial.mkdir(parents=True)
                dtype = DTYPES[self.manifest.dtype]
                for name in ("tokens.bin", "tokens_1.bin")[: 1 + self.manifest.paired]:
                    self._sides.append(_TokenFile(self._partial / name, dtype))
            self._stack = stack.pop_all()
        return self

    def _remove(self, kind: str) -> None:
        """Hidden folders beside the store; whoever holds the lock owns their names."""
        for folder in self.folder.parent.glob(f".{self.folder.name}.{kind}-*"):
            shutil.rmtree(folder)

    def add(
        self, split: str | None, ids: npt.ArrayLike, label: int, ids_1: npt.ArrayLike | None = None
    ) -> None:
        """Append one example: `ids` [L] unpadded, and for a paired task `ids_1` [M].

        It joins `split`, or none before `place` names it.
        """
        sides = [np.asarray(ids)] if ids_1 is None else [np.asarray(ids), np.asarray(ids_1)]
        self._append(split, [side[None] for side in sides], np.array([label], np.int64))

    def add_rows(self, split: str | None, rows: npt.NDArray[Any], labels: npt.ArrayLike) -> None:
        """Append `rows` [N, L], examples of equal length, with `labels` [N]."""
        self._append(split, [rows], np.asarray(labels, np.int64))

    def place(self, split: str, numbers: npt.ArrayLike) -> None:
        """Append to `split` the examples that were added as number 0, 1, ... of the store."""
        self._index[split].append(np.asarray(numbers, np.int64))
        self._counts[split] += len(self._index[split][-1])

    def remark(self, difference: str) -> None:
        """Note what sets the data apart from the published set, for the manifest's `partial`."""
        self._remarks.append(difference)

    def _append(
        self, split: str | None, sides: list[npt.NDArray[Any]], labels: npt.NDArray[np.int64]
    ) -> None:
        assert len(sides) == len(self._sides), "ids_1 is for paired tasks, needed there"
        self._check(split, sides, labels)
        with explained(self.folder, "write"):
            for file, rows in zip(self._sides, sides, strict=True):
                file.append(rows)
        self._labels.append(labels)
        if split is not None:
            self.place(split, np.arange(self._count, self._count + len(labels)))
        self._count += len(labels)

    def _check(
        self, split: str | None, sides: list[npt.NDArray[Any]], labels: npt.NDArray[np.int64]
    ) -> None:
        manifest = self.manifest
        first = self._count if split is None else self._counts[split]
        at = f"{manifest.task}{f' {split}' if split else ''}, example {first}"
        at += f" to {first + len(labels) - 1}" if len(labels) > 1 else ""
        if labels.size and not 0 <= labels.min() <= labels.max() < manifest.num_classes:
            bad = labels[(labels < 0) | (labels >= manifest.num_classes)][0]
            raise DataError(f"{at}: label {bad} is outside 0..{manifest.num_classes - 1}.")
        for rows in sides:
            if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < manifest.vocab_size - 1:
                raise DataError(
                    f"{at}: token ids {rows.min()}..{rows.max()} are outside "
                    f"0..{manifest.vocab_size - 2}, those of the task; the source is another "
                    "task's, or was encoded otherwise."
                )
            if rows.shape[1] > manifest.max_length:
                raise DataError(
                    f"{at}: {rows.shape[1]} tokens are more than {manifest.max_length}."
                )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with explained(self.folder, "write"):
                    self._finish()
        finally:
            for side in self._sides:
                try:
                    side.file.close()
                except OSError:  # a full disk fails again on close; the folder goes anyway
                    log.debug("closing %s failed", side.path)
            shutil.rmtree(self._partial, ignore_errors=True)
            self._stack.close()

    def _finish(self) -> None:
        none = np.zeros(0, "<i8")
        arrays = {"labels.npy": np.concatenate([none, *self._labels])}
        for split, parts in self._index.items():
            arrays[f"{split}.index.npy"] = np.concatenate([none, *parts])
        files: dict[str, dict[str, Any]] = {}
        for number, side in enumerate(self._sides):
            files[side.path.name] = _entry(side.path, side.finish())
            arrays[f"offsets{f'_{number}' if number else ''}.npy"] = side.offsets()
        for name, array in arrays.items():
            path = self._partial / name
            np.save(path, array, allow_pickle=False)
            fsync_path(path)
            files[name] = _entry(path, sha256_file(path))
        labels = {split: arrays["labels.npy"][arrays[f"{split}.index.npy"]] for split in SPLITS}
        self._check_labels(labels)
        self.manifest = replace(
            self.manifest,
            splits={split: len(found) for split, found in labels.items()},
            files=files,
            dmx_version=dmx.__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        classes = {
            split: np.bincount(found, minlength=self.manifest.num_classes).tolist()
            for split, found in labels.items()
        }
        differences = [lacking(self.manifest, classes), *self._remarks]
        self.manifest = replace(self.manifest, partial="; ".join(d for d in differences if d))
        path = self._partial / MANIFEST_FILE
        path.write_bytes(self.manifest.to_json())
        fsync_path(path)
        fsync_path(self._partial)
        replace_folder(self._partial, self.folder)
        self._remove("shards")  # of which it was made

    def _check_labels(self, labels: Mapping[str, npt.NDArray[np.int64]]) -> None:
        if empty := [split for split, found in labels.items() if not found.size]:
            raise DataError(
                f"No examples for split {', '.join(empty)} of {self.manifest.task}; "
                "the source is incomplete."
            )
        first = labels["train"][0]
        if all((found == first).all() for found in labels.values()):
            raise DataError(
                f"All {self._count:,} examples of {self.manifest.task} have label {first}; the "
                "source lacks the other classes, or its labels are no labels."
            )


class _TokenFile:
    """A growing file of tokens, with its checksum and the lengths of its rows."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.file = path.open("wb", buffering=1 << 20)
        self._dtype = dtype
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._digest = hashlib.sha256()

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Append rows [N, L]."""
        content = np.ascontiguousarray(rows, dtype=self._dtype).tobytes()
        self.file.write(content)
        self._digest.update(content)
        self._lengths.append(np.full(len(rows), rows.shape[1], np.int64))

    def finish(self) -> str:
        """Flush to the disk and close; the SHA-256 of the content, in hex."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self._digest.hexdigest()

    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 [N + 1]: row n holds tokens offsets[n] to offsets[n + 1]."""
        return np.cumsum(np.concatenate([np.zeros(1, np.int64), *self._lengths]), dtype="<i8")


def _entry(path: Path, sha256: str) -> dict[str, Any]:
    stat = path.stat()
    return {
        "bytes": stat.st_size,
        "sha256": sha256,
        "quick": quick_checksum(path),
        "mtime_ns": stat.st_mtime_ns,
    }
