"""What every run has: checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class CheckpointRef:
    """A checkpoint on disk, with what is needed to choose among several.

    Attributes:
        path: the checkpoint directory.
        step: optimizer steps taken when it was written.
        dev_accuracy: accuracy on the whole dev split at that step, in 0..1, or None.
    """

    path: Path
    step: int
    dev_accuracy: float | None
