"""One run by several processes: Ray Train's TorchTrainer behind the interface of a Runner."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmx import records as keys
from dmx.cluster import connection
from dmx.cluster.worker_session import RAY_DIR, WorkerSession, release
from dmx.data.files import copy_folder
from dmx.storage.places import SHARED, Places
from dmx.training.checkpoint import open_checkpoint
from dmx.training.evaluation import evaluate_checkpoint
from dmx.training.job import Job
from dmx.training.runner import Runner
from dmx.training.workers import Workers

import ray  # isort: skip
from ray.exceptions import RayError  # isort: skip
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # isort: skip


_CLOSE_SECONDS = 10.0
_SESSION_THREADS = 32


def runner_of(job: Job) -> Runner | DistributedRunner:
    """Whatever runs the job: this process, or several others."""
    return Runner(job) if job.workers == 1 else DistributedRunner(job)


def evaluate(
    checkpoint_folder: str,
    data_folder: str,
    split: str,
    *,
    cpus: float,
    gpus: float,
    places: Places = SHARED,
) -> dict[str, float]:
    """evaluate_checkpoint as a Ray task; waits for it. Retried when its process or node dies."""
    remote: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)(evaluate_checkpoint)
    threads = max(int(cpus), 1)
    result: dict[str, float] = ray.get(
        remote.remote(checkpoint_folder, data_folder, split, threads, places)
    )
    return result


def check_room(workers: Workers, resources: connection.Resources) -> None:
    """Whether a run of these workers fits.

    Raises:
        ConfigError: it does not; Ray would wait for ever.
    """
    count = workers.count
    connection.check_request(resources, cpus=workers.cpus * count, gpus=workers.gpus * count)


@contextlib.contextmanager
def opened(job: Job, address: str | None) -> Iterator[DistributedRunner]:
    """A runner in a cluster of this machine's own, or in the one at `address`.

    Raises:
        ConfigError: no cluster answers, or the run does not fit into it.
    """
    with connection.connect(address) as resources:
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
        release(Path(self.job.folder))  # of a predecessor that was killed
        here = ray.get_runtime_context().get_node_id()
        # On this node, so that a lost node takes no bystander's session with it.
        self._session = WorkerSession.options(
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
        """evaluation.evaluate_checkpoint by one worker; the others must have ended."""
        job = self.job
        cpus, gpus = job.cpus_per_worker, job.gpus_per_worker
        return evaluate(
            str(folder), job.data_folder, split, cpus=cpus, gpus=gpus, places=job.places
        )

    def save_into(self, folder: Path) -> None:
        """Copy the last checkpoint; the workers rest, so that it is the present state."""
        folder_of_last = Path(self.job.folder) / keys.LAST_DIR
        self.job.places.pull(folder_of_last)
        last = open_checkpoint(folder_of_last)
        shutil.copytree(last.folder, folder, dirs_exist_ok=True)

    def load_from(self, folder: Path) -> None:
        """Go on from another checkpoint."""
        self.close()
        copy_folder(open_checkpoint(folder).folder, Path(self.job.folder) / keys.LAST_DIR)

    def close(self) -> None:
        """End all workers: at once where they are at work, in good order where they rest."""
        session, self._session = self._session, None
        if session is None:
            return
        with contextlib.suppress(RayError):
            if ray.get(session.stop.remote()):
                ray.wait([self._fitting], timeout=_CLOSE_SECONDS)
        ray.kill(session)
        release(Path(self.job.folder))
        shutil.rmtree(Path(self.job.folder) / RAY_DIR, ignore_errors=True)
