"""One growing token file of a store: appended rows or rows at given places, lengths, checksum."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dmx.storage.files import sha256_file

DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2")}
"""Token types of a store by their name in the manifest."""


class TokenFile:
    """Either `append` rows in order, or `allocate` once and `put` rows anywhere."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.dtype = dtype
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._digest: Any = hashlib.sha256()
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Append rows [N, L]."""
        content = np.ascontiguousarray(rows, dtype=self.dtype).tobytes()
        self._file.write(content)
        self._digest.update(content)
        self._lengths.append(np.full(len(rows), rows.shape[1], np.int64))

    def allocate(self, count: int, length: int) -> None:
        """Announce `count` rows of `length` tokens, to be `put`."""
        self._digest = None
        self._lengths = [np.full(count, length, np.int64)]

    def put(self, positions: npt.NDArray[np.int64], rows: npt.NDArray[Any]) -> None:
        """Write rows [N, L] at `positions` [N]."""
        assert rows.shape[1] == self._lengths[0][0]
        content = np.ascontiguousarray(rows, dtype=self.dtype)
        stride = content.shape[1] * self.dtype.itemsize
        # Not a memory map: on a full disk that is a SIGBUS, this is an error.
        for position, row in zip(positions.tolist(), content, strict=True):
            view, place = memoryview(row).cast("B"), position * stride
            while view:
                count = os.pwrite(self._file.fileno(), view, place)
                view, place = view[count:], place + count

    def finish(self) -> str:
        """Flush to the disk and close; the SHA-256 of the content, in hex."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return sha256_file(self.path) if self._digest is None else str(self._digest.hexdigest())

    def close(self) -> None:
        """Close without keeping anything."""
        self._file.close()

    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 [N + 1]: row n holds tokens offsets[n] to offsets[n + 1]."""
        lengths = np.concatenate([np.zeros(1, np.int64), *self._lengths])
        return np.cumsum(lengths, dtype="<i8")
