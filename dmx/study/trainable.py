"""The thin Ray Tune Trainable around the Ray-free Runner: one step = train, evaluate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import tune

from dmx import log
from dmx.cluster import connection
from dmx.cluster.gang import Gang, runner_of
from dmx.training.job import Job
from dmx.training.process_state import ProcessState
from dmx.training.runner import Runner

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
