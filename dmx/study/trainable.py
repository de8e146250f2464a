"""What Ray Tune knows of a trial: a thin Trainable around the Ray-free Runner, and its room."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any

import ray
from ray import PlacementGroupID, tune
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from dmx import log
from dmx.cluster import connection
from dmx.cluster.gang import Gang, runner_of
from dmx.training.job import Job
from dmx.training.runner import ProcessState, Runner

JOB_KEY = "job"
SLICE_SECONDS = 5.0
"""Tune hears so often of a trial, and can stop it then without losing a step."""


class TrialTrainable(tune.Trainable):
    """Runs one trial in a Ray actor.

    The runner writes its checkpoints straight into the trial's folder on the shared storage, so a
    trial continues wherever Ray starts it again: after a dead worker, a lost node, or in a new
    session of the study. Ray's own checkpoints serve only schedulers that pause or copy trials.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Note the job. It is built in the first step: Tune gives up a trial that dies in here."""
        log.setup()
        connection.hide_unreserved_gpus()
        self._state = ProcessState.now()
        self._job = Job(**config[JOB_KEY])
        self._runner: Runner | Gang | None = None

    @property
    def runner(self) -> Runner | Gang:
        """The run, built or continued from its last checkpoint."""
        if self._runner is None:
            self._runner = runner_of(self._job)
        return self._runner

    def step(self) -> dict[str, Any]:
        """Train to the next evaluation and report, or for one slice: then there is no report."""
        return self.runner.step()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """For schedulers that pause or copy trials (PBT)."""
        self.runner.save_into(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """For schedulers that pause or copy trials (PBT)."""
        self.runner.load_from(Path(checkpoint))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Reuse the process for another trial; everything of the old one is dropped."""
        self.cleanup()
        self._state.restore()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Keep what was trained, and free what the run holds."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None


class TrialRoom(tune.PlacementGroupFactory):
    """The resources of a trial, in a placement group whose name tells the study.

    Ray removes a group with the job that created it, not with the process: a curriculum's search
    whose process dies is started again within the same job, and finds its trials' room taken.
    """

    def __init__(self, resources: dict[str, float], folder: Path) -> None:
        super().__init__([resources])
        self._study = _study_name(folder)

    def to_placement_group(self) -> PlacementGroup:
        """A new group; Ray refuses a name that it knows."""
        return placement_group(
            self.bundles, strategy=self.strategy, name=f"{self._study}{uuid.uuid4().hex}"
        )


def give_back_rooms(folder: Path) -> None:
    """Remove the groups that an earlier process of the study left; the claim keeps others out."""
    for group_id, group in ray.util.placement_group_table().items():
        if group["name"].startswith(_study_name(folder)) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group_id))))


def _study_name(folder: Path) -> str:
    return f"dmx-trial-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]}-"
