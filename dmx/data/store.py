"""Read a store: memory-mapped tokens, offsets and labels, checked against the manifest at open."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmx.data.build import write_store
from dmx.data.manifest import Manifest, read_manifest
from dmx.data.store_writer import StoreWriter
from dmx.data.token_file import DTYPES
from dmx.errors import DataError
from dmx.storage.files import SMALL_BYTES, quick_checksum, sha256_file, write_atomic

__all__ = ["Manifest", "Split", "Store", "StoreWriter", "open_store", "write_store"]

log = logging.getLogger(__name__)
VERIFIED_FILE = "verified.json"
"""Modification times under which a copied store passed a full check, so that it runs only once."""


class Split:
    """One split of a store. Pickling it sends the path, not the data.

    Attributes:
        name: train, dev or test.
        paired: each example has a second sequence.
        labels: int64 [N], memory-mapped.
        lengths: int64 [N], stored tokens per example (of the first sequence).
    """

    def __init__(self, folder: Path, name: str, stored: str, manifest: Manifest) -> None:
        self.name = name
        self.paired = manifest.paired
        self._folder = folder
        self._dtype = DTYPES[manifest.dtype]
        self.labels = _load(folder / f"{stored}.labels.npy")
        self._sides = [self._open(stored, "")]
        if manifest.paired:
            self._sides.append(self._open(stored, "_1"))
        self.lengths: npt.NDArray[np.int64] = np.diff(self._sides[0][1])
        self._fixed = [self._fixed_length(side) for side in self._sides]

    def _open(self, stored: str, suffix: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        offsets = _load(self._folder / f"{stored}.offsets{suffix}.npy")
        path = self._folder / f"{stored}.tokens{suffix}.bin"
        tokens: npt.NDArray[Any] = np.zeros(0, self._dtype)
        if path.stat().st_size:  # an empty file cannot be mapped
            # A plain view: the pages stay mapped, without memmap's cost per slice.
            tokens = np.memmap(path, dtype=self._dtype, mode="r").view(np.ndarray)
        steps = np.diff(offsets)
        consistent = (
            len(offsets) == len(self.labels) + 1
            and offsets[0] == 0
            and offsets[-1] == len(tokens)
            and (not steps.size or steps.min() >= 0)
        )
        if not consistent:
            raise DataError(
                f"{path} does not match its offsets; delete {self._folder} and prepare it again."
            )
        return tokens, offsets

    @staticmethod
    def _fixed_length(side: tuple[npt.NDArray[Any], npt.NDArray[np.int64]]) -> int | None:
        steps = np.diff(side[1])
        return int(steps[0]) if steps.size and (steps == steps[0]).all() else None

    def __len__(self) -> int:
        return len(self.labels)

    def tokens(self, index: int) -> npt.NDArray[Any]:
        """The ids [L] of one example, unpadded: a view of the file, no copy."""
        return self._slice(0, index)

    def tokens_1(self, index: int) -> npt.NDArray[Any]:
        """The second sequence [M] of one example of a paired task."""
        return self._slice(1, index)

    def gather(self, indices: npt.ArrayLike, length: int) -> npt.NDArray[Any]:
        """Examples `indices` [B] as [B, length], zero-padded, in the stored dtype.

        Raises:
            DataError: one is longer; none is cut.
        """
        return self._gather(0, indices, length)

    def gather_1(self, indices: npt.ArrayLike, length: int) -> npt.NDArray[Any]:
        """The same for the second sequence of a paired task."""
        return self._gather(1, indices, length)

    @property
    def lengths_1(self) -> npt.NDArray[np.int64]:
        """int64 [N], stored tokens of the second sequence of a paired task."""
        return np.diff(self._sides[1][1])

    def _slice(self, side: int, index: int) -> npt.NDArray[Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        tokens, offsets = self._sides[side]
        index %= len(self)
        return tokens[offsets[index] : offsets[index + 1]]

    def _gather(self, side: int, indices: npt.ArrayLike, length: int) -> npt.NDArray[Any]:
        rows = np.asarray(indices, dtype=np.int64)
        tokens, offsets = self._sides[side]
        fixed = self._fixed[side]
        longest = int((offsets[rows + 1] - offsets[rows]).max(initial=0))
        if longest > length:
            raise DataError(
                f"{self._folder} has an example of {longest:,} tokens in split {self.name}, more "
                f"than the {length:,} that are read; nothing is cut."
            )
        if fixed == length:
            return np.asarray(tokens.reshape(-1, length)[rows])
        out = np.zeros((len(rows), length), self._dtype)
        if fixed is not None:
            out[:, :fixed] = tokens.reshape(-1, fixed)[rows]
            return out
        starts = offsets[rows].tolist()
        stops = offsets[rows + 1].tolist()
        # One slice copy per row is faster than one fancy index over all tokens.
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            out[row, : stop - start] = tokens[start:stop]
        return out

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen_split, (self._folder, self.name)


class Store:
    """A prepared data set. Pickling it sends the path, not the data; workers map the same pages."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """The split "train", "dev" or "test".

        Raises:
            DataError: the store has no such split, or its files do not fit together.
        """
        if name not in self.manifest.splits:
            raise DataError(
                f"{self.folder} has no split {name!r}; it has {', '.join(self.manifest.splits)}."
            )
        if name not in self._splits:
            stored = self.manifest.aliases.get(name, name)
            split = Split(self.folder, name, stored, self.manifest)
            if len(split) != self.manifest.splits[name]:
                raise DataError(
                    f"Split {name} of {self.folder} has {len(split)} examples, not "
                    f"{self.manifest.splits[name]}; delete the folder and prepare it again."
                )
            self._splits[name] = split
        return self._splits[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.folder,)


def open_store(folder: Path, *, verify: bool = False) -> Store:
    """Open the store in `folder` and check that it is what was written.

    Always checked: the manifest (version, its own checksum), each file's size, a sampled checksum
    (all of a file up to 4 MiB, 64 blocks of a larger one), that offsets fit tokens and labels. A
    file whose modification time is not the recorded one was copied or edited: then, once, its
    whole SHA-256 is checked. With `verify` that is done for every file, whatever its time.

    Raises:
        DataError: a file is missing, torn or edited; the sentence names it and the remedy.
    """
    folder = Path(folder).absolute()
    manifest = read_manifest(folder)
    trusted = _trusted_times(folder)
    checked: dict[str, int] = {}
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            stat = path.stat()
            if stat.st_size != entry["bytes"]:
                raise _damaged(path, f"has {stat.st_size} bytes instead of {entry['bytes']}")
            known = stat.st_mtime_ns in (entry["mtime_ns"], trusted.get(name))
            if not verify and quick_checksum(path) != entry["quick"]:
                raise _damaged(path, "has another content than when it was written")
            if verify or not known:
                whole = verify or stat.st_size > SMALL_BYTES  # a small one was just read whole
                if whole and sha256_file(path) != entry["sha256"]:
                    raise _damaged(path, "has another content than when it was written")
                checked[name] = stat.st_mtime_ns
        except FileNotFoundError as error:
            raise _damaged(path, "is missing") from error
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    if checked and not verify:
        _remember(folder, {**trusted, **checked})
    store = Store(folder, manifest)
    for split in manifest.stored_splits:
        store.split(split)
    return store


def _damaged(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} {what}; it is damaged or was edited: delete {path.parent} and prepare it again."
    )


def _trusted_times(folder: Path) -> Mapping[str, int]:
    try:
        times = json.loads((folder / VERIFIED_FILE).read_bytes())
        return {str(name): int(time) for name, time in times.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # only a cache: without it the files are checked again


def _remember(folder: Path, times: Mapping[str, int]) -> None:
    try:
        write_atomic(folder / VERIFIED_FILE, json.dumps(times).encode())
    except OSError as error:
        log.debug("cannot note the check in %s: %s", folder, error)


def _load(path: Path) -> npt.NDArray[np.int64]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a readable array ({error}); delete {path.parent} and prepare it again."
        ) from error
    if array.dtype != np.int64 or array.ndim != 1:
        raise DataError(
            f"{path} is not a list of int64; delete {path.parent} and prepare it again."
        )
    return array.view(np.ndarray)


def _reopen_split(folder: Path, name: str) -> Split:
    return open_store(folder).split(name)
