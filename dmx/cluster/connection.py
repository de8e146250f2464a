"""The connection to Ray: a private local cluster or a running one, and what it can offer."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dmx.cli import terminate_like_interrupt
from dmx.cluster import waiting
from dmx.errors import ConfigError, RunFailedError
from dmx.resources import page
from dmx.training.workers import num_cores

import ray  # isort: skip
from ray._private import ray_constants  # isort: skip
from ray.exceptions import AuthenticationError, RayError  # isort: skip

logger = logging.getLogger("dmx.cluster")
__all__ = ["Resources", "check_request", "connect", "local_resources", "terminate_like_interrupt"]


@dataclass(frozen=True)
class Resources:
    """CPU cores and GPUs of the whole cluster, and of each node; () is one machine.

    `grows`: an autoscaler may add nodes.
    """

    num_cpus: int
    num_gpus: int
    nodes: tuple[tuple[float, float], ...] = ()
    grows: bool = False

    def places(self, *, cpus: float, gpus: float) -> int:
        """How many processes of this size have room at once, each on one node."""
        nodes = self.nodes or ((self.num_cpus, self.num_gpus),)
        return sum(_places(*node, cpus=cpus, gpus=gpus) for node in nodes)


def _places(num_cpus: float, num_gpus: float, *, cpus: float, gpus: float) -> int:
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


@contextmanager
def connect(address: str | None) -> Iterator[Resources]:
    """Within the block Ray is connected: to a private local cluster, or to `address`.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    if ray.is_initialized():  # a caller (tests, a notebook) brought its own cluster
        with waiting.watched():
            yield resources()
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address is None:
            here = local_resources()
            # "local" and not the default: a stale file of an older cluster must not be joined.
            _start_here(num_cpus=here.num_cpus, **options)
        else:
            _reach(address)
            ray.init(address=address, **options)
            if not _has_token():
                logger.warning(
                    "the cluster at %s was started without a token: whoever reaches its ports may "
                    "run code there (see %s)",
                    address,
                    page("security"),
                )
    except (ConnectionError, TimeoutError, ValueError, RuntimeError, RayError) as error:
        raise ConfigError(_why_not(address, error)) from None
    try:
        with waiting.watched():
            yield resources()
    finally:
        ray.shutdown()


def _start_here(**options: Any) -> None:
    """Start a private Ray, twice where the first is too slow.

    Ray gives its own processes 30 s to start, which a busy machine may need for them.

    Raises:
        RunFailedError: it does not start; nothing is lost by that.
    """
    for last in (False, True):
        try:
            with _on_loopback():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    dashboard_host="127.0.0.1",
                    **options,
                )
            return
        except Exception as error:
            if type(error) is not Exception:  # Ray has no type of its own for this
                raise
            ray.shutdown()
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if last:
                raise RunFailedError(
                    f"Ray did not start on this machine: {reason.rstrip('.')}. Its logs are in "
                    "/tmp/ray/session_latest/logs; on a busy machine, try again."
                ) from None
            logger.warning("Ray did not start in time; trying once more")


def _has_token() -> bool:
    """Whether this process shows a token; a cluster that wants one took it then."""
    mode = getattr(ray._raylet, "get_authentication_mode", None)
    known = getattr(ray._raylet, "AuthenticationMode", None)
    if mode is None or known is None:  # neither is public: another Ray may say nothing of it
        return True
    return bool(mode() != known.DISABLED)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Within the block Ray starts at 127.0.0.1, where no other host reaches it.

    It has a switch for this, for Windows and macOS, which is read when Ray is imported. A node
    address of 127.0.0.1 it replaces by the host's own, at which all its services listen.
    """
    switch = "ENABLE_RAY_CLUSTER"
    before = getattr(ray_constants, switch, True)
    setattr(ray_constants, switch, False)
    try:
        yield
    finally:
        setattr(ray_constants, switch, before)


def _why_not(address: str | None, error: BaseException) -> str:
    """What Ray's refusal means; it says so only in the error behind its error."""
    said = f"{error} {error.__cause__}"
    if isinstance(error, AuthenticationError) or "AuthToken" in said:
        return (
            f"the Ray cluster at --address {address} wants a token, and this host has another one "
            f"or none (see {page('security')})."
        )
    if "No node info found" in said:
        return (
            f"the Ray cluster at --address {address} has no node on this host, and a driver needs "
            f"one; start it without CPUs: ray start --address={address} --num-cpus=0"
        )
    return (
        f"no Ray cluster answers at --address {address}: {str(error).splitlines()[0]} "
        f"(one that wants a token may stay silent, too: see {page('security')})"
    )


def _reach(address: str) -> None:
    """Look whether someone listens at HOST:PORT; Ray itself would try for many minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(str(error)) from None


def resources() -> Resources:
    """What the connected cluster has."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple((has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in alive)
    return Resources(int(sum(n[0] for n in nodes)), int(sum(n[1] for n in nodes)), nodes)


def hide_unreserved_gpus() -> None:
    """Within Ray's work that has no GPU: let the process see none, so that `auto` is the CPU.

    Ray leaves all of a node's GPUs visible to work that asked for none, and others have them.
    """
    if not ray.is_initialized():
        return
    context = ray.get_runtime_context()
    if context.get_task_id() is not None and not context.get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def check_request(resources: Resources, *, cpus: float, gpus: float, workers: int = 1) -> int:
    """How many trials of this size, each by so many workers, run at once.

    Raises:
        ConfigError: not even one fits, and the cluster will not grow; Ray would wait for ever.
    """
    slots = resources.places(cpus=cpus / workers, gpus=gpus / workers) // workers
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
        f"{asks} for {waiting.amount(cpus / workers, gpus / workers)}{each}, each on one node, "
        "but the cluster's nodes have "
        f"{', or '.join(waiting.amount(*node) for node in nodes)}; lower --cpus-per-trial or "
        "--gpus-per-trial."
    )
