"""sample-digits: scikit-learn's 1,797 handwritten digits, 8 x 8 enlarged to 32 x 32, for image."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dmx.data.build import write_store
from dmx.data.manifest import Manifest
from dmx.data.samples.base import SAMPLES, Sample, package_files, stratified
from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError
from dmx.tasks import task_for

NAME = "sample-digits"
PACKAGE = "scikit-learn"
FILE = "sklearn/datasets/data/digits.csv.gz"
SMALL_SIDE = 8
ENLARGE = 4
SHARES = {"train": 1200, "dev": 297, "test": 300}
LICENCE = "UCI Optical Recognition of Handwritten Digits, CC BY 4.0; package: BSD-3"


def read_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(pixels [1797, 1024] 0..255, labels [1797]); needs the package, does not import it.

    Raises:
        DataError: scikit-learn is missing or its file is not what it was.
    """
    (path,) = package_files(PACKAGE, "", FILE, ".csv.gz")
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); reinstall {PACKAGE}.") from error
    if table.shape != (sum(SHARES.values()), SMALL_SIDE**2 + 1) or table.min() < 0:
        raise DataError(f"{path} has the shape {table.shape}, which is not the digits set.")
    small = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8)
    small = small.reshape(-1, SMALL_SIDE, SMALL_SIDE)
    large = small.repeat(ENLARGE, axis=1).repeat(ENLARGE, axis=2)
    return large.reshape(len(large), -1), table[:, -1].astype(np.int64)


def prepare(folder: Path) -> None:
    """Write the sample's store at `folder` unless it exists; about a second."""
    task = task_for("image")
    manifest = Manifest(
        task=task.name,
        data_name=NAME,
        origin="handwritten digits of scikit-learn, 8 x 8 enlarged four times",
        is_sample=True,
        num_classes=10,
        class_names=tuple("0123456789"),
        max_length=task.max_length,
        vocab_size=task.vocab_size,
        dtype="uint8",
        parameters={"package": PACKAGE, "enlarge": ENLARGE},
        licence=LICENCE,
    )

    def fill(writer: StoreWriter) -> None:
        pixels, labels = read_digits()
        groups = [[row.tobytes() for row in pixels[labels == label]] for label in range(10)]
        for split, examples in stratified(groups, SHARES, NAME).items():
            rows = np.stack([np.frombuffer(content, np.uint8) for content, _ in examples])
            writer.add_rows(split, rows, [label for _, label in examples])

    write_store(folder, manifest, fill)


SAMPLES.register(NAME)(
    Sample(
        name=NAME,
        task="image",
        what="1,797 handwritten digits, enlarged to 32 x 32 (not CIFAR-10)",
        licence=LICENCE,
        prepare=prepare,
    )
)
