"""Write a store: temporary sibling folder, lock, fsync, checksums, manifest last, atomic rename."""

from __future__ import annotations

import datetime
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import dmx
from dmx.data.store import DTYPES, FileEntry, Manifest, Store, open_store, read_manifest
from dmx.errors import DataError
from dmx.storage.files import (
    MANIFEST_FILE,
    exclusive_lock,
    explained,
    fsync_tree,
    put_back,
    quick_checksum,
    replace_folder,
    sha256_file,
)
from dmx.tasks import SPLITS, find_task

log = logging.getLogger(__name__)


def write_store(
    folder: Path,
    manifest: Manifest,
    fill: Callable[[StoreWriter], Mapping[str, Any] | None],
    *,
    replace_existing: bool = False,
) -> Store:
    """Write the store `folder`, `<data root>/<task>`, unless it exists; and open it.

    `fill` adds the examples; what it returns is added to the manifest's parameters (counts of
    skipped examples). On an exception nothing remains. When two processes call this at once, the
    second waits and then uses what the first wrote.

    Raises:
        DataError: another store or a foreign folder is there, the disk is full or read-only, an id
            or a label is out of range, or a split stayed empty.
    """
    with exclusive_lock(folder.with_name(f".{folder.name}.lock"), folder.name):
        put_back(folder)
        if folder.exists() and not replace_existing:
            if not (folder / MANIFEST_FILE).exists():
                raise DataError(
                    f"{folder} exists but is no prepared data set; move it away or pass --force to "
                    "replace it."
                )
            _refuse_other(folder, manifest)
            log.info("%s is prepared already; --force replaces it", folder)
            return open_store(folder)
        partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
        with explained(partial, "write"):
            _remove(folder, "partial")  # left by a killed process
            partial.mkdir(parents=True)
            writer = StoreWriter(partial, manifest)
        try:
            found = fill(writer)
            with explained(folder, "write"):
                writer.finish({**manifest.parameters, **(found or {})})
                replace_folder(partial, folder)
                _remove(folder, "shards")  # of which it was made
        finally:
            writer.close()
            shutil.rmtree(partial, ignore_errors=True)
    return open_store(folder)


