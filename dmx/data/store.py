"""Read a store: memory-mapped tokens, labels and splits, checked against the manifest at open.

Files: `tokens.bin` (and `tokens_1.bin` of a paired task), the ids of all examples one after another
in the order of the source; `offsets.npy` [N + 1], where each begins and ends; `labels.npy` [N];
`<split>.index.npy`, the numbers of the split's examples in the split's order; `manifest.json`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmx.data.manifest import DTYPES, Manifest, read_manifest
from dmx.errors import DataError
from dmx.storage.files import SMALL_BYTES, quick_checksum, sha256_file, write_atomic

log = logging.getLogger(__name__)
VERIFIED_FILE = "verified.json"
"""Modification times under which a copied store passed a full check, so that it runs only once."""


class _Side:
    """The sequences of all examples, or the second ones of pairs."""

    def __init__(self, folder: Path, suffix: str, dtype: np.dtype[Any], count: int) -> None:
        self.offsets = _load(folder / f"offsets{suffix}.npy")
        path = folder / f"tokens{suffix}.bin"
        self.tokens: npt.NDArray[Any] = np.zeros(0, dtype)
        if path.stat().st_size:  # an empty file cannot be mapped
            # A plain view: the pages stay mapped, without memmap's cost per slice.
            self.tokens = np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
        steps = np.diff(self.offsets)
        consistent = (
            len(self.offsets) == count + 1
            and self.offsets[0] == 0
            and self.offsets[-1] == len(self.tokens)
            and (not steps.size or steps.min() >= 0)
        )
        if not consistent:
            raise DataError(f"{path} does not match its offsets; {_again(folder)}.")
        self.fixed = int(steps[0]) if steps.size and (steps == steps[0]).all() else None
        """The length of all sequences, where they have one."""


class Split:
    """One split of a store. Pickling it sends the path, not the data.

    Attributes:
        name: train, dev or test.
        paired: each example has a second sequence.
        labels: int64 [N].
        lengths, lengths_1: int64 [N], stored tokens of the first and the second sequence.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self.paired = store.manifest.paired
        self._folder = store.folder
        self._sides = store.sides
        path = store.folder / f"{name}.index.npy"
        self._index = np.asarray(_load(path))
        count = len(store.labels)
        if self._index.size and not 0 <= self._index.min() <= self._index.max() < count:
            raise DataError(f"{path} names examples that are not there; {_again(store.folder)}.")
        if len(self._index) != store.manifest.splits[name]:
            raise DataError(
                f"Split {name} of {store.folder} has {len(self._index)} examples, not "
                f"{store.manifest.splits[name]}; {_again(store.folder)}."
            )
        self.labels: npt.NDArray[np.int64] = store.labels[self._index]
        self.lengths = self._lengths(0)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def lengths_1(self) -> npt.NDArray[np.int64]:
        return self._lengths(1)

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

    def _lengths(self, side: int) -> npt.NDArray[np.int64]:
        offsets = self._sides[side].offsets
        return np.asarray(offsets[self._index + 1] - offsets[self._index])

    def _slice(self, side: int, index: int) -> npt.NDArray[Any]:
        row = self._index[index]
        tokens, offsets = self._sides[side].tokens, self._sides[side].offsets
        return tokens[offsets[row] : offsets[row + 1]]

    def _gather(self, side: int, indices: npt.ArrayLike, length: int) -> npt.NDArray[Any]:
        rows = self._index[np.asarray(indices, dtype=np.int64)]
        tokens, offsets = self._sides[side].tokens, self._sides[side].offsets
        fixed = self._sides[side].fixed
        longest = int((offsets[rows + 1] - offsets[rows]).max(initial=0))
        if longest > length:
            raise DataError(
                f"{self._folder} has an example of {longest:,} tokens in split {self.name}, more "
                f"than the {length:,} that are read; nothing is cut."
            )
        if fixed == length:
            return np.asarray(tokens.reshape(-1, length)[rows])
        out = np.zeros((len(rows), length), tokens.dtype)
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

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 [N], of all examples in the order of the source."""
        return _load(self.folder / "labels.npy")

    @cached_property
    def sides(self) -> list[_Side]:
        """The sequences of all examples; of pairs the first ones, then the second."""
        suffixes = ["", "_1"] if self.manifest.paired else [""]
        dtype = DTYPES[self.manifest.dtype]
        return [_Side(self.folder, suffix, dtype, len(self.labels)) for suffix in suffixes]

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
            self._splits[name] = Split(self, name)
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
    for split in manifest.splits:
        store.split(split)
    return store


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}; it is damaged or was edited: {_again(path.parent)}.")


def _again(folder: Path) -> str:
    return f"delete {folder} and prepare it again"


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
        again = _again(path.parent)
        raise DataError(f"{path} is not a readable array ({error}); {again}.") from error
    if array.dtype != np.int64 or array.ndim != 1:
        raise DataError(f"{path} is not a list of int64; {_again(path.parent)}.")
    return array.view(np.ndarray)


def _reopen_split(folder: Path, name: str) -> Split:
    return open_store(folder).split(name)
