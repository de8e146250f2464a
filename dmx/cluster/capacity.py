"""What a cluster has: room for work, what waits for it and what holds it, trials that share a GPU.

Ray's public state API needs a dashboard, which a private Ray has not. The tables behind it do not:
`snapshot` and `_may_grow` are the only places that read them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dmx.config import RunConfig, parse_run_config
from dmx.costs.estimate import largest
from dmx.data.batches import Batch, make_batch
from dmx.data.store import Store, open_store
from dmx.errors import ConfigError
from dmx.process import num_cores
from dmx.schema import to_dict
from dmx.training.job import Workers
from dmx.training.trainer import Trainer

import ray  # isort: skip

logger = logging.getLogger("dmx.cluster")


# -- what there is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """CPU cores and GPUs of the whole cluster, and of each node; () is one machine.

    `grows`: an autoscaler may add nodes.
    """

    num_cpus: int
    num_gpus: int
    nodes: tuple[tuple[float, float], ...] = ()
    grows: bool = False

    def slots(self, *, cpus: float, gpus: float) -> int:
        """How many processes of this size have room at once, each on one node."""
        nodes = self.nodes or ((self.num_cpus, self.num_gpus),)
        return sum(_slots(*node, cpus=cpus, gpus=gpus) for node in nodes)


def _slots(num_cpus: float, num_gpus: float, *, cpus: float, gpus: float) -> int:
    rooms = [num_cpus / cpus] if cpus else []
    if gpus >= 1:
        rooms.append(num_gpus / gpus)
    elif gpus:  # a share is of one GPU
        rooms.append(int(num_gpus) * int(1 / gpus + 1e-9))
    return int(min(rooms, default=10.0**6) + 1e-9)


def local_resources() -> Resources:
    """Cores (of this process's affinity) and GPUs of this machine, without starting Ray."""
    return Resources(num_cores(), torch.cuda.device_count())


def resources() -> Resources:
    """What the connected cluster has."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple((has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in alive)
    cpus, gpus = (int(sum(node[kind] for node in nodes)) for kind in (0, 1))
    return Resources(cpus, gpus, nodes, grows=_may_grow())


def _may_grow() -> bool:
    """Whether an autoscaler has told the connected cluster that it may add nodes."""
    try:
        state: Any = importlib.import_module("ray._private.state").state
        return state.get_max_resources_from_cluster_config() is not None
    except Exception:  # another Ray, or none: what there is counts
        return False


def check_request(resources: Resources, *, cpus: float, gpus: float, workers: int = 1) -> int:
    """How many trials of this size, each by so many workers, run at once.

    Raises:
        ConfigError: not even one fits, and the cluster will not grow; Ray would wait for ever.
    """
    slots = resources.slots(cpus=cpus / workers, gpus=gpus / workers) // workers
    if slots or resources.grows:
        return max(slots, 1)
    for kind, asked, there, remedy in (
        ("GPUs", gpus, resources.num_gpus, "--gpus-per-trial or raise --trials-per-gpu"),
        ("CPUs", cpus, resources.num_cpus, "--cpus-per-trial"),
    ):
        if asked > there:
            raise ConfigError(
                f"a trial asks for {asked:g} {kind}, but the cluster has {there}; lower {remedy}."
            )
    each = amount(cpus / workers, gpus / workers)
    asks = f"a trial asks for {each}"
    if workers > 1:
        asks = f"{workers} workers of a trial ask for {each} each"
    nodes = ", or ".join(amount(*node) for node in sorted(set(resources.nodes)))
    raise ConfigError(
        f"{asks}, each on one node, but the cluster's nodes have {nodes}; lower --cpus-per-trial "
        "or --gpus-per-trial."
    )


def check_room(workers: Workers, resources: Resources) -> int:
    """check_request for runs of these workers."""
    cpus, gpus = workers.cpus * workers.count, workers.gpus * workers.count
    return check_request(resources, cpus=cpus, gpus=gpus, workers=workers.count)


def hide_unreserved_gpus() -> None:
    """Within Ray's work that has no GPU: let the process see none, so that `auto` is the CPU.

    Ray leaves all of a node's GPUs visible to work that asked for none, and others have them.
    """
    if not ray.is_initialized():
        return
    context = ray.get_runtime_context()
    if context.get_task_id() is not None and not context.get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# -- what waits ---------------------------------------------------------------------------------

_AFTER_SECONDS, _AGAIN_SECONDS = 30.0, 180.0
_LOOK_SECONDS = 5.0
_THREAD = "dmx-room-watch"
_WHAT = {
    "GangMember": "worker of a run",
    "_RunActor": "run",
    "TrialTrainable": "trial",
    "_evaluate": "evaluation",
    "_measure": "test",
    "_make": "shard of data",
    "peak_usage": "measurement of a trial's memory",
}
"""What users call it: by the name of an actor's class, or of a task's function."""


class Work(NamedTuple):
    """Work that waits for room, or has it. `job`: Ray's, with what started it."""

    what: str
    cpus: float
    gpus: float
    job: str = ""


class Snapshot(NamedTuple):
    """The cluster at one moment.

    Attributes:
        waiting: of this driver, by id. holding: of anyone. free, total: (CPUs, GPUs).
        largest: the most CPUs and the most GPUs that are free on one node.
    """

    waiting: Mapping[str, Work]
    holding: tuple[Work, ...]
    free: tuple[float, float]
    total: tuple[float, float]
    largest: tuple[float, float]


def amount(cpus: float, gpus: float) -> str:
    """`2 CPUs and 1 GPU`; what is zero is left out, unless both are."""
    parts = [f"{cpus:g} CPU{'s' * (cpus != 1)}"] if cpus or not gpus else []
    parts += [f"{gpus:g} GPU{'s' * (gpus != 1)}"] if gpus else []
    return " and ".join(parts)


def describe(seen: Snapshot, seconds: float) -> str:
    """What is asked for, what is free, what holds the rest, and what would help."""
    asked = Counter(f"{w.what} of {amount(w.cpus, w.gpus)}" for w in seen.waiting.values())
    (cpus, gpus), (all_cpus, all_gpus) = seen.free, seen.total
    free = f"{cpus:g} of {all_cpus:g} CPUs"
    free += f" and {gpus:g} of {all_gpus:g} GPUs" if all_gpus else ""
    if any(w.cpus <= cpus and w.gpus <= gpus for w in seen.waiting.values()):
        free += f" (at most {amount(*seen.largest)} on one node)"  # it fits, but on no single one
    held: dict[tuple[str, str], list[Work]] = {}
    for work in seen.holding:
        held.setdefault((work.job, work.what), []).append(work)
    holders = [
        f"{len(works)} x {what} of {job} with "
        + amount(sum(w.cpus for w in works), sum(w.gpus for w in works))
        for (job, what), works in sorted(held.items())
    ]
    return (
        f"waiting for room in the cluster for {seconds:.0f} s: "
        + ", ".join(f"{count} x {what}" for what, count in sorted(asked.items()))
        + f". Free: {free}. Held by: {'; '.join(holders) or 'work that Ray does not list'}. "
        "It starts when some of these end, or when nodes are added."
    )


class RoomWatch:
    """Speaks of what has waited for long, and again from time to time.

    Args:
        look: the cluster now. after, again: seconds. clock: monotonic.
    """

    def __init__(
        self,
        look: Callable[[], Snapshot],
        *,
        after: float = _AFTER_SECONDS,
        again: float = _AGAIN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look, self._after, self._again, self._clock = look, after, again, clock
        self._since: dict[str, float] = {}
        self._spoke = -float("inf")

    def check(self) -> str | None:
        """What is to be said now; None for nothing."""
        now, seen = self._clock(), self._look()
        self._since = {key: self._since.get(key, now) for key in seen.waiting}
        late = {k: w for k, w in seen.waiting.items() if now - self._since[k] >= self._after}
        if not late or now - self._spoke < self._again:
            return None
        self._spoke = now
        longest = now - min(self._since[key] for key in late)
        return describe(seen._replace(waiting=late), longest)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within the block, what waits for room in the connected cluster is spoken of, once."""
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        yield
        return
    ended = threading.Event()
    watch = RoomWatch(snapshot)

    def work() -> None:
        while not ended.wait(_LOOK_SECONDS):
            try:
                text = watch.check()
            except Exception as error:  # another Ray's tables: the work itself goes on
                logger.debug("nothing can be said of what waits for room: %s", error)
                return
            if text is not None:
                logger.warning("%s", text)

    thread = threading.Thread(target=work, name=_THREAD, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=_LOOK_SECONDS)  # it must not ask a Ray that is shut down


def snapshot() -> Snapshot:
    """The connected cluster now; see Snapshot."""
    # Not public, and not missed by anything else: a Ray without them only says nothing.
    ray_state: Any = importlib.import_module("ray._private.state").state
    gcs: Any = importlib.import_module("ray.core.generated.gcs_pb2")
    common: Any = importlib.import_module("ray.core.generated.common_pb2")
    tables, own = ray_state._connect_and_get_accessor(), ray.get_runtime_context().get_job_id()
    starters = {job["JobID"]: _starter(job, own) for job in ray_state.job_table()}
    waiting: dict[str, Work] = {}
    holding: list[Work] = []

    def add(key: bytes, job: bytes, what: str, asks: Mapping[str, float], placed: bool) -> None:
        started_by = starters.get(job.hex(), f"job {job.hex()}")
        work = Work(what, asks.get("CPU", 0.0), asks.get("GPU", 0.0), started_by)
        if not placed and job.hex() == own:
            waiting[key.hex()] = work
        elif placed and (work.cpus or work.gpus):
            holding.append(work)

    actors = gcs.ActorTableData
    for actor in map(actors.FromString, tables.get_actor_table(None, None)):
        if actor.state in (actors.DEAD, actors.DEPENDENCIES_UNREADY):
            continue
        placed, asks = actor.state == actors.ALIVE or actor.pid != 0, actor.required_resources
        # One in a placement group asks for the group's resources, which have other names.
        if placed or {"CPU", "GPU"} & asks.keys():
            what = _WHAT.get(actor.class_name, f"actor {actor.class_name}")
            add(actor.actor_id, actor.job_id, what, asks, placed)
    groups = gcs.PlacementGroupTableData
    for group in map(groups.FromString, tables.get_placement_group_table()):
        if group.state == groups.REMOVED:
            continue
        total: Counter[str] = Counter()
        for bundle in group.bundles:
            total.update(dict(bundle.unit_resources))
        placed = group.state == groups.CREATED
        add(group.placement_group_id, group.creator_job_id, "trial", total, placed)
    for event in map(gcs.TaskEvents.FromString, tables.get_task_events() if _tasks else ()):
        task = event.task_info
        state = max(event.state_updates.state_ts_ns, default=0)
        if task.type == common.NORMAL_TASK and state not in (common.FINISHED, common.FAILED):
            what = _WHAT.get(task.name, f"task {task.name}")
            placed = state > common.PENDING_NODE_ASSIGNMENT
            add(event.task_id, event.job_id, what, task.required_resources, placed)
    nodes = ray_state.available_resources_per_node().values()
    rooms = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes] or [(0.0, 0.0)]
    (cpus, gpus), all_of = zip(*rooms, strict=True), ray.cluster_resources()
    return Snapshot(
        waiting=waiting,
        holding=tuple(holding),
        free=(sum(cpus), sum(gpus)),
        total=(all_of.get("CPU", 0.0), all_of.get("GPU", 0.0)),
        largest=(max(cpus), max(gpus)),
    )


def _starter(job: Mapping[str, Any], own: str) -> str:
    if job["JobID"] == own:
        return "this command"
    return f"job {job['JobID']} ({job.get('Entrypoint', '')!s:.60}, pid {job.get('DriverPid')})"


_tasks: list[object] = []
"""Tasks with CPUs that are waited for; Ray's table of them is long, and read only meanwhile."""


@contextlib.contextmanager
def for_task() -> Iterator[None]:
    """Around waiting for a task: whether it has room is then looked at, too."""
    mark = object()
    _tasks.append(mark)
    try:
        yield
    finally:
        _tasks.remove(mark)


# -- trials that share a GPU --------------------------------------------------------------------

AUTO = "auto"
_HEADROOM = 0.1
"""Share of a GPU that stays free: for longer batches, fragments, and other processes."""
_MOST = 16
"""More processes than this only take turns on a GPU's cores."""
_STEPS = 3


class Usage(NamedTuple):
    """Bytes of a GPU: what one trial's process took at its peak, and what there is."""

    peak: int
    total: int


def wanted_per_gpu(option: str | None) -> int | None:
    """The number that --trials-per-gpu gives; 1 for `auto`, until it is measured."""
    if option is None or option == AUTO:
        return None if option is None else 1
    try:
        return int(option)
    except ValueError:
        raise ConfigError(
            f"--trials-per-gpu is {option!r}; it must be a whole number, or auto."
        ) from None


def trials_that_fit(usage: Usage) -> int:
    """How many trials of this usage a GPU holds with some room to spare; at least one."""
    room = int(usage.total * (1.0 - _HEADROOM))
    return max(min(room // max(usage.peak, 1), _MOST), 1)


def measure_per_gpu(runs: Sequence[RunConfig], store: Store) -> int:
    """Trials per GPU, from a few steps of the largest of these runs on a GPU of the cluster.

    The largest is the one that keeps most for its backward pass, as costs count it.
    """
    remote = ray.remote(num_cpus=1, num_gpus=1, max_retries=1)(peak_usage)
    with for_task():
        usage = ray.get(remote.remote(to_dict(largest(runs, store)), str(store.folder)))
    count = trials_that_fit(usage)
    logger.info(
        "the largest trial takes %.1f of %.1f GB of a GPU: %d trials per GPU",
        *(usage.peak / 2**30, usage.total / 2**30, count),
    )
    return count


def peak_usage(run_config: Mapping[str, Any], data_folder: str) -> Usage:
    """Train a few steps on the longest examples on this process's GPU; see Usage.

    The evaluation has batches of its own size. A configuration that has to shrink either takes the
    GPU whole.
    """
    config = parse_run_config(run_config)
    with contextlib.closing(Trainer(config, open_store(Path(data_folder)))) as trainer:
        passes = trainer.passes
        batch = _longest(trainer, "train", config.train.batch_size)
        for _ in range(_STEPS):
            trainer.train_step(batch)
        trainer.model.eval()
        passes.score(_longest(trainer, "dev", passes.evaluation.size))
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        # The driver's own part of the process is in no count of torch's.
        context = total - free - torch.cuda.memory_reserved()
        shrunk = passes.micro.limit is not None or passes.evaluation.limit is not None
        return Usage(total if shrunk else torch.cuda.max_memory_reserved() + context, total)


def _longest(trainer: Trainer, split_name: str, count: int) -> Batch:
    split = trainer.store.split(split_name)
    order = np.argsort(split.lengths, kind="stable")[-count:]
    return make_batch(split, order, trainer.length).to(trainer.device)
