"""What a model says about a few fixed dev examples; kept beside its checkpoint, shown elsewhere."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dmx import records as keys
from dmx.data.batches import make_batch
from dmx.data.store import Split
from dmx.training.trainer import Trainer

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
        plain = json.loads((checkpoint / keys.SAMPLES_FILE).read_text(encoding="utf-8"))
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
