"""Byte ids of texts: film reviews (IMDB, aclImdb_v1.tar.gz) and pairs of papers (AAN)."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dmx.data.prepare import Reader, Request, register
from dmx.data.sources import without_bom
from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError
from dmx.terminal import progress

MAX_TEXT_IDS = 4000
"""The reference cuts at 4,000 ids and pads to 4,096; retrieval's too (docs/quirks.md)."""


def encode(text: bytes, limit: int = MAX_TEXT_IDS) -> npt.NDArray[np.uint16]:
    """The ids 1..256 [min(len, limit)] of UTF-8 bytes; 0 stays free for padding."""
    return np.frombuffer(text[:limit], np.uint8).astype(np.uint16) + np.uint16(1)


def decode(ids: npt.NDArray[np.integer]) -> str:
    """The text of ids 1..256; padding is dropped, bytes that are no UTF-8 become U+FFFD."""
    real = ids[ids > 0]
    return (real - 1).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def _check_utf8(content: bytes, where: str) -> None:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error.reason}).") from error


# -- text ---------------------------------------------------------------------------------------

CLASSES = ("neg", "pos")
PER_CLASS = 12500
_FILE = re.compile(r"\d+_\d+\.txt")


def _tfds_key(split: str, label: str, name: str) -> bytes:
    """TFDS sorts its examples by the MD5 of the split's name and the path in the archive."""
    return hashlib.md5(f"{split}aclImdb/{split}/{label}/{name}".encode()).digest()


def _describe_text(request: Request) -> dict[str, Any]:
    return {
        "origin": f"IMDB reviews (aclImdb_v1), {request.source.path}",
        "class_names": CLASSES,
        "dtype": "uint16",
        "parameters": {"max_ids": MAX_TEXT_IDS, "order": "TFDS"},
        "licence": "no licence stated; research use, cite Maas et al. 2011",
    }


def _fill_text(request: Request, writer: StoreWriter) -> None:
    """All reviews, each split in TFDS order; dev is test, as in LRA."""
    source = request.source
    found: dict[str, tuple[str, int, bytes]] = {}
    for split in ("train", "test"):
        for label, folder in enumerate(CLASSES):
            at = f"{split}/{folder}"
            names = [name for name in source.files(at) if _FILE.fullmatch(name)]
            if not names:
                raise DataError(f"{source.describe(at)} has no reviews; the source is incomplete.")
            for name in names:
                found[f"{at}/{name}"] = (split, label, _tfds_key(split, folder, name))
    numbers: dict[str, int] = {}
    for number, (name, content) in enumerate(source.read_small(found)):
        _check_utf8(content, source.describe(name))
        if not (text := content.strip()):
            raise DataError(f"{source.describe(name)} is empty.")
        writer.add(None, encode(text), found[name][1])
        numbers[name] = number
    for split, count in Counter(split for split, _, _ in found.values()).items():
        if count != len(CLASSES) * PER_CLASS:
            raise DataError(
                f"{source.path} has {count:,} reviews for {split} instead of "
                f"{len(CLASSES) * PER_CLASS:,}; it is incomplete or not IMDB."
            )
    for name, (split, _, _) in sorted(found.items(), key=lambda item: item[1][2]):
        for member in ("train",) if split == "train" else ("dev", "test"):
            writer.place(member, [numbers[name]])


register(
    Reader(
        name="lra-text",
        families=("text",),
        find=lambda _, source: source.locate(("aclImdb", ""), "train/neg"),
        expects="aclImdb/{train,test}/{neg,pos}/*.txt",
        describe=_describe_text,
        fill=_fill_text,
        address="https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        checksum="md5:7c2ac02c03563afcf9b574c7e56c153a",
    )
)

# -- retrieval ----------------------------------------------------------------------------------

FILES = {
    "train": "new_aan_pairs.train.tsv",
    "dev": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
NUM_COLUMNS = 5
_FOLDERS = ("lra_release/lra_release/tsv_data", "lra_release/tsv_data", "tsv_data", "")
_MAX_LINE_BYTES = 64 << 20
_LABELS = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
_REPR = (b"b'", b'b"')


def _parse(stream: IO[bytes], where: str) -> Iterator[tuple[bytes, bytes, int]]:
    """(first text, second text, label) per line.

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
        _check_utf8(line, at)
        if not (columns[3] and columns[4]):
            raise DataError(f"{at}: an empty text.")
        yield columns[3], columns[4], label


def _describe_pairs(request: Request) -> dict[str, Any]:
    return {
        "origin": f"ACL Anthology Network pairs of the LRA release, {request.source.path}",
        "class_names": ("unrelated", "linked"),
        "dtype": "uint16",
        "licence": "ACL Anthology Network, research use; LRA release Apache 2.0",
    }


def _fill_pairs(request: Request, writer: StoreWriter) -> None:
    published = True
    with progress("retrieval", 0, "pairs") as advance:
        for split, stream, where in request.files(FILES):
            for first, second, label in _parse(stream, where):
                writer.add(split, encode(first), label, encode(second))
                published = published and first.startswith(_REPR) and second.startswith(_REPR)
                advance(1)
    if not published:
        writer.remark("decoded texts")  # published are reprs of bytes, b'...'


register(
    Reader(
        name="lra-retrieval",
        families=("retrieval",),
        find=lambda _, source: source.locate(_FOLDERS, FILES["train"]),
        expects="tsv_data/new_aan_pairs.{train,eval,test}.tsv",
        describe=_describe_pairs,
        fill=_fill_pairs,
        address="https://storage.googleapis.com/long-range-arena/lra_release.gz",
    )
)
