"""Runs in processes of their own: one Ray actor, or a gang of them that shares a run's work.

The members of a gang are plain actors that are started and lost together.
There is no placement group: Ray removes one with the job of its creator, not with the actor that
created it, so that a trial whose process is killed would leave its room reserved. Actors end with
the process that owns them, however that ends, also where they still wait for room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dmx import terminal
from dmx.cluster import capacity
from dmx.runs.layout import DEV_ACCURACY, FAILURE, RESUMABLE, STEPS, UNDER_WAY
from dmx.training.evaluation import EvaluationJob, evaluate_checkpoint
from dmx.training.job import Job, Workers
from dmx.training.passes import Evaluation
from dmx.training.process_group import TorchProcessGroup
from dmx.training.runner import Runner

import psutil  # isort: skip  Ray brings its own
import ray  # isort: skip
import torch.distributed as dist  # isort: skip
from ray.exceptions import (  # isort: skip
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # isort: skip

logger = logging.getLogger("dmx.cluster")
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
FORM_SECONDS = 30.0
"""After the first member has room, the others have so long; then the gang is a smaller one."""
_JOIN_SECONDS = 60.0
_EXCHANGE_SECONDS = 1800.0
_CLOSE_SECONDS = 10.0
_MAX_RESTARTS, _MAX_DEATHS = 3, 5
"""Gangs, and processes of a run, that may die one after another without a further report."""


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an IP address; None where none has."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def use_node_interface() -> None:
    """Let gloo listen where Ray does, unless the user has said where.

    Gloo listens at what the host's name resolves to. That is often an address of this host alone:
    Debian's installer writes `127.0.1.1 NAME` into /etc/hosts. Others then cannot connect.
    """
    if GLOO_INTERFACE not in os.environ:
        name = interface_of(ray.util.get_node_ip_address())
        if name is not None:
            os.environ[GLOO_INTERFACE] = name


class GangMember:
    """One process of a gang: a Runner that takes its share of every batch."""

    def __init__(self) -> None:
        terminal.setup_logging()
        capacity.hide_unreserved_gpus()
        self._store: dist.TCPStore | None = None
        self._job: Job | None = None
        self._runner: Runner | None = None

    def node(self) -> str:
        """The id of its node; that it answers says that it has room."""
        return str(ray.get_runtime_context().get_node_id())

    def listen(self, size: int) -> tuple[str, int]:
        """Rank 0 only: open a meeting point for `size` members, at this node's own address."""
        host = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.create_server((host, 0), family=family)
        port = int(server.getsockname()[1])
        self._store = _store(host, port, size, listener=server.detach())
        return host, port

    def join(self, job: Job, meet: tuple[str, int], rank: int, size: int) -> None:
        """Meet the others."""
        use_node_interface()
        # Ray shows each member its own GPU only, so that NCCL and the run find it as `cuda`.
        dist.init_process_group(
            "nccl" if job.workers.gpus else "gloo",
            store=self._store or _store(*meet, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=_EXCHANGE_SECONDS),
        )
        self._job = job

    def step(self) -> dict[str, Any]:
        """See Runner.step. The first builds the run, or continues it from its last checkpoint."""
        if self._runner is None:
            assert self._job is not None
            self._runner = Runner(self._job, group=TorchProcessGroup())
        return self._runner.step()

    def close(self) -> None:
        """Give the run's folder back."""
        if self._runner is not None:
            self._runner.close()


_RemoteMember: Any = ray.remote(max_restarts=0)(GangMember)