def _remove(store: Path, kind: str) -> None:
    """Hidden folders beside the store; who holds the lock owns their names."""
    for folder in store.parent.glob(f".{store.name}.{kind}-*"):
        shutil.rmtree(folder)


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
    """Takes the examples of a store, in the order in which they lie there (see write_store)."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        names = [f"tokens{suffix}.bin" for suffix in manifest.suffixes]
        self._files = [(folder / name).open("wb", buffering=1 << 20) for name in names]
        self._lengths: list[list[npt.NDArray[np.int64]]] = [[] for _ in names]
        self._labels: list[npt.NDArray[np.int64]] = []
        self._index: dict[str, list[npt.NDArray[np.int64]]] = {split: [] for split in SPLITS}
        self._remarks: list[str] = []
        self._count = 0

    def add(
        self, split: str | None, ids: npt.ArrayLike, label: int, ids_1: npt.ArrayLike | None = None
    ) -> None:
        """Append one example: `ids` [L] unpadded, and for a paired task `ids_1` [M].

        It joins `split`, or none before `place` names it.
        """
        sides = [ids] if ids_1 is None else [ids, ids_1]
        self._append(split, [np.asarray(side)[None] for side in sides], np.array([label], np.int64))

    def add_rows(self, split: str | None, rows: npt.NDArray[Any], labels: npt.ArrayLike) -> None:
        """Append `rows` [N, L], examples of equal length, with `labels` [N]."""
        self._append(split, [rows], np.asarray(labels, np.int64))

    def place(self, split: str, numbers: npt.ArrayLike) -> None:
        """Append to `split` the examples that were added as number 0, 1, ... of the store."""
        self._index[split].append(np.asarray(numbers, np.int64))

    def remark(self, difference: str) -> None:
        """Note what sets the data apart from the published set, for the manifest's `partial`."""
        self._remarks.append(difference)

    def _append(
        self, split: str | None, sides: list[npt.NDArray[Any]], labels: npt.NDArray[np.int64]
    ) -> None:
        assert len(sides) == len(self._files), "ids_1 is for paired tasks, needed there"
        if wrong := self._wrong(sides, labels):
            first = sum(map(len, self._index[split])) if split else self._count
            at = f"{self._manifest.task}{f' {split}' if split else ''}, example {first}"
            at += f" to {first + len(labels) - 1}" if len(labels) > 1 else ""
            raise DataError(f"{at}: {wrong}.")
        dtype = DTYPES[self._manifest.dtype]
        with explained(self._folder.parent, "write"):
            for file, rows in zip(self._files, sides, strict=True):
                file.write(np.ascontiguousarray(rows, dtype=dtype).tobytes())
        for lengths, rows in zip(self._lengths, sides, strict=True):
            lengths.append(np.full(len(rows), rows.shape[1], np.int64))
        self._labels.append(labels)
        if split is not None:
            self.place(split, np.arange(self._count, self._count + len(labels)))
        self._count += len(labels)

    def _wrong(self, sides: list[npt.NDArray[Any]], labels: npt.NDArray[np.int64]) -> str:
        m = self._manifest
        if labels.size and not 0 <= labels.min() <= labels.max() < m.num_classes:
            bad = labels[(labels < 0) | (labels >= m.num_classes)][0]
            return f"label {bad} is outside 0..{m.num_classes - 1}"
        for rows in sides:
            if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < m.vocab_size - 1:
                return (
                    f"token ids {rows.min()}..{rows.max()} are outside 0..{m.vocab_size - 2}, "
                    "those of the task; the source is another task's, or was encoded otherwise"
                )
            if rows.shape[1] > m.max_length:
                return f"{rows.shape[1]} tokens are more than {m.max_length}"
        return ""

    def finish(self, parameters: Mapping[str, Any]) -> None:
        """Write all that is left, the manifest last."""
        none = np.zeros(0, "<i8")
        labels = np.concatenate([none, *self._labels])
        index = {split: np.concatenate([none, *parts]) for split, parts in self._index.items()}
        self._check_labels({split: labels[numbers] for split, numbers in index.items()})
        arrays = {"labels": labels, **{f"{split}.index": index[split] for split in index}}
        for suffix, lengths in zip(self._manifest.suffixes, self._lengths, strict=True):
            arrays[f"offsets{suffix}"] = np.cumsum(np.concatenate([[0], *lengths]), dtype="<i8")
        for name, array in arrays.items():
            np.save(self._folder / f"{name}.npy", array, allow_pickle=False)
        for file in self._files:
            file.close()
        manifest = replace(
            self._manifest,
            splits={split: len(numbers) for split, numbers in index.items()},
            parameters=parameters,
            partial=self._partial({split: labels[index[split]] for split in index}),
            files={path.name: _entry(path) for path in sorted(self._folder.iterdir())},
            dmx_version=dmx.__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        (self._folder / MANIFEST_FILE).write_bytes(manifest.to_json())
        fsync_tree(self._folder)

    def _partial(self, labels: Mapping[str, npt.NDArray[np.int64]]) -> str:
        """The manifest's `partial`, from the splits' labels."""
        task, found = find_task(self._manifest.task), []
        if task is not None and task.published is not None and not self._manifest.is_sample:
            counts = {
                split: np.bincount(part, minlength=self._manifest.num_classes).tolist()
                for split, part in labels.items()
            }
            found = [
                task.published.lacking({split: len(part) for split, part in labels.items()}),
                task.published.unbalanced(counts),
            ]
        return "; ".join(part for part in [*found, *self._remarks] if part)

    def _check_labels(self, labels: Mapping[str, npt.NDArray[np.int64]]) -> None:
        task = self._manifest.task
        if empty := [split for split, found in labels.items() if not found.size]:
            raise DataError(
                f"No examples for split {', '.join(empty)} of {task}; the source is incomplete."
            )
        first = labels["train"][0]
        if all((found == first).all() for found in labels.values()):
            raise DataError(
                f"All {self._count:,} examples of {task} have label {first}; the source lacks the "
                "other classes, or its labels are no labels."
            )

    def close(self) -> None:
        """Let go of the files; a full disk fails again here, but they are removed anyway."""
        for file in self._files:
            try:
                file.close()
            except OSError:
                log.debug("closing %s failed", file.name)


def _entry(path: Path) -> FileEntry:
    stat = path.stat()
    return FileEntry(
        bytes=stat.st_size,
        sha256=sha256_file(path),
        quick=quick_checksum(path),
        mtime_ns=stat.st_mtime_ns,
    )
