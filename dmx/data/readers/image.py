"""Image from CIFAR-10, python or binary version, folder or archive: grey pixels, TFDS's order."""

from __future__ import annotations

import hashlib
import io
import posixpath
from functools import cache

import numpy as np
import numpy.typing as npt

from dmx.data.build import write_store
from dmx.data.grey import tf_grey
from dmx.data.manifest import Manifest
from dmx.data.readers.base import READERS, Reader, Request
from dmx.data.sources import Source
from dmx.data.store_writer import StoreWriter
from dmx.data.unpickle import PickledArray, load_pickle
from dmx.errors import DataError
from dmx.tasks import Task

FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", "")
BATCHES = (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")
PER_BATCH = 10000
PIXELS = 1024
NUM_TRAIN = 45000
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
Batch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]


@cache
def tfds_order(count: int) -> npt.NDArray[np.int64]:
    """Training images in the order in which TFDS stores them: by MD5 of "train" + index."""
    keys = [hashlib.md5(f"train{index}".encode()).digest() for index in range(count)]
    return np.array(sorted(range(count), key=keys.__getitem__), np.int64)


def python_batch(content: bytes, where: str) -> Batch:
    """(RGB [10000, 3072], labels [10000]) of a batch of the python version.

    Raises:
        DataError: it is no such pickle.
    """
    value = load_pickle(io.BytesIO(content), where)
    rgb = value.get(b"data") if isinstance(value, dict) else None
    labels = value.get(b"labels") if isinstance(value, dict) else None
    if not isinstance(rgb, PickledArray) or not isinstance(labels, list):
        raise DataError(f"{where} is no CIFAR-10 batch: it has no data and labels.")
    if rgb.value.shape != (PER_BATCH, 3 * PIXELS) or rgb.value.dtype != np.uint8:
        raise DataError(f"{where}: data are {rgb.value.shape} {rgb.value.dtype}, not CIFAR-10.")
    if len(labels) != PER_BATCH or not all(isinstance(x, int) and 0 <= x < 10 for x in labels):
        raise DataError(f"{where}: the labels are not {PER_BATCH} numbers 0..9.")
    return rgb.value, np.array(labels, np.uint8)


def binary_batch(content: bytes, where: str) -> Batch:
    """(RGB [10000, 3072], labels [10000]) of a batch of the binary version.

    Raises:
        DataError: the size or a label is not CIFAR-10's.
    """
    record = 1 + 3 * PIXELS
    if len(content) != PER_BATCH * record:
        raise DataError(
            f"{where} has {len(content)} bytes instead of {PER_BATCH * record}; it is truncated or "
            "no CIFAR-10 batch."
        )
    rows = np.frombuffer(content, np.uint8).reshape(PER_BATCH, record)
    if rows[:, 0].max() > 9:
        raise DataError(f"{where} has label {rows[:, 0].max()}, so it is no CIFAR-10 batch.")
    return rows[:, 1:], rows[:, 0]


def grey(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pixels [N, 1024] of planes [N, 3072] (all red, all green, all blue; rows of 32)."""
    planes = rgb.reshape(-1, 3, PIXELS)
    return tf_grey(planes[:, 0], planes[:, 1], planes[:, 2])


def _find(source: Source) -> tuple[str, str] | None:
    for suffix in ("", ".bin"):
        root = source.locate(FOLDERS, f"{BATCHES[0]}{suffix}")
        if root is not None:
            return root, suffix
    return None


def fits(task: Task, source: Source | None) -> bool:
    """Whether the source has data_batch_1 of either version."""
    return source is not None and _find(source) is not None


def prepare(request: Request) -> None:
    """Write the store: 45,000 / 5,000 / 10,000 images.

    The reference's train file has 45,002 examples, about 95 of them twice and 93 missing, because
    its loop over a shuffled, repeated stream ends late; this is the split that it meant.
    """
    source = request.source
    assert source is not None
    found = _find(source)
    assert found is not None
    root, suffix = found
    read = binary_batch if suffix else python_batch

    def fill(writer: StoreWriter) -> None:
        names = [posixpath.join(root, f"{batch}{suffix}") for batch in BATCHES]
        batches = {n: read(c, source.describe(n)) for n, c in source.read_small(names)}
        pixels = np.concatenate([grey(batches[name][0]) for name in names])
        labels = np.concatenate([batches[name][1] for name in names])
        order = tfds_order(5 * PER_BATCH)
        test = np.arange(len(order), len(pixels))
        parts = {"train": order[:NUM_TRAIN], "dev": order[NUM_TRAIN:], "test": test}
        for split, rows in parts.items():
            writer.add_rows(split, pixels[rows], labels[rows])

    manifest = Manifest.for_task(
        request.task,
        data_name="lra-image",
        origin=f"CIFAR-10 ({'binary' if suffix else 'python'} version), {source.describe(root)}",
        class_names=CLASSES,
        dtype="uint8",
        parameters={"grey": "tensorflow", "order": "TFDS"},
        licence="no licence stated; cite Krizhevsky 2009",
    )
    write_store(request.folder, manifest, fill, replace_existing=request.force)


READERS.register("lra-image")(
    Reader(
        name="lra-image",
        families=("image",),
        fits=fits,
        expects="cifar-10-batches-py/data_batch_1 or cifar-10-batches-bin/data_batch_1.bin",
        prepare=prepare,
        address="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        address_checksum="md5:c58f30108f718f92721af3b95e74349a",
    )
)
