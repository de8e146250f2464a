"""How the reference splits Pathfinder sets: one seeded shuffle, cut at 80 % and 90 %."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError

SPLIT_SEED = 2222
LEAST_IMAGES = 10


def pathfinder_split(count: int) -> dict[str, npt.NDArray[np.int64]]:
    """Split -> the images in it, in order.

    The reference seeds Python's generator once and shuffles one set after another, so all but the
    first of its splits depend on which sets it made before; here every set has a fresh generator.

    Raises:
        DataError: fewer than 10 images leave dev or test empty.
    """
    if count < LEAST_IMAGES:
        raise DataError(f"{count} images are too few to split; at least {LEAST_IMAGES} are needed.")
    order = list(range(count))
    random.Random(SPLIT_SEED).shuffle(order)
    first, second = int(count * 0.8), int(count * 0.9)
    parts = {"train": order[:first], "dev": order[first:second], "test": order[second:]}
    return {split: np.array(part, np.int64) for split, part in parts.items()}


class SplitPlacer:
    """Puts images that come in the set's own order at their shuffled places in the store.

    Args:
        writer: a fresh one. count: images in the set. length: pixels per image.
    """

    def __init__(self, writer: StoreWriter, count: int, length: int) -> None:
        self._writer = writer
        self._names: list[str] = []
        self._split = np.zeros(count, np.int64)
        self._place = np.zeros(count, np.int64)
        for number, (split, members) in enumerate(pathfinder_split(count).items()):
            writer.allocate(split, len(members), length)
            self._names.append(split)
            self._split[members] = number
            self._place[members] = np.arange(len(members))

    def put(
        self, images: npt.NDArray[np.int64], pixels: npt.NDArray[np.uint8], labels: npt.ArrayLike
    ) -> None:
        """Store `pixels` [N, L] and `labels` [N] of the images with these numbers [N]."""
        values = np.asarray(labels)
        for number, split in enumerate(self._names):
            mine = self._split[images] == number
            if mine.any():
                self._writer.put(split, self._place[images[mine]], pixels[mine], values[mine])
