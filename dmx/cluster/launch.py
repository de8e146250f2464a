"""Single runs and evaluations as Ray actors and tasks, restarted when their process dies."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from dataclasses import dataclass
from typing import Any

from dmx import terminal
from dmx.cluster import connection
from dmx.cluster.gang import runner_of
from dmx.runs.metrics import FAILURE, RESUMABLE, STEPS, UNDER_WAY
from dmx.training.job import Job

import ray  # isort: skip
from ray.exceptions import RayActorError, RayError, RayTaskError, WorkerCrashedError  # isort: skip

logger = logging.getLogger("dmx.launch")
_CLOSE_SECONDS = 20.0
_SLICE_SECONDS = 2.0
"""How long a run that is told to stop trains on at most, beside the step that is under way."""


class _Actor:
    """A Runner in its own process."""

    def __init__(self, job: Job) -> None:
        terminal.setup_logging()
        connection.hide_unreserved_gpus()
        self._runner = runner_of(job)

    def step(self) -> dict[str, Any]:
        return self._runner.step()

    def close(self) -> None:
        self._runner.close()


@dataclass
class Running:
    """A run under way. `restarts` counts the processes it has lost since it last got further.

    `cpus`, `gpus`: of its process; several workers ask for theirs themselves. `steps`: of its
    latest report.
    """

    job: Job
    cpus: float
    gpus: float
    restarts: int = 0
    steps: int = -1
    actor: Any = None
    future: Any = None


def start(job: Job, *, cpus: float, gpus: float) -> Running:
    """Launch a run; it starts as soon as the cluster has room."""
    running = Running(dataclasses.replace(job, slice_seconds=_SLICE_SECONDS), cpus, gpus)
    _launch(running)
    return running


def _launch(running: Running) -> None:
    several = running.job.workers > 1  # then they have the CPUs and GPUs, and this one only waits
    cpus, gpus = (0, 0) if several else (running.cpus, running.gpus)
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Actor)
    running.actor = remote.remote(running.job)
    running.future = running.actor.step.remote()


def wait_any(
    runs: list[Running], *, timeout_seconds: float, max_restarts: int = 5
) -> list[tuple[Running, dict[str, Any]]]:
    """Reports that came in; empty after the timeout. A dead process is started again by itself.

    A report with `done` is the run's last. When a run has lost more than `max_restarts` processes,
    without getting any further, its last report carries `failure`, and `lost`: what it has done so
    far can be continued elsewhere.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        left = max(deadline - time.monotonic(), 0.0)
        ready, _ = ray.wait([r.future for r in runs], num_returns=1, timeout=left)
        if not ready:
            return []
        reports = [
            (running, report)
            for running in runs
            if running.future in ready
            and (report := _next_report(running, max_restarts)) is not None
        ]
        if reports:  # else a slice has ended, or a process is started again
            return reports


def _next_report(running: Running, max_restarts: int) -> dict[str, Any] | None:
    """What a run's process has answered, and its next step begun; None for the end of a slice."""
    try:
        report: dict[str, Any] = ray.get(running.future)
    except (RayActorError, WorkerCrashedError, RayTaskError) as error:
        running.restarts += 1
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if running.restarts > max_restarts:
            failure = f"its process died {running.restarts} times, last: {reason}"
            return {FAILURE: failure, RESUMABLE: True, "done": True}
        logger.warning(
            "the worker of %s died (%s); it continues from its last checkpoint.",
            running.job.folder,
            reason,
        )
        running.job = dataclasses.replace(running.job, takes_over=True)
        _launch(running)
        return None
    if report.get(STEPS, 0) > running.steps:
        running.steps, running.restarts = report[STEPS], 0
    if report.get("done"):
        stop(running)
    else:
        running.future = running.actor.step.remote()
    return None if report.get(UNDER_WAY) else report


def stop(*runs: Running) -> None:
    """End runs' processes, and all that they own; what they have trained is kept, for a while."""
    closing = []
    for running in runs:
        with contextlib.suppress(RayError):
            closing.append(running.actor.close.remote())
    with contextlib.suppress(RayError):
        ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS) if closing else None
    for running in runs:
        with contextlib.suppress(RayError, ValueError):
            ray.kill(running.actor, no_restart=True)
