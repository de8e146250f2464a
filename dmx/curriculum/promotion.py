"""What an attempt leaves behind: its best checkpoint, and what the journal says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmx import records as keys
from dmx.curriculum.history import StageState, attempt_folder
from dmx.data.store import Store
from dmx.errors import CheckpointError
from dmx.records import CheckpointRef
from dmx.storage.files import sha256_file
from dmx.training.checkpoint import open_checkpoint


def best_checkpoints(folder: Path, stage: str, state: StageState) -> dict[int, CheckpointRef]:
    """The best checkpoint of each attempt that has one. `folder`: the run's."""
    found = {}
    for attempt in state.attempts:
        path = attempt_folder(folder, stage, attempt.number) / keys.BEST_DIR
        try:
            metrics = open_checkpoint(path).metrics
        except CheckpointError:
            continue
        found[attempt.number] = CheckpointRef(
            path=path,
            step=int(metrics.get(keys.STEPS, 0)),
            dev_accuracy=metrics.get(keys.DEV_ACCURACY),
        )
    return found


def checkpoint_facts(
    folder: Path, stage: str, attempt: int, reference: CheckpointRef | None
) -> dict[str, Any] | None:
    """A checkpoint as the journal names it; its path is relative to the run, which may move."""
    if reference is None:
        return None
    return {
        "stage": stage,
        "attempt": attempt,
        "path": str(reference.path.relative_to(folder)),
        "step": reference.step,
        keys.DEV_ACCURACY: reference.dev_accuracy,
        "sha256": sha256_file(reference.path / keys.MODEL_FILE),
    }


def data_facts(store: Store) -> dict[str, Any]:
    """Which data an attempt saw."""
    manifest = store.manifest
    return {
        "label": manifest.label,
        "folder": str(store.folder),
        "checksum": manifest.checksum,
        "origin": manifest.origin,
        "splits": dict(manifest.splits),
        "is_sample": manifest.is_sample,
    }
