"""The official archives: text from IMDB, retrieval from AAN, image from CIFAR-10."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dmx.data.prepare import Reader, Request, register
from dmx.data.sources import Source, without_bom
from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError
from dmx.tasks import Task
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

_SENTIMENTS = ("neg", "pos")
PER_CLASS = 12500
_REVIEW_FILE = re.compile(r"\d+_\d+\.txt")


def _tfds_key(split: str, label: str, name: str) -> bytes:
    """TFDS sorts its examples by the MD5 of the split's name and the path in the archive."""
    return hashlib.md5(f"{split}aclImdb/{split}/{label}/{name}".encode()).digest()


def _fill_text(request: Request, writer: StoreWriter) -> None:
    """All reviews, each split in TFDS order; dev is test, as in LRA."""
    source = request.source
    found: dict[str, tuple[str, int, bytes]] = {}
    for split in ("train", "test"):
        for label, folder in enumerate(_SENTIMENTS):
            at = f"{split}/{folder}"
            names = [name for name in source.files(at) if _REVIEW_FILE.fullmatch(name)]
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
        if count != len(_SENTIMENTS) * PER_CLASS:
            raise DataError(
                f"{source.path} has {count:,} reviews for {split} instead of "
                f"{len(_SENTIMENTS) * PER_CLASS:,}; it is incomplete or not IMDB."
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
        describe={
            "origin": "IMDB reviews (aclImdb_v1)",
            "class_names": _SENTIMENTS,
            "dtype": "uint16",
            "parameters": {"max_ids": MAX_TEXT_IDS, "order": "TFDS"},
            "licence": "no licence stated; research use, cite Maas et al. 2011",
        },
        fill=_fill_text,
        address="https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        checksum="md5:7c2ac02c03563afcf9b574c7e56c153a",
    )
)

# -- retrieval ----------------------------------------------------------------------------------

