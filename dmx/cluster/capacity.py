"""What a cluster has: room for work, what waits for it, and what holds it.

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dmx.errors import ConfigError
from dmx.process import num_cores
from dmx.training.job import Workers

import ray  # isort: skip

logger = logging.getLogger("dmx.cluster")
AFTER_SECONDS = 30.0
AGAIN_SECONDS = 180.0
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
    import torch

    return Resources(num_cores(), torch.cuda.device_count())


def resources() -> Resources:
    """What the connected cluster has."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple((has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in alive)
    return Resources(
        num_cpus=int(sum(node[0] for node in nodes)),
        num_gpus=int(sum(node[1] for node in nodes)),
        nodes=nodes,
        grows=_may_grow(),
    )


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
    if gpus > resources.num_gpus:
        raise ConfigError(
            f"a trial asks for {gpus:g} GPUs, but the cluster has {resources.num_gpus}; "
            "lower --gpus-per-trial or raise --trials-per-gpu."
        )
    if cpus > resources.num_cpus:
        raise ConfigError(
            f"a trial asks for {cpus:g} CPUs, but the cluster has {resources.num_cpus}; "
            "lower --cpus-per-trial."
        )
    asks = f"{workers} workers of a trial ask" if workers > 1 else "a trial asks"
    each = " each" if workers > 1 else ""
    nodes = sorted(set(resources.nodes))
    raise ConfigError(
        f"{asks} for {amount(cpus / workers, gpus / workers)}{each}, each on one node, "
        "but the cluster's nodes have "
        f"{', or '.join(amount(*node) for node in nodes)}; lower --cpus-per-trial or "
        "--gpus-per-trial."
    )


def hide_unreserved_gpus() -> None:
    """Within Ray's work that has no GPU: let the process see none, so that `auto` is the CPU.

    Ray leaves all of a node's GPUs visible to work that asked for none, and others have them.
    """
    if not ray.is_initialized():
        return
    context = ray.get_runtime_context()
    if context.get_task_id() is not None and not context.get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def check_room(workers: Workers, resources: Resources) -> None:
    """Whether a run of these workers fits.

    Raises:
        ConfigError: it does not; Ray would wait for ever.
    """
    count = workers.count
    cpus, gpus = workers.cpus * count, workers.gpus * count
    check_request(resources, cpus=cpus, gpus=gpus, workers=count)


# -- what waits --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Work that waits for room, or has it. `job`: Ray's, with what started it."""

    what: str
    cpus: float
    gpus: float
    job: str = ""

    @property
    def size(self) -> str:
        """For people: `2 CPUs and 1 GPU`."""
        return amount(self.cpus, self.gpus)


@dataclass(frozen=True)
class Snapshot:
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
    asked = Counter(f"{p.what} of {p.size}" for p in seen.waiting.values())
    (cpus, gpus), (all_cpus, all_gpus) = seen.free, seen.total
    free = f"{cpus:g} of {all_cpus:g} CPUs"
    free += f" and {gpus:g} of {all_gpus:g} GPUs" if all_gpus else ""
    fits = any(p.cpus <= cpus and p.gpus <= gpus for p in seen.waiting.values())
    if fits:  # in all, but on no single node
        free += f" (at most {amount(*seen.largest)} on one node)"
    held: dict[tuple[str, str], list[Work]] = {}
    for piece in seen.holding:
        held.setdefault((piece.job, piece.what), []).append(piece)
    holders = [
        f"{len(pieces)} x {what} of {job} with "
        + amount(sum(p.cpus for p in pieces), sum(p.gpus for p in pieces))
        for (job, what), pieces in sorted(held.items())
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
        after: float = AFTER_SECONDS,
        again: float = AGAIN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look, self._after, self._again, self._clock = look, after, again, clock
        self._since: dict[str, float] = {}
        self._spoke = -float("inf")

    def check(self) -> str | None:
        """What is to be said now; None for nothing."""
        now, seen = self._clock(), self._look()
        self._since = {key: self._since.get(key, now) for key in seen.waiting}
        late = {k: p for k, p in seen.waiting.items() if now - self._since[k] >= self._after}
        if not late or now - self._spoke < self._again:
            return None
        self._spoke = now
        longest = now - min(self._since[key] for key in late)
        return describe(Snapshot(late, seen.holding, seen.free, seen.total, seen.largest), longest)


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

    def add(key: str, what: str, resources: Mapping[str, float], job: str, placed: bool) -> None:
        cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        piece = Work(what, cpus, gpus, starters.get(job, f"job {job}"))
        if not placed and job == own:
            waiting[key] = piece
        elif placed and (cpus or gpus):
            holding.append(piece)

    actors = gcs.ActorTableData
    for raw in tables.get_actor_table(None, None):
        actor = actors.FromString(raw)
        if actor.state == actors.DEAD:
            continue
        placed = actor.state == actors.ALIVE or actor.pid != 0
        if actor.state == actors.DEPENDENCIES_UNREADY:
            continue
        # One in a placement group asks for the group's resources, which have other names.
        if not placed and not {"CPU", "GPU"} & actor.required_resources.keys():
            continue
        what = _WHAT.get(actor.class_name, f"actor {actor.class_name}")
        add(actor.actor_id.hex(), what, actor.required_resources, actor.job_id.hex(), placed)
    groups = gcs.PlacementGroupTableData
    for raw in tables.get_placement_group_table():
        group = groups.FromString(raw)
        if group.state == groups.REMOVED:
            continue
        total: Counter[str] = Counter()
        for bundle in group.bundles:
            total.update(dict(bundle.unit_resources))
        key, job = group.placement_group_id.hex(), group.creator_job_id.hex()
        add(key, "trial", total, job, group.state == groups.CREATED)
    if _tasks:
        for raw in tables.get_task_events():
            event = gcs.TaskEvents.FromString(raw)
            state = max(event.state_updates.state_ts_ns, default=0)
            ended = state in (common.FINISHED, common.FAILED)
            if event.task_info.type != common.NORMAL_TASK or ended:
                continue
            what = _WHAT.get(event.task_info.name, f"task {event.task_info.name}")
            placed = state > common.PENDING_NODE_ASSIGNMENT
            key, job = event.task_id.hex(), event.job_id.hex()
            add(key, what, event.task_info.required_resources, job, placed)
    nodes = ray_state.available_resources_per_node().values()
    rooms = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]
    all_of = ray.cluster_resources()
    return Snapshot(
        waiting=waiting,
        holding=tuple(holding),
        free=(sum(r[0] for r in rooms), sum(r[1] for r in rooms)),
        total=(all_of.get("CPU", 0.0), all_of.get("GPU", 0.0)),
        largest=(max((r[0] for r in rooms), default=0), max((r[1] for r in rooms), default=0)),
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
