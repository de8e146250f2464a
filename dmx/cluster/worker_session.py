"""Ray Train's part of a run by several processes: their start, their work, their reports."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmx import log
from dmx import records as keys
from dmx.training.job import Job
from dmx.training.ranks import Group
from dmx.training.runner import Runner

import ray  # isort: skip
from ray import PlacementGroupID  # isort: skip
from ray.exceptions import RayError  # isort: skip
from ray.util.placement_group import PlacementGroup, remove_placement_group  # isort: skip

RAY_DIR = "ray-train"
"""Ray Train's own files, below the run's folder; ours are the checkpoints."""
HOLDS_FILE = "holds.json"
"""What the run occupies in the cluster; below RAY_DIR, for whoever must clear up after it."""
_START_SECONDS = 60.0
_MAX_RESTARTS = 3
"""Worker groups that may die one after another without a single further report."""


class _Session:
    """The run's switchboard: starts the workers, lets them go on, and hands over their reports.

    Its methods are called from several threads. Whoever owns this actor may be killed at any
    moment: the actor dies with it, and so do Ray Train's controller and the workers.
    """

    def __init__(self, job: Job) -> None:
        log.setup()
        self._job = job
        self._news = threading.Condition()
        self._wanted = 0  # reports that were asked for
        self._delivered = 0
        self._report: dict[str, Any] | None = None
        self._steps = -1  # of the latest report
        self._starts = 0  # of worker groups since then
        self._groups = 0
        self._resting = False
        self._begun = False
        self._stopped = False
        self._lost: str | None = None  # why no more reports will come
        self._folder = Path(job.folder).absolute() / RAY_DIR
        self._holds = {"job": ray.get_runtime_context().get_job_id()}

    def fit(self) -> None:
        """Run Ray Train to its end."""
        from ray import train
        from ray.train import torch as torch_train

        from dmx.cluster.torch_group import NodesTorchConfig

        # The names stand for the second version of Ray Train; type checkers see the first.
        v2: Any = train
        v2_torch: Any = torch_train
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        job, on_gpu = self._job, self._job.gpus_per_worker > 0
        each = {"CPU": job.cpus_per_worker, **({"GPU": job.gpus_per_worker} if on_gpu else {})}
        session = ray.get_runtime_context().current_actor
        reason = "Ray Train ended"
        try:
            trainer = v2_torch.TorchTrainer(
                _train,
                train_loop_config={"session": session, "job": job},
                torch_config=NodesTorchConfig(backend="nccl" if on_gpu else "gloo"),
                scaling_config=v2.ScalingConfig(
                    num_workers=(1, job.workers), use_gpu=on_gpu, resources_per_worker=each
                ),
                run_config=v2.RunConfig(
                    name="session",
                    storage_path=str(self._folder),
                    # Lost workers are counted here, against the reports that come in between.
                    failure_config=v2.FailureConfig(max_failures=-1),
                    logging_config=v2.LoggingConfig(log_level="ERROR"),
                ),
            )
            self._hold("reservation", f"train-{trainer.train_run_context.run_id}")
            trainer.fit()
        except Exception as error:
            reason = _reason(error)
        self._lose(reason)

    def _hold(self, what: str, name: str) -> None:
        self._holds[what] = name
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / HOLDS_FILE).write_text(json.dumps(self._holds), encoding="utf-8")

    def _lose(self, reason: str) -> None:
        with self._news:
            self._lost = self._lost or reason
            self._news.notify_all()

    # -- what the owner calls ---------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """Let the workers train to the next evaluation; its report.

        With `lost` where the machines failed and not the run: it can be continued elsewhere.
        """
        with self._news:
            self._wanted += 1
            self._news.notify_all()
            self._news.wait_for(lambda: self._report is not None or self._lost is not None)
            report, self._report = self._report, None
            self._delivered += 1
            if report is not None:
                return report
            step = max(self._steps, 0)
            end = {keys.FAILURE: self._lost, keys.LOST: True, "done": True}
            return {keys.STEPS: step, keys.DEV_ACCURACY: 0.0, **end}

    def stop(self) -> bool:
        """Let resting workers end; whether they were resting, or have ended.

        Waits for workers that are being started: until then nobody knows what they occupy.
        """
        with self._news:
            self._stopped = True
            self._news.notify_all()
            self._news.wait_for(lambda: self._begun or self._lost is not None, _START_SECONDS)
            return self._resting

    # -- what the workers call --------------------------------------------------------------

    def started(self, placement_group: str) -> tuple[bool, bool]:
        """A group of workers is there, in this placement group.

        Returns:
            Whether it may begin, and whether it is in another's place, which was given up.
        """
        self._hold("placement_group", placement_group)
        with self._news:
            self._begun = True
            self._news.notify_all()
            self._starts += 1
            self._groups += 1
            allowed = self._starts <= 1 + _MAX_RESTARTS
        if not allowed:
            self._lose(f"its workers died {_MAX_RESTARTS + 1} times without getting any further")
        return allowed, self._groups > 1

    def go(self) -> bool:
        """Wait until the next report is wanted; False where none will be."""
        with self._news:
            self._resting = True
            self._news.wait_for(
                lambda: self._stopped or (self._wanted > self._delivered and self._report is None)
            )
            self._resting = self._stopped
            return not self._stopped

    def deliver(self, report: dict[str, Any]) -> None:
        """A report; one that is known, repeated after a restart, is passed over."""
        failed = bool(report.get(keys.FAILURE))
        with self._news:
            if self._report is not None or (report[keys.STEPS] <= self._steps and not failed):
                return
            self._report = report
            self._resting = bool(report["done"]) and not failed
            if not failed:
                self._steps, self._starts = report[keys.STEPS], 0
            self._news.notify_all()


def _reason(error: Exception) -> str:
    """One line; Ray Train's first one is a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    heading = len(lines) > 1 and lines[0].endswith(":")
    return " ".join(lines[: 1 + heading]) or type(error).__name__