_PAIR_FILES = {
    "train": "new_aan_pairs.train.tsv",
    "dev": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
_PAIR_COLUMNS = 5
_PAIR_FOLDERS = ("lra_release/lra_release/tsv_data", "lra_release/tsv_data", "tsv_data", "")
_MAX_LINE_BYTES = 64 << 20
_PAIR_LABELS = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
_REPR = (b"b'", b'b"')


def _parse_pairs(stream: IO[bytes], where: str) -> Iterator[tuple[bytes, bytes, int]]:
    """(first text, second text, label) per line.

    The text columns hold the Python repr of bytes (`b'...'` with escapes), and the reference feeds
    the characters of that repr to the model; so does this. No quoting is processed.
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
        if len(columns) == _PAIR_COLUMNS - 2:
            raise DataError(f"{at}: the ids of two papers and not their texts, which are needed.")
        if len(columns) != _PAIR_COLUMNS:
            raise DataError(f"{at}: {len(columns)} columns instead of {_PAIR_COLUMNS}.")
        label = _PAIR_LABELS.get(columns[0])
        if label is None:
            raise DataError(f"{at}: label {columns[0][:20]!r} is neither 0.0 nor 1.0.")
        _check_utf8(line, at)
        if not (columns[3] and columns[4]):
            raise DataError(f"{at}: an empty text.")
        yield columns[3], columns[4], label


def _fill_pairs(request: Request, writer: StoreWriter) -> None:
    published = True
    with progress("retrieval", 0, "pairs") as advance:
        for split, stream, where in request.files(_PAIR_FILES):
            for first, second, label in _parse_pairs(stream, where):
                writer.add(split, encode(first), label, encode(second))
                published = published and first.startswith(_REPR) and second.startswith(_REPR)
                advance(1)
    if not published:
        writer.remark("decoded texts")  # published are reprs of bytes, b'...'


register(
    Reader(
        name="lra-retrieval",
        families=("retrieval",),
        find=lambda _, source: source.locate(_PAIR_FOLDERS, _PAIR_FILES["train"]),
        expects="tsv_data/new_aan_pairs.{train,eval,test}.tsv",
        describe={
            "origin": "ACL Anthology Network pairs of the LRA release",
            "class_names": ("unrelated", "linked"),
            "dtype": "uint16",
            "licence": "ACL Anthology Network, research use; LRA release Apache 2.0",
        },
        fill=_fill_pairs,
        address="https://storage.googleapis.com/long-range-arena/lra_release.gz",
    )
)

# -- image --------------------------------------------------------------------------------------

BATCHES = (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")
PER_BATCH = 10000
PIXELS = 1024
NUM_TRAIN = 45000
_OBJECTS = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_WEIGHTS = (np.float32(0.2989), np.float32(0.5870), np.float32(0.1140))
"""tf.image.rgb_to_grayscale; ITU-R BT.601 luma, with its first weight cut to four digits."""


def tfds_order(count: int) -> npt.NDArray[np.int64]:
    """Training images in the order in which TFDS stores them: by MD5 of "train" + index."""
    keys = [hashlib.md5(f"train{index}".encode()).digest() for index in range(count)]
    return np.array(sorted(range(count), key=keys.__getitem__), np.int64)


def tf_grey(*planes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Grey of red, green, blue: trunc(255.5 * (0.2989 R + 0.5870 G + 0.1140 B)) in float32.

    PIL's convert("L") rounds instead, which makes a quarter of the pixels one larger.
    """
    scale = np.float32(1 / 255)
    red, green, blue = (
        c.astype(np.float32) * scale * w for c, w in zip(planes, _WEIGHTS, strict=True)
    )
    return np.asarray(((red + green) + blue) * np.float32(255.5)).astype(np.uint8)


def _batch(content: bytes, where: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """(grey pixels [10000, 1024], labels [10000]) of a batch."""
    row = 1 + 3 * PIXELS
    if len(content) != PER_BATCH * row:
        raise DataError(
            f"{where} has {len(content):,} bytes, not {PER_BATCH * row:,}; it is truncated or no "
            "CIFAR-10 batch."
        )
    rows = np.frombuffer(content, np.uint8).reshape(PER_BATCH, row)
    if rows[:, 0].max() > 9:
        raise DataError(f"{where}: label {rows[:, 0].max()} is no CIFAR-10 class.")
    return tf_grey(*np.split(rows[:, 1:], 3, axis=1)), rows[:, 0]


def _find_image(_: Task, source: Source) -> str | None:
    root = source.locate(("cifar-10-batches-bin", ""), f"{BATCHES[0]}.bin")
    return source.locate(("cifar-10-batches-py", ""), BATCHES[0]) if root is None else root


def _describe_images(request: Request) -> dict[str, Any]:
    source = request.source
    if not source.has(f"{BATCHES[0]}.bin"):
        raise DataError(
            f"{source.path} is CIFAR-10's python version, whose files are pickles, which dmx does "
            "not read; give its binary version (cifar-10-binary.tar.gz), or convert it: "
            f"python scripts/convert_pickles.py {source.given} OUT"
        )
    return {
        "origin": "CIFAR-10 (binary version)",
        "class_names": _OBJECTS,
        "dtype": "uint8",
        "parameters": {"grey": "tensorflow", "order": "TFDS"},
        "licence": "no licence stated; cite Krizhevsky 2009",
    }


def _fill_images(request: Request, writer: StoreWriter) -> None:
    """45,000 / 5,000 / 10,000 images.

    The reference's train file has 45,002 examples, about 95 of them twice and 93 missing, because
    its loop over a shuffled, repeated stream ends late; this is the split that it meant.
    """
    source = request.source
    names = [f"{batch}.bin" for batch in BATCHES]
    batches = {name: _batch(c, source.describe(name)) for name, c in source.read_small(names)}
    for name in names:
        writer.add_rows(None, *batches[name])
    order = tfds_order(5 * PER_BATCH)
    writer.place("train", order[:NUM_TRAIN])
    writer.place("dev", order[NUM_TRAIN:])
    writer.place("test", np.arange(len(order), len(order) + PER_BATCH))


register(
    Reader(
        name="lra-image",
        families=("image",),
        find=_find_image,
        expects="cifar-10-batches-bin/data_batch_1.bin",
        describe=_describe_images,
        fill=_fill_images,
        address="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        checksum="md5:c32a1d4ab5d03f1284b67883e8d87530",
    )
)
