"""Retrieval from lra_release: tsv_data/new_aan_pairs.{train,eval,test}.tsv, pairs of papers."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dmx.data.progress import progress
from dmx.data.readers.base import READERS, Reader, Request
from dmx.data.readers.text import encode
from dmx.data.sources import Source, without_bom
from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError
from dmx.tasks import Task

FILES = {
    "new_aan_pairs.train.tsv": "train",
    "new_aan_pairs.eval.tsv": "dev",
    "new_aan_pairs.test.tsv": "test",
}
NUM_COLUMNS = 5
_FOLDERS = ("lra_release/lra_release/tsv_data", "lra_release/tsv_data", "tsv_data", "")
_MAX_LINE_BYTES = 64 << 20
_LABELS = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
_REPR = (b"b'", b'b"')

Pair = tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16], int]


def parse(stream: IO[bytes], where: str) -> Iterator[Pair]:
    """(ids of the first text [L], of the second [M], label) per line.

    The text columns hold the Python repr of bytes (`b'...'` with escapes), and the reference feeds
    the characters of that repr to the model; so does this. No quoting is processed.

    Raises:
        DataError: a line has other columns, an unknown label, an empty text, or is not UTF-8.
    """
    number = 0
    stream = without_bom(stream, where)
    while line := stream.readline(_MAX_LINE_BYTES):
        number += 1
        at = f"{where}, line {number}"
        if len(line) == _MAX_LINE_BYTES:
            raise DataError(f"{at}: longer than {_MAX_LINE_BYTES >> 20} MiB.")
        columns = line.rstrip(b"\r\n").split(b"\t")
        if columns == [b""] or (number == 1 and columns[0] == b"label"):
            continue
        if len(columns) == NUM_COLUMNS - 2:
            raise DataError(f"{at}: the ids of two papers and not their texts, which are needed.")
        if len(columns) != NUM_COLUMNS:
            raise DataError(f"{at}: {len(columns)} columns instead of {NUM_COLUMNS}.")
        label = _LABELS.get(columns[0])
        if label is None:
            raise DataError(f"{at}: label {columns[0][:20]!r} is neither 0.0 nor 1.0.")
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{at}: not UTF-8 ({error.reason}).") from error
        first, second = encode(columns[3]), encode(columns[4])
        if not (len(first) and len(second)):
            raise DataError(f"{at}: an empty text.")
        yield first, second, label


def _is_repr(ids: npt.NDArray[np.uint16]) -> bool:
    return (ids[:2] - 1).astype(np.uint8).tobytes() in _REPR


def _find(_: Task, source: Source) -> str | None:
    return source.locate(_FOLDERS, next(iter(FILES)))


def _describe(request: Request) -> dict[str, Any]:
    source, root = request.found
    return {
        "origin": f"ACL Anthology Network pairs of the LRA release, {source.describe(root)}",
        "class_names": ("unrelated", "linked"),
        "dtype": "uint16",
        "licence": "ACL Anthology Network, research use; LRA release Apache 2.0",
    }


def _fill(request: Request, writer: StoreWriter) -> None:
    source, root = request.found
    published = True
    with progress("retrieval", 0, "pairs") as advance:
        for name, stream in source.open([posixpath.join(root, name) for name in FILES]):
            split = FILES[posixpath.basename(name)]
            for first, second, label in parse(stream, source.describe(name)):
                writer.add(split, first, label, second)
                published = published and _is_repr(first) and _is_repr(second)
                advance(1)
    if not published:
        writer.remark("decoded texts")  # published are reprs of bytes, b'...'


READERS.register("lra-retrieval")(
    Reader(
        name="lra-retrieval",
        families=("retrieval",),
        find=_find,
        expects="tsv_data/new_aan_pairs.{train,eval,test}.tsv",
        describe=_describe,
        fill=_fill,
        address="https://storage.googleapis.com/long-range-arena/lra_release.gz",
    )
)
