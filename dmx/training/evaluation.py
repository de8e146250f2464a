"""A checkpoint's loss and accuracy over a whole split: of its own data, or of another task's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmx.config import RunConfig, parse_run_config
from dmx.data.prepare import open_data
from dmx.data.store import open_store
from dmx.errors import CheckpointError, ConfigError
from dmx.process import num_cores
from dmx.schema import local_path, to_dict
from dmx.storage.remote import SHARED_FILESYSTEM, StorageLayout
from dmx.tasks import task_for
from dmx.training.checkpoint import Checkpoint, meant_checkpoint, open_checkpoint
from dmx.training.passes import Evaluation
from dmx.training.trainer import Trainer
from dmx.training.transfer import Weights, plan_transfer, shapes_of


def evaluate(
    checkpoint: str | Path,
    split: str = "test",
    *,
    task: str | None = None,
    settings: Mapping[str, Any] | None = None,
    data_root: str | None = None,
    prepare: bool = True,
    threads: int = 0,
) -> dict[str, Any]:
    """Evaluate a checkpoint, or a run's best one.

    Args:
        task: another one of its family, to which the weights move as between stages.
        settings: dotted, in place of its own. data_root: None is where the run found its data.
        prepare: generate missing data. threads: CPU threads; 0 is all cores.

    Returns:
        {"checkpoint", "task", "data", "split", "loss", "accuracy", "num_examples"}, and "weights"
        where they move.

    Raises:
        CheckpointError: it is none, or its weights do not fit. ConfigError: the task is of another
        kind. DataError: there are no data.
    """
    folder = meant_checkpoint(local_path("--evaluate", str(checkpoint)))
    found = open_checkpoint(folder)
    config = _config_on(found, task or found.config.task, settings or {})
    weights = Weights.of(found)
    tasks = weights.task, config.task_info
    try:  # before any data are generated
        report = plan_transfer(weights.shapes, shapes_of(config), tasks=tasks, whole=True)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} on task {config.task}: {error}") from None
    root = data_root or found.config.data.root
    store = open_data(config.task, root, allow_sample=True, generate=prepare)
    wanted = EvaluationJob(
        checkpoint=str(folder), data_folder=str(store.folder), config=to_dict(config), split=split
    )
    moved = f"of {found.config.task}, {report.positions}" if report.positions else ""
    return {
        "checkpoint": str(folder),
        "task": config.task,
        "data": store.manifest.label,
        "split": split,
        **({"weights": moved} if moved else {}),
        **dataclasses.asdict(evaluate_checkpoint(wanted, threads or num_cores())),
    }


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """What a process needs to know to evaluate a checkpoint.

    Attributes:
        checkpoint: its folder. data_folder: a store. places: see training.job.Job.
        config: the RunConfig to run the weights in, plain; None takes the checkpoint's own. With
            another one the weights move as between stages: without any training in between.
    """

    checkpoint: str
    data_folder: str
    config: Mapping[str, Any] | None = None
    split: str = "test"
    places: StorageLayout = SHARED_FILESYSTEM


def evaluate_checkpoint(wanted: EvaluationJob, threads: int) -> Evaluation:
    """Loss and accuracy over the whole split.

    Raises:
        CheckpointError, DataError: either is missing or damaged. MisfitError: they do not fit.
    """
    torch.set_num_threads(threads)
    folder = Path(wanted.checkpoint)
    wanted.places.pull(folder)
    checkpoint = open_checkpoint(folder)
    store = open_store(wanted.places.data(wanted.data_folder))
    other = wanted.config
    trainer = Trainer(checkpoint.config if other is None else parse_run_config(other), store)
    try:
        trainer.start_from(Weights.of(checkpoint), whole=True)
        return trainer.evaluate(wanted.split)
    finally:
        trainer.close()


def _config_on(checkpoint: Checkpoint, task: str, settings: Mapping[str, Any]) -> RunConfig:
    """The checkpoint's config with the length of another task of its kind, and the settings."""
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
