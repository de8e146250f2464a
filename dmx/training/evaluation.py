"""Accuracy of a checkpoint over a whole split, on its own data and on those of a later stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmx.config import parse_run_config
from dmx.data.store import open_store
from dmx.errors import CheckpointError
from dmx.nn.model import Classifier
from dmx.storage.places import SHARED, Places
from dmx.training.checkpoint import open_checkpoint
from dmx.training.trainer import Trainer
from dmx.training.transfer import transfer


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is measured.

    Attributes:
        checkpoint: a checkpoint folder. data_folder: a store. places: see training.job.Job.
        config: the RunConfig to run the weights in, plain; None takes the checkpoint's own. With
            another one the weights move as between stages: without any training in between.
    """

    checkpoint: str
    data_folder: str
    config: Mapping[str, Any] | None = None
    split: str = "test"
    places: Places = SHARED


def measure(wanted: Measurement, threads: int) -> float | None:
    """Accuracy over the whole split, 0..1; None where the weights do not fit the other config.

    Raises:
        CheckpointError, DataError: either is missing or damaged.
    """
    torch.set_num_threads(threads)
    wanted.places.pull(Path(wanted.checkpoint))
    checkpoint = open_checkpoint(Path(wanted.checkpoint))
    store = open_store(wanted.places.data(wanted.data_folder))
    config = checkpoint.config if wanted.config is None else parse_run_config(wanted.config)
    state = checkpoint.model_state()

    def move(model: Classifier) -> None:
        transfer(model, state)

    try:
        trainer = Trainer(config, store, before_training=move)
    except CheckpointError:
        if wanted.config is None:
            raise
        return None
    try:
        return trainer.evaluate(wanted.split).accuracy
    finally:
        trainer.close()


def evaluate_checkpoint(
    checkpoint_folder: str, data_folder: str, split: str, threads: int, places: Places = SHARED
) -> dict[str, float]:
    """{"loss", "accuracy", "num_examples"} of a checkpoint over a whole split of any store.

    Raises:
        CheckpointError, DataError: either is missing or damaged, or they do not fit.
    """
    torch.set_num_threads(threads)
    places.pull(Path(checkpoint_folder))
    checkpoint = open_checkpoint(Path(checkpoint_folder))
    trainer = Trainer(checkpoint.config, open_store(places.data(data_folder)))
    try:
        trainer.load_weights(checkpoint)
        result = trainer.evaluate(split)
    finally:
        trainer.close()
    return {
        "loss": result.loss,
        "accuracy": result.accuracy,
        "num_examples": result.num_examples,
    }
