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
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
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
            (ready,), _ = ray.wait(list(running), num_returns=1)
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


def _check_reachable(address: str) -> None:
    """Raise DataError at once when nothing listens at host:port; Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto" or "local"
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise DataError(f"No Ray cluster answers at {address!r}: {error}") from error
