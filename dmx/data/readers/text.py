"""Text from aclImdb, the folder or aclImdb_v1.tar.gz: byte ids of 25,000 + 25,000 film reviews."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from dmx.data.readers.base import READERS, Reader, Request
from dmx.data.sources import Source
from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError
from dmx.tasks import Task

MAX_TEXT_IDS = 4000
"""The reference cuts at 4,000 ids and pads to 4,096; retrieval's too (docs/quirks.md)."""
CLASSES = ("neg", "pos")
PER_CLASS = 12500
_FOLDERS = ("aclImdb", "")
_FILE = re.compile(r"\d+_\d+\.txt")


def encode(text: bytes, limit: int = MAX_TEXT_IDS) -> npt.NDArray[np.uint16]:
    """The ids 1..256 [min(len, limit)] of UTF-8 bytes; 0 stays free for padding."""
    return np.frombuffer(text[:limit], np.uint8).astype(np.uint16) + np.uint16(1)


def decode(ids: npt.NDArray[np.integer]) -> str:
    """The text of ids 1..256; padding is dropped, bytes that are no UTF-8 become U+FFFD."""
    real = ids[ids > 0]
    return (real - 1).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def tfds_key(split: str, label: str, name: str) -> bytes:
    """TFDS sorts its examples by the MD5 of the split's name and the path in the archive."""
    return hashlib.md5(f"{split}aclImdb/{split}/{label}/{name}".encode()).digest()


def _find(_: Task, source: Source) -> str | None:
    return source.locate(_FOLDERS, "train/neg")


def _describe(request: Request) -> dict[str, Any]:
    source, root = request.found
    return {
        "origin": f"IMDB reviews (aclImdb_v1), {source.describe(root)}",
        "class_names": CLASSES,
        "dtype": "uint16",
        "parameters": {"max_ids": MAX_TEXT_IDS, "order": "TFDS"},
        "licence": "no licence stated; research use, cite Maas et al. 2011",
    }


def _fill(request: Request, writer: StoreWriter) -> None:
    """All reviews, each split in TFDS order; dev is test, as in LRA."""
    source, root = request.found
    found: dict[str, tuple[str, int, bytes]] = {}
    for split in ("train", "test"):
        for label, folder in enumerate(CLASSES):
            at = posixpath.join(root, split, folder)
            names = [name for name in source.files(at) if _FILE.fullmatch(name)]
            if not names:
                raise DataError(f"{source.describe(at)} has no reviews; the source is incomplete.")
            for name in names:
                found[posixpath.join(at, name)] = (split, label, tfds_key(split, folder, name))
    numbers: dict[str, int] = {}
    for number, (name, content) in enumerate(source.read_small(found)):
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{source.describe(name)} is not UTF-8 ({error.reason}).") from error
        if not (text := content.strip()):
            raise DataError(f"{source.describe(name)} is empty.")
        writer.add(None, encode(text), found[name][1])
        numbers[name] = number
    counts = Counter(split for split, _, _ in found.values())
    for split, count in counts.items():
        if count != len(CLASSES) * PER_CLASS:
            raise DataError(
                f"{source.describe(root)} has {count:,} reviews for {split} instead of "
                f"{len(CLASSES) * PER_CLASS:,}; it is incomplete or not IMDB."
            )
    for name, (split, _, _) in sorted(found.items(), key=lambda item: item[1][2]):
        for member in ("train",) if split == "train" else ("dev", "test"):
            writer.place(member, [numbers[name]])


READERS.register("lra-text")(
    Reader(
        name="lra-text",
        families=("text",),
        find=_find,
        expects="aclImdb/{train,test}/{neg,pos}/*.txt",
        describe=_describe,
        fill=_fill,
        address="https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        address_checksum="md5:7c2ac02c03563afcf9b574c7e56c153a",
    )
)
