"""A curriculum and its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dmx.runs.run import CheckpointRef


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What a gate sees of a curriculum stage.

    Attributes:
        name: the stage.
        attempt: 0 for the first try, counting up with on_fail retries.
        dev_accuracies: dev accuracy at every evaluation, in order.
        steps: optimizer steps taken.
        seconds: wall time of the attempt.
        num_classes: classes of the stage's data; chance is 1 / num_classes.
        checkpoint: the best checkpoint.
    """

    name: str
    attempt: int
    dev_accuracies: tuple[float, ...]
    steps: int
    seconds: float
    num_classes: int
    checkpoint: CheckpointRef | None
    metrics: Mapping[str, float] = field(default_factory=dict)
