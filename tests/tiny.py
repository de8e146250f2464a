"""A tiny learnable data set and settings small enough that a step takes milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dmx.config import RunConfig, parse_run_config
from dmx.data.store import Manifest, Store
from dmx.data.store_writer import StoreWriter, write_store
from dmx.errors import DmxError
from dmx.training.trainer import Trainer

TASK = "pathfinder16-cl3-d1"
LENGTH = 256
SIZES = {"train": 50, "dev": 37, "test": 29}

SETTINGS: dict[str, Any] = {
    "model.num_layers": 1,
    "model.embedding_dim": 16,
    "model.hidden_dim": 16,
    "model.head_dim": 8,
    "attention.block_size": 16,
    "train.batch_size": 8,
    "train.num_steps": 8,
    "train.eval_every_steps": 2,
    "optim.warmup_steps": 3,
    "optim.learning_rate": 5.0e-3,
}


def examples(split: str) -> list[tuple[np.ndarray, int]]:
    """(ids, label) of a split: mostly 5s in class 0, mostly 9s in class 1; lengths differ."""
    draw = np.random.default_rng({"train": 1, "dev": 2, "test": 3}[split])
    found = []
    for _ in range(SIZES[split]):
        label = int(draw.integers(2))
        ids = draw.integers(1, 200, size=int(draw.integers(10, LENGTH + 1)))
        signal = draw.random(len(ids)) < 0.25
        ids[signal] = 9 if label else 5
        found.append((ids.astype(np.uint8), label))
    return found


def write_tiny(root: Path, task: str = TASK, max_length: int = LENGTH) -> Store:
    """Write the data set as `task` below a data root and open it."""
    manifest = Manifest(
        task=task,
        data_name="tiny",
        origin="tests/tiny.py",
        note="tiny",
        num_classes=2,
        max_length=max_length,
        vocab_size=512,
        dtype="uint8",
    )

    def fill(writer: StoreWriter) -> None:
        for split in SIZES:
            for ids, label in examples(split):
                writer.add(split, ids, label)

    return write_store(root / task, manifest, fill)


def config(**changes: Any) -> RunConfig:
    """The tiny experiment; changes are dotted, with __ for the dot."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return parse_run_config({"task": TASK, "attention": "butterfly"}, SETTINGS, changed)


@contextmanager
def trainer(store: Store, **changes: Any) -> Iterator[Trainer]:
    """A trainer that is closed afterwards."""
    made = Trainer(config(**changes), store)
    try:
        yield made
    finally:
        made.close()


def one_sentence(error: BaseException | str) -> str:
    """The message, once it is shown to be one line that ends as a sentence does."""
    text = str(error)
    assert text and "\n" not in text and "Traceback" not in text, text
    assert text.rstrip().endswith((".", ")")), text
    assert isinstance(error, str | DmxError), type(error)
    return text
