"""Sample predictions: what a model says about a few fixed dev examples, for TensorBoard."""

from __future__ import annotations

import functools
import html
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dmx.data.batches import make_batch
from dmx.data.show import pictures, snippet
from dmx.data.store import Split, Store, open_store
from dmx.errors import DmxError
from dmx.runs.layout import SAMPLES_FILE
from dmx.schema import from_dict
from dmx.tasks import task_for
from dmx.tensorboard import RunWriter
from dmx.training.trainer import Trainer

TAG = "predictions"
"""No metric has this name: TensorBoard shows a tag in one way only."""
NUM_SAMPLES = 8
_SPLIT = "dev"
_SEED = 8
"""Of the choice of examples: the same ones in every trial and run on the same data."""
_COLUMNS = 4
"""So that captions can be read in TensorBoard's narrow cards."""
_RIGHT, _WRONG = "darkgreen", "firebrick"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Predictions of one model, as samples.json holds them.

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
        return json.dumps(asdict(self), indent=1) + "\n"

    def rows(self) -> list[tuple[int, int, int, float]]:
        """(index, label, prediction, its probability) of each example."""
        columns = (self.indices, self.labels, self.predictions, self.probabilities)
        return [
            (index, label, said, dict(enumerate(of_class))[said])
            for index, label, said, of_class in zip(*columns, strict=True)
        ]


def choose_samples(split: Split) -> np.ndarray:
    """[n] ascending numbers of at most NUM_SAMPLES examples; the data decide, and nothing else."""
    count = min(NUM_SAMPLES, len(split))
    return np.sort(np.random.default_rng(_SEED).choice(len(split), count, replace=False))


def predict_samples(trainer: Trainer) -> Samples:
    """Run the trainer's model on the chosen dev examples; the random generators stay as they are.

    No batch is larger than those of an evaluation, so that what could be evaluated fits here too.
    """
    store, device = trainer.store, trainer.device
    split = store.split(_SPLIT)
    indices = choose_samples(split)
    size = trainer.passes.evaluation.size
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
        labels=tuple(split.labels[indices].tolist()),
        predictions=tuple(found.argmax(-1).tolist()),
        probabilities=tuple(tuple(round(p, 6) for p in row) for row in found.tolist()),
    )


def read_samples(checkpoint: Path) -> Samples | None:
    """None where a checkpoint has none, or what is there is not whole."""
    try:
        content = (checkpoint / SAMPLES_FILE).read_text(encoding="utf-8")
        samples = from_dict(Samples, json.loads(content))
        samples.rows()
    except (OSError, ValueError, LookupError, RecursionError, DmxError):
        return None
    return samples


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
    is_image = task_for(store.manifest.task).image_side is not None
    if is_image:
        captions = [
            (f"says {said}, is {label}", _RIGHT if said == label else _WRONG)
            for _, label, said, _ in samples.rows()
        ]
        writer.image(TAG, pictures(store, _SPLIT, samples.indices, captions, _COLUMNS), step)
    writer.text(TAG, _table(samples, store, with_texts=not is_image), step)
    return True


def _table(samples: Samples, store: Store, *, with_texts: bool) -> str:
    """The samples as a markdown table, with the beginnings of texts."""
    manifest, split = store.manifest, store.split(_SPLIT)
    lines = [
        f"{manifest.label}, {_SPLIT} split, after {samples.step:,} steps",
        "",
        "| example | label | prediction | probability | |" + (" text |" if with_texts else ""),
        "|---:|---|---|---:|---|" + ("---|" if with_texts else ""),
    ]
    for index, label, said, probability in samples.rows():
        names = (_cell(manifest.class_name(number)) for number in (label, said))
        right = "right" if said == label else "**wrong**"
        cells = [str(index), *names, f"{probability:.3f}", right]
        cells += [_cell(snippet(manifest, split, index))] if with_texts else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Data as a cell of a markdown table: they are shown, and mark nothing up."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    escaped = html.escape(plain, quote=False)
    return "".join(f"&#{ord(c)};" if c in "\\`*_[]|~" else c for c in escaped)


@functools.lru_cache(maxsize=8)
def _store(folder: str) -> Store:
    return open_store(Path(folder))
