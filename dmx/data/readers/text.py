"""Text from aclImdb, the folder or aclImdb_v1.tar.gz: byte ids of 25,000 + 25,000 film reviews."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterator

from dmx.data.build import write_store
from dmx.data.bytetext import MAX_TEXT_IDS, encode
from dmx.data.manifest import Manifest
from dmx.data.readers.base import READERS, Reader, Request
from dmx.data.sources import Source
from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError
from dmx.tasks import Task

FOLDERS = ("aclImdb", "")
CLASSES = ("neg", "pos")
SPLITS = ("train", "test")
PER_CLASS = 12500
_FILE = re.compile(r"\d+_\d+\.txt")


def tfds_key(split: str, label: str, name: str) -> bytes:
    """TFDS sorts its examples by the MD5 of the split's name and the path in the archive."""
    return hashlib.md5(f"{split}aclImdb/{split}/{label}/{name}".encode()).digest()


def reviews(source: Source, root: str) -> Iterator[tuple[str, int, bytes]]:
    """(split, label, text) of all reviews, each split in TFDS order.

    Raises:
        DataError: a folder is missing or empty, or a review is empty or not UTF-8.
    """
    found: dict[str, tuple[str, int, bytes]] = {}
    for split in SPLITS:
        for label, folder in enumerate(CLASSES):
            at = posixpath.join(root, split, folder)
            names = [name for name in source.files(at) if _FILE.fullmatch(name)]
            if not names:
                raise DataError(f"{source.describe(at)} has no reviews; the source is incomplete.")
            for name in names:
                found[posixpath.join(at, name)] = (split, label, tfds_key(split, folder, name))
    texts: dict[str, bytes] = {}
    for name, content in source.read_small(found):
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{source.describe(name)} is not UTF-8 ({error.reason}).") from error
        texts[name] = content.strip()
        if not texts[name]:
            raise DataError(f"{source.describe(name)} is empty.")
    for name, (split, label, _) in sorted(found.items(), key=lambda item: item[1][2]):
        yield split, label, texts[name]


def fits(task: Task, source: Source | None) -> bool:
    """Whether the source has train/neg."""
    return source is not None and source.locate(FOLDERS, "train/neg") is not None


def prepare(request: Request) -> None:
    """Write the store from aclImdb; dev is test, as in LRA."""
    source = request.source
    assert source is not None
    root = source.locate(FOLDERS, "train/neg")
    assert root is not None
    counts: dict[str, int] = {}

    def fill(writer: StoreWriter) -> None:
        for split, label, text in reviews(source, root):
            writer.add(split, encode(text), label)
            counts[split] = counts.get(split, 0) + 1
        for split, count in counts.items():
            if count != len(CLASSES) * PER_CLASS:
                raise DataError(
                    f"{source.describe(root)} has {count:,} reviews for {split} instead of "
                    f"{len(CLASSES) * PER_CLASS:,}; it is incomplete or not IMDB."
                )

    manifest = Manifest.for_task(
        request.task,
        data_name="lra-text",
        origin=f"IMDB reviews (aclImdb_v1), {source.describe(root)}",
        class_names=CLASSES,
        dtype="uint16",
        aliases={"dev": "test"},
        parameters={"max_ids": MAX_TEXT_IDS, "order": "TFDS"},
        licence="no licence stated; research use, cite Maas et al. 2011",
    )
    write_store(request.folder, manifest, fill, replace_existing=request.force)


READERS.register("lra-text")(
    Reader(
        name="lra-text",
        families=("text",),
        fits=fits,
        expects="aclImdb/{train,test}/{neg,pos}/*.txt",
        prepare=prepare,
        address="https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        address_checksum="md5:7c2ac02c03563afcf9b574c7e56c153a",
    )
)
