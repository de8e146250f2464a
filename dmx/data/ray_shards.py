"""Make shards on a Ray cluster: one task per shard, its bytes come back, the driver writes them.

The only file below the study layer that knows Ray, and it is imported only when an address is
given. Nodes need no shared file system.
"""

from __future__ import annotations

import importlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

from dmx.data.shards import ShardPlan, load_maker, pack
from dmx.errors import DataError

log = logging.getLogger(__name__)
_TASKS_PER_CPU = 2
_CONNECT_SECONDS = 10.0
_PATIENCE_SECONDS = 30.0
_AGAIN_SECONDS = 180.0


def _make(maker: str, start: int, stop: int, arguments: dict[str, Any]) -> bytes:
    return pack(load_maker(maker)(start, stop, **arguments))


def ray_shards(plan: ShardPlan, shards: list[int], address: str) -> Iterator[tuple[int, bytes]]:
    """(shard, content) as the cluster at `address` finishes them, in any order.

    Raises:
        DataError: Ray is not installed, the cluster does not answer, or a task failed.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise DataError("--address needs Ray; run: pip install dmx-lra") from error
    started = not ray.is_initialized()
    if started:
        _check_reachable(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"No Ray cluster answers at {address!r}: {reason}") from error
    try:
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if not cpus:
            raise DataError(
                f"the Ray cluster at {address!r} has no CPU, and each shard is made by one; start "
                "a node with CPUs, or leave --address out."
            )
        log.info("making %s on %d CPUs of the Ray cluster", plan.store.name, cpus)
        # A node that dies takes its tasks along; Ray runs them again elsewhere.
        make = ray.remote(num_cpus=1, max_retries=3)(_make)
        todo = list(reversed(shards))
        running: dict[Any, int] = {}
        while todo or running:
            while todo and len(running) < cpus * _TASKS_PER_CPU:
                shard = todo.pop()
                start, stop = plan.bounds(shard)
                running[make.remote(plan.maker, start, stop, dict(plan.arguments))] = shard
            ready = _first(ray, list(running), cpus, _PATIENCE_SECONDS)
            shard = running.pop(ready)
            try:
                content = ray.get(ready)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise DataError(
                    f"A Ray task failed while making {plan.store.name}: {reason} What is done is "
                    "kept; run the same command again."
                ) from error
            yield shard, content
    finally:
        if started:
            ray.shutdown()


def _first(ray: Any, running: list[Any], cpus: int, seconds: float) -> Any:
    """The first that is done; says what is free where none is after so long, and again later."""
    waited = 0.0
    while True:
        done, _ = ray.wait(running, num_returns=1, timeout=seconds)
        if done:
            return done[0]
        waited, seconds = waited + seconds, max(seconds, _AGAIN_SECONDS)
        free = ray.available_resources().get("CPU", 0.0)
        log.warning(
            "no shard of data came back for %.0f s: each asks for 1 CPU, and %g of the cluster's "
            "%d are free; they wait for room where other work holds the rest.",
            waited,
            free,
            cpus,
        )


def _check_reachable(address: str) -> None:
    """Raise DataError at once when nothing listens at host:port; Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto" or "local"
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise DataError(f"No Ray cluster answers at {address!r}: {error}") from error