def release(folder: Path) -> None:
    """Give back what a run in `folder` occupies; its workers end, wherever they are.

    Ray's own cleaner of placement groups needs a dashboard, and Ray Train's reservation lapses only
    after minutes. What another driver holds is left alone.
    """
    try:
        holds = json.loads((folder / RAY_DIR / HOLDS_FILE).read_text(encoding="utf-8"))
        if holds["job"] != ray.get_runtime_context().get_job_id():
            return
    except (OSError, ValueError, LookupError, TypeError):
        return
    with contextlib.suppress(RayError, ValueError):
        if "placement_group" in holds:
            place = PlacementGroupID(bytes.fromhex(holds["placement_group"]))
            remove_placement_group(PlacementGroup(place))
    with contextlib.suppress(RayError, ValueError):
        if "reservation" in holds:
            name = "AutoscalingCoordinator"
            coordinator = ray.get_actor(name, namespace=name)
            coordinator.cancel_request.remote(holds["reservation"])


WorkerSession: Any = ray.remote(num_cpus=0, max_restarts=0)(_Session)


def _train(config: dict[str, Any]) -> None:
    """What every worker does: the same run, each with its share of every batch."""
    log.setup()
    session, job = config["session"], config["job"]
    ask: Callable[[Any], Any] = ray.get
    ranks = Group()
    place = ray.util.get_current_placement_group()
    assert place is not None  # Ray Train gives every group of workers one
    begins = ask(session.started.remote(place.id.hex())) if ranks.leads else None
    allowed, again = ranks.from_leader(begins)
    if not allowed:
        return
    job = dataclasses.replace(job, takes_over=job.takes_over or again)
    runner = Runner(job, ranks=ranks)
    try:
        if runner.failed:  # the others wait for this one; they end with the session
            ask(session.deliver.remote(runner.step()))
            return
        while ranks.from_leader(ranks.leads and ask(session.go.remote())):
            report = runner.step()
            if runner.taken_over:  # the run goes on, elsewhere
                return
            if ranks.leads or runner.failed:
                ask(session.deliver.remote(report))
            if report["done"]:
                return
    finally:
        runner.close()
