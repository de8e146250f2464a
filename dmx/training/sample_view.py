"""Sample images and texts with label and prediction, as TensorBoard shows them."""

from __future__ import annotations

import functools
import html
from pathlib import Path

from dmx.data.show import class_name, pictures, snippet
from dmx.data.store import Store, open_store
from dmx.errors import DmxError
from dmx.tasks import task_for
from dmx.tensorboard import RunWriter
from dmx.training.samples import Samples, read_samples

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
