"""What a checkpoint's model says: its accuracy over a split, and a few fixed examples of dev."""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmx.config import RunConfig, parse_run_config
from dmx.data.batches import make_batch
from dmx.data.show import class_name, pictures, snippet
from dmx.data.store import Split, Store, open_store
from dmx.errors import ConfigError, DmxError
from dmx.model import Classifier
from dmx.runs import layout
from dmx.schema import to_dict
from dmx.storage.remote import SHARED_FILESYSTEM, StorageLayout
from dmx.tasks import task_for
from dmx.tensorboard import RunWriter
from dmx.training.checkpoint import Checkpoint, open_checkpoint
from dmx.training.trainer import Trainer
from dmx.training.transfer import MisfitError, Weights, transfer

NUM_SAMPLES = 8
_SPLIT = "dev"
_SEED = 8
"""Of the choice of examples: the same ones in every trial and run on the same data."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Predictions of one model.

    Attributes:
        step: optimizer steps the model has taken.
        data_folder: the store. data_checksum: of its content.
        indices: examples of the dev split. labels: their classes, by number.
        predictions: the likeliest class of each. probabilities: of every class, 0..1, per example.
    """

    step: int
    data_folder: str
    data_checksum: str
    indices: tuple[int, ...]
    labels: tuple[int, ...]
    predictions: tuple[int, ...]
    probabilities: tuple[tuple[float, ...], ...]

    def to_json(self) -> str:
        """The content of samples.json."""
        return json.dumps(asdict(self), indent=1) + "\n"


def choose_samples(split: Split) -> np.ndarray:
    """[n] ascending numbers of at most NUM_SAMPLES examples; the data decide, and nothing else."""
    count = min(NUM_SAMPLES, len(split))
    return np.sort(np.random.default_rng(_SEED).choice(len(split), count, replace=False))


def predict_samples(trainer: Trainer) -> Samples:
    """Run the trainer's model on the chosen dev examples; the random generators stay as they are.

    No batch is larger than those of an evaluation, so that what could be evaluated fits here too.
    """
    store = trainer.store
    split = store.split(_SPLIT)
    indices = choose_samples(split)
    size = min(trainer.passes.evaluation.size, len(indices))
    device = trainer.device
    parts = []
    # Some mixers draw (reformer's hashes), and training must not depend on who looks at it.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for start in range(0, len(indices), size):
            batch = make_batch(split, indices[start : start + size], trainer.length)
            parts.append(trainer.probabilities(batch.to(device)).cpu().double())
    found = torch.cat(parts)
    return Samples(
        step=trainer.step,
        data_folder=str(store.folder.absolute()),
        data_checksum=store.manifest.checksum,
        indices=tuple(indices.tolist()),
        labels=tuple(int(label) for label in split.labels[indices]),
        predictions=tuple(found.argmax(-1).tolist()),
        probabilities=tuple(tuple(round(p, 6) for p in row) for row in found.tolist()),
    )


def read_samples(checkpoint: Path) -> Samples | None:
    """The samples beside a checkpoint; None where there are none, or what is there is not whole.

    They are a note for the eye: an old checkpoint has none, and that is no error.
    """
    try:
        plain = json.loads((checkpoint / layout.SAMPLES_FILE).read_text(encoding="utf-8"))
        samples = Samples(
            step=int(plain["step"]),
            data_folder=str(plain["data_folder"]),
            data_checksum=str(plain["data_checksum"]),
            indices=tuple(int(i) for i in plain["indices"]),
            labels=tuple(int(i) for i in plain["labels"]),
            predictions=tuple(int(i) for i in plain["predictions"]),
            probabilities=tuple(tuple(float(p) for p in row) for row in plain["probabilities"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    rows = zip(samples.predictions, samples.probabilities, strict=False)
    whole = len(samples.indices) == len(samples.labels) == len(samples.predictions)
    whole = whole and len(samples.probabilities) == len(samples.indices)
    return samples if whole and all(0 <= p < len(row) for p, row in rows) else None


TAG = "predictions"
"""No metric has this name: TensorBoard shows a tag in one way only."""
_SPLIT = "dev"
_COLUMNS = 4
"""So that captions can be read in TensorBoard's narrow cards."""
_RIGHT, _WRONG = "darkgreen", "firebrick"


def write_samples(writer: RunWriter, checkpoint: Path, step: int) -> bool:
    """Show what the model of a checkpoint says about its sample examples; False without any.

    Nothing is shown where the checkpoint is not of `step` (a newer one may have replaced it), has
    no samples, or where its data are gone or have changed. That is no error: a view must not stop
    a run.
    """
    samples = read_samples(checkpoint)
    if samples is None or samples.step != step:
        return False
    try:
        store = _store(samples.data_folder)
    except (DmxError, OSError):
        return False
    split = store.split(_SPLIT)
    fits = store.manifest.checksum == samples.data_checksum
    if not fits or any(not 0 <= index < len(split) for index in samples.indices):
        return False
    if task_for(store.manifest.task).image_side is not None:
        captions = [
            (f"says {said}, is {label}", _RIGHT if said == label else _WRONG)
            for label, said, _ in _rows(samples)
        ]
        writer.image(TAG, pictures(store, _SPLIT, samples.indices, captions, _COLUMNS), step)
    writer.text(TAG, table(samples, store), step)
    return True


def table(samples: Samples, store: Store) -> str:
    """The samples as a markdown table; texts are shown by their beginnings."""
    manifest, split = store.manifest, store.split(_SPLIT)
    has_text = task_for(manifest.task).image_side is None
    lines = [
        f"{manifest.label}, {_SPLIT} split, after {samples.step:,} steps",
        "",
        "| example | label | prediction | probability | |" + (" text |" if has_text else ""),
        "|---:|---|---|---:|---|" + ("---|" if has_text else ""),
    ]
    for index, (label, said, probability) in zip(samples.indices, _rows(samples), strict=True):
        cells = [
            str(index),
            _cell(class_name(manifest, label)),
            _cell(class_name(manifest, said)),
            f"{probability:.3f}",
            "right" if said == label else "**wrong**",
        ]
        if has_text:
            cells.append(_cell(snippet(manifest, split, index)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows(samples: Samples) -> list[tuple[int, int, float]]:
    """(label, prediction, its probability) of each example."""
    rows = zip(samples.labels, samples.predictions, samples.probabilities, strict=True)
    return [(label, said, row[said]) for label, said, row in rows]


def _cell(text: str) -> str:
    """Data as a cell of a markdown table: they are shown, and mark nothing up."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    escaped = html.escape(plain, quote=False)
    return "".join(f"&#{ord(c)};" if c in "\\`*_[]|~" else c for c in escaped)


@functools.lru_cache(maxsize=8)
def _store(folder: str) -> Store:
    return open_store(Path(folder))


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
    places: StorageLayout = SHARED_FILESYSTEM


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
    places: StorageLayout = SHARED_FILESYSTEM,
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
