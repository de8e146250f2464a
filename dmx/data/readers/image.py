"""Image from CIFAR-10's binary version, folder or archive: grey pixels, TFDS's order."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from dmx.data.prepare import Reader, Request, register
from dmx.data.sources import Source
from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError
from dmx.tasks import Task

BATCHES = (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")
PER_BATCH = 10000
PIXELS = 1024
NUM_TRAIN = 45000
CLASSES = (
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
    """(grey pixels [10000, 1024], labels [10000]) of a batch.

    Raises:
        DataError: it has another size or a label above 9.
    """
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


def _find(_: Task, source: Source) -> str | None:
    root = source.locate(("cifar-10-batches-bin", ""), f"{BATCHES[0]}.bin")
    return source.locate(("cifar-10-batches-py", ""), BATCHES[0]) if root is None else root


def _describe(request: Request) -> dict[str, Any]:
    source = request.source
    if not source.has(f"{BATCHES[0]}.bin"):
        raise DataError(
            f"{source.path} is CIFAR-10's python version, whose files are pickles, which dmx does "
            "not read; give its binary version (cifar-10-binary.tar.gz), or convert it: "
            f"python scripts/convert_pickles.py {source.given} OUT"
        )
    return {
        "origin": f"CIFAR-10 (binary version), {source.path}",
        "class_names": CLASSES,
        "dtype": "uint8",
        "parameters": {"grey": "tensorflow", "order": "TFDS"},
        "licence": "no licence stated; cite Krizhevsky 2009",
    }


def _fill(request: Request, writer: StoreWriter) -> None:
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
        find=_find,
        expects="cifar-10-batches-bin/data_batch_1.bin",
        describe=_describe,
        fill=_fill,
        address="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        checksum="md5:c32a1d4ab5d03f1284b67883e8d87530",
    )
)
