"""One run by several processes: Ray Train's TorchTrainer behind the interface of a Runner."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dmx import cluster, log  # cluster sets Ray's environment before Ray is imported
from dmx import records as keys
from dmx.checkpoint import open_checkpoint
from dmx.ranks import Group
from dmx.runner import Job, Runner, evaluate_checkpoint
from dmx.workers import Workers

import ray  # isort: skip
from ray.exceptions import RayError  # isort: skip
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # isort: skip

logger = logging.getLogger("dmx.distributed")
__all__ = ["DistributedRunner", "check_room", "cluster", "opened", "runner_of"]

_MAX_RESTARTS = 3
"""Worker groups that may die one after another without a single further report."""
_CLOSE_SECONDS = 10.0
_RAY_DIR = "ray-train"
_SESSION_THREADS = 32


def runner_of(job: Job) -> Runner | DistributedRunner:
    """Whatever runs the job: this process, or several others."""
    return Runner(job) if job.workers == 1 else DistributedRunner(job)


def check_room(workers: Workers, resources: cluster.Resources) -> None:
    """Whether a run of these workers fits.

    Raises:
        ConfigError: it does not; Ray would wait for ever.
    """
    count = workers.count
    cluster.check_request(resources, cpus=workers.cpus * count, gpus=workers.gpus * count)


@contextlib.contextmanager
def opened(job: Job, address: str | None) -> Iterator[DistributedRunner]:
    """A runner in a cluster of this machine's own, or in the one at `address`.

    Raises:
        ConfigError: no cluster answers, or the run does not fit into it.
    """
    with cluster.connect(address) as resources:
        each = Workers(count=job.workers, cpus=job.cpus_per_worker, gpus=job.gpus_per_worker)
        check_room(each, resources)
        runner = DistributedRunner(job)
        try:
            yield runner
        finally:
            runner.close()


class DistributedRunner:
    """A Runner whose work is done by `job.workers` processes, wherever the cluster has room.

    Each `step` lets the workers train to the next evaluation, and no further: what is on disk is
    what was reported. When a worker is lost, Ray Train starts all of them again, as many as the
    cluster still has room for, and they continue from the last checkpoint; the batches stay the
    same, only the shares grow.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._session: Any = None
        self._fitting: Any = None

    def _start(self) -> None:
        here = ray.get_runtime_context().get_node_id()
        # On this node, so that a lost node takes no bystander's session with it.
        self._session = _session_class.options(
            max_concurrency=_SESSION_THREADS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        ).remote(self.job)
        self._fitting = self._session.fit.remote()

    def step(self) -> dict[str, Any]:
        """See Runner.step. With `lost` where the workers died again and again.

        Raises:
            RayError: this node's own part of the run is gone.
        """
        if self._session is None:
            self._start()
        report: dict[str, Any] = ray.get(self._session.step.remote())
        return report

    def evaluate(self, folder: Path, split: str) -> dict[str, float]:
        """runner.evaluate_checkpoint by one worker; the others must have ended."""
        job = self.job
        remote = ray.remote(
            num_cpus=job.cpus_per_worker, num_gpus=job.gpus_per_worker, max_retries=3
        )(evaluate_checkpoint)
        found = remote.remote(str(folder), job.data_folder, split, job.threads)
        result: dict[str, float] = ray.get(found)
        return result

    def save_into(self, folder: Path) -> None:
        """Copy the last checkpoint; the workers rest, so that it is the present state."""
        last = open_checkpoint(Path(self.job.folder) / keys.LAST_DIR)
        shutil.copytree(last.folder, folder, dirs_exist_ok=True)

    def load_from(self, folder: Path) -> None:
        """Go on from another checkpoint."""
        self.close()
        last = Path(self.job.folder) / keys.LAST_DIR
        new = last.parent / f".{last.name}.copy"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(open_checkpoint(folder).folder, new)
        shutil.rmtree(last, ignore_errors=True)
        new.rename(last)

    def close(self) -> None:
        """End all workers: at once where they are at work, in good order where they rest."""
        session, self._session = self._session, None
        if session is None:
            return
        with contextlib.suppress(RayError):
            if ray.get(session.stop.remote(), timeout=_CLOSE_SECONDS):
                ray.wait([self._fitting], timeout=_CLOSE_SECONDS)
            reservation = ray.get(session.reservation.remote(), timeout=_CLOSE_SECONDS)
            ray.kill(session)  # the workers follow: whoever started them is gone
            _give_back(reservation)
        with contextlib.suppress(RayError):
            ray.kill(session)
        shutil.rmtree(Path(self.job.folder) / _RAY_DIR, ignore_errors=True)