def _store(host: str, port: int, size: int, listener: int | None = None) -> dist.TCPStore:
    return dist.TCPStore(
        host,
        port,
        size,
        is_master=listener is not None,
        timeout=timedelta(seconds=_JOIN_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listener,
    )


class Gang:
    """A Runner whose work is done by `job.workers.count` processes, wherever the cluster has room.

    Each `step` lets the members train to the next evaluation, or for one slice, and no further:
    there they can be closed, and what they have trained is on disk. When one dies, all are started
    again from the last checkpoint, as many as there is room for. The batches stay the same, only
    the shares grow. A member that found no room keeps waiting for it, and joins between two steps.

    Args:
        form_seconds: see FORM_SECONDS.
    """

    def __init__(self, job: Job, *, form_seconds: float = FORM_SECONDS) -> None:
        self.job = job
        self._form_seconds = form_seconds
        self._members: list[Any] = []
        self._waiting: dict[Any, Any] = {}  # members without a place in the group, by `node()`
        self._enough: float | None = None  # from then on some members are enough
        self._resting = False  # between two steps
        self._formed = False  # ever
        self._deaths = 0  # since the latest report
        self._steps = -1  # of the latest report

    def step(self) -> dict[str, Any]:
        """See Runner.step. With `lost` where the members died again and again."""
        while True:
            try:
                report = self._advance()
            except RayError as error:
                self._end()
                self._deaths += 1
                if self._deaths <= _MAX_RESTARTS:
                    continue
                failure = (
                    f"its workers died {self._deaths} times without getting any further, "
                    f"last: {last_line(error)}"
                )
                end = {FAILURE: failure, RESUMABLE: True, "done": True}
                return {STEPS: max(self._steps, 0), DEV_ACCURACY: 0.0, **end}
            if FAILURE in report:
                self._end()
                return report
            if UNDER_WAY in report:
                return report
            if report[STEPS] > self._steps:  # else it is known, repeated after a restart
                self._steps, self._deaths = report[STEPS], 0
                return report

    def _advance(self) -> dict[str, Any]:
        """The leader's next report, or that of the first member that fails."""
        if self._members and self._with_room():
            self._rest()  # so that they start again together
        self._resting = False
        if not self._members and not self._form():
            under_way = {UNDER_WAY: True, "done": False}
            return {STEPS: max(self._steps, 0), DEV_ACCURACY: 0.0, **under_way}
        pending = [member.step.remote() for member in self._members]
        reports = {}
        leader = pending[0]
        while pending:
            ready, pending = ray.wait(pending, num_returns=1)
            report: dict[str, Any] = ray.get(ready[0])
            if FAILURE in report:  # the others may wait for this one
                return report
            reports[ready[0]] = report
        self._resting = True
        return reports[leader]

    # -- forming ----------------------------------------------------------------------------

    def _form(self) -> bool:
        """Start the members that are missing, wait for their room, and let them meet.

        Returns:
            False where there was no room within a slice: the next call waits on.
        """
        pause = time.monotonic() + (self.job.slice_seconds or math.inf)
        first: str | None = None
        while len(self._waiting) < self.job.workers.count:
            while self._waiting and first is None:
                for place in ray.wait(list(self._waiting), num_returns=1, timeout=1.0)[0]:
                    first = ray.get(place)
                if first is None and time.monotonic() > pause:
                    return False
            self._start_member(near=first)
        if not self._wait_for_room(pause):
            return False
        nodes = self._with_room()
        # Neighbours on a node are neighbours in rank: what goes around leaves each node once.
        self._members = [self._waiting.pop(place) for place in sorted(nodes, key=nodes.__getitem__)]
        size = len(self._members)
        job = dataclasses.replace(self.job, takes_over=self.job.takes_over or self._formed)
        self._formed = True
        meet = ray.get(self._members[0].listen.remote(size), timeout=_JOIN_SECONDS)
        joins = [m.join.remote(job, meet, rank, size) for rank, m in enumerate(self._members)]
        ray.get(joins, timeout=_JOIN_SECONDS)
        return True

    def _start_member(self, *, near: str | None) -> None:
        """One more; on that node where it has room, and never in its trial's placement group."""
        strategy: Any = "DEFAULT"
        if near is not None:
            strategy = NodeAffinitySchedulingStrategy(near, soft=True, _spill_on_unavailable=True)
        member = _RemoteMember.options(
            num_cpus=self.job.workers.cpus,
            num_gpus=self.job.workers.gpus,
            scheduling_strategy=strategy,
        ).remote()
        self._waiting[member.node.remote()] = member

    def _wait_for_room(self, pause: float) -> bool:
        """Until all members have room that the cluster can ever hold; or, after a while, some."""
        if self._enough is None:
            self._enough = time.monotonic() + self._form_seconds
        while True:
            each = self.job.workers
            fitting = capacity.resources().slots(cpus=each.cpus, gpus=each.gpus)
            wanted = max(min(fitting, each.count), 1)
            ready, _ = ray.wait(list(self._waiting), num_returns=wanted, timeout=1.0)
            if len(ready) >= wanted or (ready and time.monotonic() > self._enough):
                self._enough = None
                return True
            if time.monotonic() > pause:
                return False

    def _with_room(self) -> dict[Any, str]:
        """The waiting members that have room, and their nodes; dead ones are forgotten."""
        if not self._waiting:
            return {}
        nodes = {}
        count = len(self._waiting)
        for place in ray.wait(list(self._waiting), num_returns=count, timeout=0)[0]:
            try:
                nodes[place] = ray.get(place)
            except RayError:
                del self._waiting[place]
        return nodes

    # -- ends -------------------------------------------------------------------------------

    def _rest(self) -> None:
        """End members that rest, in good order."""
        closing = [member.close.remote() for member in self._members]
        ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        self._end()

    def _end(self) -> None:
        """End the members at once."""
        members, self._members, self._resting = self._members, [], False
        for member in members:
            ray.kill(member)
        self._with_room()

    def close(self) -> None:
        """End all: at once where they are at work, in good order where they rest."""
        with contextlib.suppress(RayError):
            if self._resting:
                self._rest()
            self._end()
            for member in self._waiting.values():
                ray.kill(member)
        self._waiting.clear()


def last_line(error: RayError) -> str:
    """Of what Ray says: the exception itself."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def runner_of(job: Job) -> Runner | Gang:
    """Whatever runs the job: this process, or several others."""
    return Runner(job) if job.workers.count == 1 else Gang(job)


def _evaluate(*arguments: Any) -> Evaluation:
    capacity.hide_unreserved_gpus()
    return evaluate_checkpoint(*arguments)


def evaluate(wanted: EvaluationJob, worker: Workers) -> Evaluation:
    """evaluate_checkpoint as a Ray task; waits for it. Retried when its process or node dies."""
    remote: Any = ray.remote(num_cpus=worker.cpus, num_gpus=worker.gpus, max_retries=3)(_evaluate)
    with capacity.for_task():
        result: Evaluation = ray.get(remote.remote(wanted, worker.threads))
    return result


# -- runs that are watched from outside --------------------------------------------------------

_STOP_SECONDS = 20.0
_SLICE_SECONDS = 2.0
"""How long a run that is told to stop trains on at most, beside the step that is under way."""


class _RunActor:
    """A Runner in its own process."""

    def __init__(self, job: Job) -> None:
        terminal.setup_logging()
        capacity.hide_unreserved_gpus()
        self._runner = runner_of(job)

    def step(self) -> dict[str, Any]:
        return self._runner.step()

    def close(self) -> None:
        self._runner.close()


@dataclass
class Running:
    """A run under way.

    Attributes:
        restarts: processes that it has lost since it last got further. steps: of its latest report.
    """

    job: Job
    restarts: int = 0
    steps: int = -1
    actor: Any = None
    future: Any = None


def start(job: Job) -> Running:
    """Launch a run; it starts as soon as the cluster has room."""
    running = Running(dataclasses.replace(job, slice_seconds=_SLICE_SECONDS))
    _launch(running)
    return running


def _launch(running: Running) -> None:
    job = running.job
    # Several have the CPUs and GPUs themselves, and this process only waits.
    own = job.workers if job.workers.count == 1 else Workers(cpus=0, gpus=0)
    remote = ray.remote(num_cpus=own.cpus, num_gpus=own.gpus, max_restarts=0)(_RunActor)
    running.actor = remote.remote(job)
    running.future = running.actor.step.remote()


def wait_any(
    runs: list[Running], *, timeout_seconds: float
) -> list[tuple[Running, dict[str, Any]]]:
    """Reports that came in; empty after the timeout. A dead process is started again by itself.

    A run trains on at the next call: what it reported is written down before it gets ahead of
    that, since after a crash only its last report is repeated. A report with `done` is the last.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        for running in runs:
            if running.future is None:
                running.future = running.actor.step.remote()
        left = max(deadline - time.monotonic(), 0.0)
        ready, _ = ray.wait([r.future for r in runs], num_returns=1, timeout=left)
        if not ready:
            return []
        answers = [(run, _next_report(run)) for run in runs if run.future in ready]
        reports = [(run, report) for run, report in answers if report is not None]
        if reports:  # else a slice has ended, or a process is started again
            return reports


def _next_report(running: Running) -> dict[str, Any] | None:
    """What a run's process has answered; None for the end of a slice."""
    try:
        report: dict[str, Any] = ray.get(running.future)
    except (RayActorError, WorkerCrashedError, RayTaskError) as error:
        running.restarts += 1
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if running.restarts > _MAX_DEATHS:
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
        running.future = None
    return None if report.get(UNDER_WAY) else report


def stop(*runs: Running) -> None:
    """End runs' processes, and all that they own; what they have trained is kept, for a while."""
    closing = []
    for running in runs:
        with contextlib.suppress(RayError):
            closing.append(running.actor.close.remote())
    with contextlib.suppress(RayError):
        ray.wait(closing, num_returns=len(closing), timeout=_STOP_SECONDS) if closing else None
    for running in runs:
        with contextlib.suppress(RayError, ValueError):
            ray.kill(running.actor, no_restart=True)
