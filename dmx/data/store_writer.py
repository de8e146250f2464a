"""Write a store: temporary sibling folder, lock, fsync, checksums, manifest last, atomic rename."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

import dmx
from dmx.data.manifest import Manifest, lacking
from dmx.data.token_file import DTYPES, TokenFile
from dmx.errors import DataError
from dmx.storage.files import (
    MANIFEST_FILE,
    exclusive_lock,
    explained,
    fsync_path,
    quick_checksum,
    sha256_file,
    write_atomic,
)
from dmx.tasks import SPLITS

log = logging.getLogger(__name__)


class AlreadyPreparedError(DataError):
    """The store to be written exists already."""


class StoreWriter:
    """Context manager that writes one store; on an exception nothing remains under its name.

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
        self._tokens: dict[tuple[str, int], TokenFile] = {}
        self._labels: dict[str, list[npt.NDArray[np.int64]]] = {}
        self._counts = dict.fromkeys(manifest.stored_splits, 0)
        self._placed: set[str] = set()
        self._remarks: list[str] = []

    def __enter__(self) -> StoreWriter:
        lock = self.folder.with_name(f".{self.folder.name}.lock")
        with ExitStack() as stack:
            stack.enter_context(exclusive_lock(lock, self.folder.name))
            if not self._replace:
                if (self.folder / MANIFEST_FILE).exists():
                    raise AlreadyPreparedError(f"{self.folder} is prepared already.")
                if self.folder.exists():
                    raise DataError(
                        f"{self.folder} exists but is no prepared data set; move it away or pass "
                        "--force to replace it."
                    )
            with explained(self._partial, "write"):
                # Left by a killed process: whoever holds the lock owns these names.
                for stale in self.folder.parent.glob(f".{self.folder.name}.partial-*"):
                    shutil.rmtree(stale)
                self._partial.mkdir(parents=True)
                for split in self.manifest.stored_splits:
                    self._labels[split] = []
                    for side in range(1 + self.manifest.paired):
                        path = self._partial / f"{split}.tokens{_suffix(side)}.bin"
                        self._tokens[split, side] = TokenFile(path, DTYPES[self.manifest.dtype])
            self._stack = stack.pop_all()
        return self

    def add(
        self,
        split: str,
        ids: npt.ArrayLike,
        label: int,
        ids_1: npt.ArrayLike | None = None,
    ) -> None:
        """Append one example: `ids` [L] unpadded, and for a paired task `ids_1` [M]."""
        sides = [np.asarray(ids)] if ids_1 is None else [np.asarray(ids), np.asarray(ids_1)]
        self._append(split, [s[None] for s in sides], np.array([label], np.int64))

    def remark(self, difference: str) -> None:
        """Note what sets the data apart from the published set, for the manifest's `partial`."""
        self._remarks.append(difference)

    def add_rows(self, split: str, rows: npt.NDArray[Any], labels: npt.ArrayLike) -> None:
        """Append `rows` [N, L], examples of equal length, with `labels` [N]."""
        self._append(split, [rows], np.asarray(labels, np.int64))

    def allocate(self, split: str, count: int, length: int) -> None:
        """Announce `count` examples of `length` tokens for `put`, which may come in any order."""
        assert not self.manifest.paired, "pairs are appended"
        self._placed.add(split)
        self._labels[split] = [np.full(count, -1, np.int64)]
        self._tokens[split, 0].allocate(count, length)

    def put(
        self,
        split: str,
        positions: npt.NDArray[np.int64],
        rows: npt.NDArray[Any],
        labels: npt.ArrayLike,
    ) -> None:
        """Write `rows` [N, L] and `labels` [N] at `positions` [N] of an allocated split."""
        values = np.asarray(labels, np.int64)
        self._check(split, [rows], values, int(positions[0]) if len(positions) else 0)
        self._labels[split][0][positions] = values
        with explained(self.folder, "write"):
            self._tokens[split, 0].put(positions, rows)

    def _append(
        self, split: str, sides: list[npt.NDArray[Any]], labels: npt.NDArray[np.int64]
    ) -> None:
        assert len(sides) == 1 + self.manifest.paired, "ids_1 is for paired tasks, needed there"
        assert split not in self._placed, "append or put, not both"
        self._check(split, sides, labels, self._counts[split])
        for side, rows in enumerate(sides):
            with explained(self.folder, "write"):
                self._tokens[split, side].append(rows)
        self._labels[split].append(labels)
        self._counts[split] += len(labels)

    def _check(
        self,
        split: str,
        sides: list[npt.NDArray[Any]],
        labels: npt.NDArray[np.int64],
        first: int,
    ) -> None:
        manifest = self.manifest
        at = f"example {first}" + (f" to {first + len(labels) - 1}" if len(labels) > 1 else "")
        at = f"{manifest.task} {split}, {at}"
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
            for tokens in self._tokens.values():
                try:
                    tokens.close()
                except OSError:  # a full disk fails again on close; the folder goes anyway
                    log.debug("closing %s failed", tokens.path)
            shutil.rmtree(self._partial, ignore_errors=True)
            self._stack.close()

    def _finish(self) -> None:
        counts: dict[str, int] = {}
        files: dict[str, dict[str, Any]] = {}
        for (split, side), tokens in self._tokens.items():
            files[tokens.path.name] = _entry(tokens.path, tokens.finish())
            self._save(f"{split}.offsets{_suffix(side)}.npy", tokens.offsets(), files)
        for split, parts in self._labels.items():
            labels = np.concatenate([np.zeros(0, "<i8"), *parts])
            assert not labels.size or labels.min() >= 0, f"{split} has gaps"
            counts[split] = len(labels)
            self._save(f"{split}.labels.npy", labels, files)
        for split, other in self.manifest.aliases.items():
            counts[split] = counts[other]
        if empty := [split for split, count in counts.items() if not count]:
            raise DataError(
                f"No examples for split {', '.join(empty)} of {self.manifest.task}; "
                "the source is incomplete."
            )
        self.manifest = replace(
            self.manifest,
            splits={split: counts[split] for split in SPLITS},
            files=files,
            dmx_version=dmx.__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        differences = [lacking(self.manifest, self._classes()), *self._remarks]
        self.manifest = replace(self.manifest, partial="; ".join(d for d in differences if d))
        write_atomic(self._partial / MANIFEST_FILE, self.manifest.to_json())
        if self.folder.exists():
            old = self.folder.with_name(f".{self.folder.name}.partial-old-{os.getpid()}")
            self.folder.rename(old)
            self._partial.rename(self.folder)
            shutil.rmtree(old)
        else:
            self._partial.rename(self.folder)
        fsync_path(self.folder.parent)

    def _classes(self) -> dict[str, list[int]]:
        """Examples of each class, by stored split.

        Raises:
            DataError: all examples have one label.
        """
        number = self.manifest.num_classes
        counts = {
            split: np.bincount(np.concatenate(parts), minlength=number)
            for split, parts in self._labels.items()
        }
        total = np.sum([*counts.values()], axis=0)
        if np.count_nonzero(total) == 1:
            label = int(total.argmax())
            raise DataError(
                f"All {total.sum():,} examples of {self.manifest.task} have label {label}; the "
                "source lacks the other classes, or its labels are no labels."
            )
        return {split: found.tolist() for split, found in counts.items()}

    def _save(self, name: str, array: npt.NDArray[Any], files: dict[str, dict[str, Any]]) -> None:
        path = self._partial / name
        np.save(path, array, allow_pickle=False)
        fsync_path(path)
        files[name] = _entry(path, sha256_file(path))


def _suffix(side: int) -> str:
    return f"_{side}" if side else ""


def _entry(path: Path, sha256: str) -> dict[str, Any]:
    stat = path.stat()
    return {
        "bytes": stat.st_size,
        "sha256": sha256,
        "quick": quick_checksum(path),
        "mtime_ns": stat.st_mtime_ns,
    }
