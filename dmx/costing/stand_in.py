"""Data to measure on where a task's own are not there yet: a few generated or random examples."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dmx.data.manifest import Manifest
from dmx.data.store import Store, open_store
from dmx.data.store_writer import StoreWriter
from dmx.errors import DmxError
from dmx.tasks import Task

_NUM_EXAMPLES = 8
GENERATED, RANDOM = "freshly generated images", "random tokens"


@contextlib.contextmanager
def stand_in(task: Task) -> Iterator[Store]:
    """A store in a temporary folder, gone afterwards; its manifest's data_name says what it is.

    Pathfinder's images are generated, as the run itself will do; all else is random tokens of the
    full length, which costs as much as the longest real examples.
    """
    examples, name = _examples(task)
    manifest = Manifest(
        task=task.name,
        data_name=name,
        origin="dmx/costing/stand_in.py",
        note=name,
        num_classes=task.num_classes,
        max_length=task.max_length,
        vocab_size=task.vocab_size,
        paired=task.paired,
        dtype="uint16",
        aliases={"dev": "train", "test": "train"},
    )
    with tempfile.TemporaryDirectory(prefix="dmx-stand-in-") as root:
        folder = Path(root) / task.name
        with StoreWriter(folder, manifest) as writer:
            for number, ids in enumerate(examples):
                other = ids[::-1].copy() if task.paired else None
                writer.add("train", ids, number % task.num_classes, other)
        yield open_store(folder)


def _examples(task: Task) -> tuple[list[npt.NDArray[np.uint16]], str]:
    if task.family == "pathfinder":
        from dmx.data.pathfinder import Generator

        with contextlib.suppress(DmxError):  # released sets have no generator
            generator = Generator(task.name, 123)
            images = [generator.image(i)[0].reshape(-1) for i in range(_NUM_EXAMPLES)]
            return [image.astype(np.uint16) for image in images], GENERATED
    draw = np.random.default_rng(0)
    shape = (_NUM_EXAMPLES, task.max_length)
    return list(draw.integers(1, task.vocab_size - 1, shape).astype(np.uint16)), RANDOM
