"""Accuracy of a checkpoint over a whole split, on its own data and on those of a later stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmx.config import RunConfig, parse_run_config
from dmx.data.store import open_store
from dmx.errors import ConfigError
from dmx.nn.model import Classifier
from dmx.schema import to_dict
from dmx.storage.places import SHARED, Places
from dmx.tasks import task_for
from dmx.training.checkpoint import Checkpoint, open_checkpoint
from dmx.training.trainer import Trainer
from dmx.training.transfer import MisfitError, Weights, transfer


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
    try:
        result = evaluate_checkpoint(
            wanted.checkpoint,
            wanted.data_folder,
            wanted.split,
            threads,
            wanted.places,
            wanted.config,
        )
    except MisfitError:
        return None
    return result["accuracy"]


def evaluate_checkpoint(
    checkpoint_folder: str,
    data_folder: str,
    split: str,
    threads: int,
    places: Places = SHARED,
    config: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """{"loss", "accuracy", "num_examples"} of a checkpoint over a whole split of a store.

    Args:
        config: see Measurement.

    Raises:
        CheckpointError, DataError: either is missing or damaged, or they do not fit.
    """
    torch.set_num_threads(threads)
    places.pull(Path(checkpoint_folder))
    checkpoint = open_checkpoint(Path(checkpoint_folder))
    store = open_store(places.data(data_folder))
    run = checkpoint.config if config is None else parse_run_config(config)
    weights = Weights(checkpoint.model_state(), checkpoint.config.task_info)

    def move(model: Classifier) -> None:
        transfer(model, weights, run.task_info, whole=True)

    trainer = Trainer(run, store, before_training=None if config is None else move)
    try:
        if config is None:
            trainer.load_weights(checkpoint)
        result = trainer.evaluate(split)
    finally:
        trainer.close()
    return {
        "loss": result.loss,
        "accuracy": result.accuracy,
        "num_examples": result.num_examples,
    }


def config_on(checkpoint: Checkpoint, task: str, settings: Mapping[str, Any]) -> RunConfig:
    """The config in which a checkpoint's weights are evaluated on a task's data.

    Its own, with the task's length and the settings given; the weights move as between stages.

    Raises:
        ConfigError: the task is of another kind than the checkpoint's.
    """
    own, wanted = checkpoint.config, task_for(task)
    changes: dict[str, Any] = {}
    if task != own.task:
        known = own.task_info
        same = (known.family, known.paired) == (wanted.family, wanted.paired)
        if not same or (known.image_side is None) != (wanted.image_side is None):
            raise ConfigError(
                f"{checkpoint.folder} is a checkpoint of task {own.task}; --task {task} is of "
                f"another kind, and its weights say nothing about it: give a task of the family "
                f"{known.family}, or leave --task out."
            )
        changes = {"task": task, "model.max_length": wanted.max_length}
    return parse_run_config(to_dict(own), changes, settings)