def _give_back(reservation: str) -> None:
    """Cancel a killed run's claim on the cluster; by itself it would lapse after three minutes."""
    with contextlib.suppress(RayError, ValueError):
        name = "AutoscalingCoordinator"
        ray.get_actor(name, namespace=name).cancel_request.remote(reservation)


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
        self._resting = False
        self._stopped = False
        self._run_id = ""

    def fit(self) -> None:
        """Run Ray Train to its end."""
        from ray import train
        from ray.train import torch as torch_train

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
                train_loop_config={"session": session, "job": dataclasses.asdict(job)},
                torch_config=v2_torch.TorchConfig(backend="nccl" if on_gpu else "gloo"),
                scaling_config=v2.ScalingConfig(
                    num_workers=(1, job.workers), use_gpu=on_gpu, resources_per_worker=each
                ),
                run_config=v2.RunConfig(
                    name="session",
                    storage_path=str(Path(job.folder).absolute() / _RAY_DIR),
                    # Lost workers are counted here, against the reports that come in between.
                    failure_config=v2.FailureConfig(max_failures=-1),
                    logging_config=v2.LoggingConfig(log_level="ERROR"),
                ),
            )
            self._run_id = trainer.train_run_context.run_id
            trainer.fit()
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        self._lose(reason)

    def _lose(self, reason: str) -> None:
        """The machines failed, not the run: what is on disk can be continued elsewhere."""
        with self._news:
            if self._wanted > self._delivered and self._report is None:
                failure = {keys.FAILURE: reason, "lost": True, "done": True}
                self._report = {keys.STEPS: max(self._steps, 0), keys.DEV_ACCURACY: 0.0, **failure}
                self._news.notify_all()

    # -- what the owner calls ---------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """Let the workers train to the next evaluation; its report."""
        with self._news:
            self._wanted += 1
            self._news.notify_all()
            self._news.wait_for(lambda: self._report is not None)
            report, self._report = self._report, None
            self._delivered += 1
            assert report is not None
            return report

    def stop(self) -> bool:
        """Let resting workers end; whether they were resting, or have ended."""
        with self._news:
            self._stopped = True
            self._news.notify_all()
            return self._resting

    def reservation(self) -> str:
        """What Ray Train reserves the workers' room under."""
        return f"train-{self._run_id}"

    # -- what the workers call --------------------------------------------------------------

    def started(self) -> bool:
        """A group of workers is there; whether it may begin."""
        with self._news:
            self._starts += 1
            allowed = self._starts <= 1 + _MAX_RESTARTS
        if not allowed:
            self._lose(f"its workers died {_MAX_RESTARTS + 1} times without getting any further")
        return allowed

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


_session_class: Any = ray.remote(num_cpus=0, max_restarts=0)(_Session)


def _train(config: dict[str, Any]) -> None:
    """What every worker does: the same run, each with its share of every batch."""
    log.setup()
    session, job = config["session"], Job(**config["job"])
    ask: Callable[[Any], Any] = ray.get
    ranks = Group()
    if not ranks.from_leader(ranks.leads and ask(session.started.remote())):
        return
    runner = Runner(job, ranks=ranks)
    try:
        if runner.failed:  # the others wait for this one; they end with the session
            ask(session.deliver.remote(runner.step()))
            return
        while ranks.from_leader(ranks.leads and ask(session.go.remote())):
            report = runner.step()
            if ranks.leads or runner.failed:
                ask(session.deliver.remote(report))
            if report["done"]:
                return
    finally:
        runner.close()
