"""Says what has been waiting for room in the cluster for long, what is free, and who has the rest.

Ray's public state API needs a dashboard, which a private Ray has not. The tables behind it do not:
`look` is the only place that reads them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray  # isort: skip

logger = logging.getLogger("dmx.cluster")
AFTER_SECONDS = 30.0
AGAIN_SECONDS = 180.0
_LOOK_SECONDS = 5.0
_THREAD = "dmx-room-watch"
_WHAT = {
    "GangMember": "worker of a run",
    "_Actor": "run",
    "TrialTrainable": "trial",
    "_evaluate": "evaluation",
    "_measure": "test",
    "_make": "shard of data",
    "peak_usage": "measurement of a trial's memory",
}
"""What users call it: by the name of an actor's class, or of a task's function."""


@dataclass(frozen=True)
class Piece:
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
class Seen:
    """The cluster at one moment.

    Attributes:
        waiting: of this driver, by id. holding: of anyone. free, total: (CPUs, GPUs).
        largest: the most CPUs and the most GPUs that are free on one node.
    """

    waiting: Mapping[str, Piece]
    holding: tuple[Piece, ...]
    free: tuple[float, float]
    total: tuple[float, float]
    largest: tuple[float, float]


def amount(cpus: float, gpus: float) -> str:
    """`2 CPUs and 1 GPU`; what is zero is left out, unless both are."""
    parts = [f"{cpus:g} CPU{'s' * (cpus != 1)}"] if cpus or not gpus else []
    parts += [f"{gpus:g} GPU{'s' * (gpus != 1)}"] if gpus else []
    return " and ".join(parts)


def describe(seen: Seen, seconds: float) -> str:
    """What is asked, what is free, who holds the rest, and what would help."""
    asked = Counter(f"{p.what} of {p.size}" for p in seen.waiting.values())
    (cpus, gpus), (all_cpus, all_gpus) = seen.free, seen.total
    free = f"{cpus:g} of {all_cpus:g} CPUs"
    free += f" and {gpus:g} of {all_gpus:g} GPUs" if all_gpus else ""
    fits = any(p.cpus <= cpus and p.gpus <= gpus for p in seen.waiting.values())
    if fits:  # in all, but on no single node
        free += f" (at most {amount(*seen.largest)} on one node)"
    held: dict[tuple[str, str], list[Piece]] = {}
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
        look: Callable[[], Seen],
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
        return describe(Seen(late, seen.holding, seen.free, seen.total, seen.largest), longest)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within the block, what waits for room in the connected cluster is spoken of, once."""
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        yield
        return
    ended = threading.Event()
    watch = RoomWatch(look)

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


def look() -> Seen:
    """The connected cluster now; see Seen."""
    # Not public, and not missed by anything else: a Ray without them only says nothing.
    ray_state: Any = importlib.import_module("ray._private.state").state
    gcs: Any = importlib.import_module("ray.core.generated.gcs_pb2")
    common: Any = importlib.import_module("ray.core.generated.common_pb2")
    tables, own = ray_state._connect_and_get_accessor(), ray.get_runtime_context().get_job_id()
    starters = {job["JobID"]: _starter(job, own) for job in ray_state.job_table()}
    waiting: dict[str, Piece] = {}
    holding: list[Piece] = []

    def add(key: str, what: str, resources: Mapping[str, float], job: str, placed: bool) -> None:
        cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        piece = Piece(what, cpus, gpus, starters.get(job, f"job {job}"))
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
    return Seen(
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


def may_grow() -> bool:
    """Whether an autoscaler has told the connected cluster that it may add nodes."""
    try:
        state: Any = importlib.import_module("ray._private.state").state
        return state.get_max_resources_from_cluster_config() is not None
    except Exception:  # another Ray, or none: what there is counts
        return False
