"""Pieces of a curriculum's work, and what the controller asks of whoever does them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from dmx.training.evaluation import Measurement
from dmx.training.job import Job

if TYPE_CHECKING:
    from dmx.study.config import StudyConfig


class ClusterLost(Exception):
    """The cluster does not answer any more; what is on disk can be continued elsewhere."""


class Key(NamedTuple):
    """Names a piece of work: what it is, for which stage, and what else tells it apart."""

    kind: Literal["train", "data", "test"]
    stage: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Message:
    """News of a piece of work.

    Attributes:
        report: of a run: flat metrics, with `done` in the last; of a search: the best trial's
            reports, one message each. {} for the end of anything else.
        done: nothing more will come. failure: why it ended badly, one line.
        lost: it is the machines that failed; the work itself can be continued.
        value: what a test or a preparation returned; at the end of a search what it found and cost
            (see Attempt.search).
    """

    key: Key
    report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    done: bool = False
    failure: str | None = None
    lost: bool = False
    value: Any = None


class Backend(Protocol):
    """What the controller needs of a cluster; tests have one without Ray."""

    def train(self, key: Key, job: Job, *, cpus: float, gpus: float) -> None:
        """Start or continue a run."""

    def search(
        self, key: Key, study: StudyConfig, data_folder: str, folder: Path, slots: int
    ) -> None:
        """Start or continue a study."""

    def prepare(
        self, key: Key, task: str, root: Path, options: Mapping[str, Any], workers: int, nice: int
    ) -> None:
        """Prepare a task's data."""

    def test(self, key: Key, wanted: Measurement, *, cpus: float, gpus: float) -> None:
        """Measure a test accuracy."""

    def poll(self, timeout_seconds: float) -> list[Message]:
        """News; empty after the timeout."""

    def close(self) -> None:
        """End all work at once; what is on disk stays."""
