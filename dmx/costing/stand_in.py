"""Data to measure on where a task's own are not there yet: a few generated or random examples."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dmx.data.locate import default_data_root, is_prepared
from dmx.data.manifest import Manifest
from dmx.data.store import Store, open_store
from dmx.data.store_writer import StoreWriter
from dmx.errors import DmxError
from dmx.tasks import NUM_IMAGES, Task

_NUM_EXAMPLES = 8
GENERATED, RANDOM = "freshly generated images", "random tokens of the full length"


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


@dataclass(frozen=True)
class DryData:
    """What a dry run measures on.

    Attributes:
        num_dev: examples of the dev split; None where they are the store's. words: for the user.
    """

    store: Store
    num_dev: int | None
    words: str


@contextlib.contextmanager
def dry_data(
    task: Task, root: Path | None, obtain: Callable[[Path], Store], *, generate: bool
) -> Iterator[DryData]:
    """The task's data; a stand-in where the run itself would generate them, as nothing is written.

    Args:
        root: the data root; None is the default one.
        obtain: opens data that are there, or a sample, which it puts into the folder it is given.
        generate: the run may generate data.

    Raises:
        DataError: see obtain.
    """
    root = default_data_root() if root is None else root
    if not generate or not task.generated or is_prepared(task.name, root):
        with tempfile.TemporaryDirectory(prefix="dmx-dry-run-") as temporary:
            store = obtain(Path(temporary))
            yield DryData(store, None, f"{store.manifest.label}; {dict(store.manifest.splits)}")
        return
    with stand_in(task) as store:
        words = (
            f"{task.name} is not in {root}; the run would generate it. Measured on "
            f"{store.manifest.data_name}"
        )
        yield DryData(store, _num_dev(task), words)


def _num_dev(task: Task) -> int:
    """Examples of the dev split that is generated without options."""
    return NUM_IMAGES // 10 if task.published is None else task.published.counts[0][1]


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
