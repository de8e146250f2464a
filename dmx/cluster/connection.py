"""The connection to Ray: a private local cluster or a running one, and what it can offer."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmx.cluster import waiting
from dmx.errors import ConfigError, RunFailedError
from dmx.process import num_cores, own_signals, terminate_like_interrupt
from dmx.registry import page

import ray  # isort: skip
from ray._private import ray_constants, services  # isort: skip
from ray.exceptions import AuthenticationError, RayError  # isort: skip

logger = logging.getLogger("dmx.cluster")
__all__ = ["Resources", "check_request", "connect", "local_resources", "terminate_like_interrupt"]
ANSWER_SECONDS = 30.0
_SOCKET_BYTES = 107
"""Of a unix socket's path, on Linux."""
_LONGEST = "/session_2026-11-29_21-31-33_123456_1234567/sockets/plasma_store"
_SETTINGS = b"\4"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + bytes(5)
"""What a client of HTTP/2 says first; the fourth byte of the answer is SETTINGS, too."""
_TOKEN = Path(".ray", "auth_token")


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
            _reach(_resolved(address))
            with _ours():
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


@contextmanager
def _ours() -> Iterator[None]:
    """Within the block Ray starts or is joined; signals mean what they meant before, after it.

    Ray takes SIGTERM over, to end with a code of its own. A terminal that is closed sends SIGHUP to
    Ray's processes as well, which are to outlive it until the driver has stopped them in order.
    """
    own = {signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, own)  # a process inherits what is blocked
    try:
        with own_signals():
            yield
    except SystemExit:  # by Ray's handler
        raise KeyboardInterrupt from None
    finally:
        if not own & before:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, own)


def _unfit(folder: Path, *, make: bool) -> str | None:
    """Why Ray cannot keep its sockets and logs in a folder, or None; the folder is made.

    Args:
        make: whether the folder that it lies in may be missing.
    """
    room = _SOCKET_BYTES - len(_LONGEST)
    if len(os.fsencode(folder)) > room:
        return f"is longer than the {room - len('/ray')} bytes that leave room for a socket's name"
    if not folder.parent.exists() and not make:
        return "does not exist"
    private = folder.name != "ray"
    try:
        folder.mkdir(mode=0o700 if private else 0o777, parents=make, exist_ok=True)
        if private and folder.lstat().st_uid != os.getuid():
            return "holds a folder of another user"
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror})"


def ray_folder() -> str:
    """Where a private Ray keeps its sockets and logs: as Ray chooses, or where that is impossible,
    a short folder of this user.

    Raises:
        ConfigError: there is none.
    """
    wishes = [(name, os.environ.get(name)) for name in ("RAY_TMPDIR", "TMPDIR")]
    places = [(f"{name}={base}", name, base) for name, base in wishes if base]
    places += [(base, "", base) for base in ("/tmp", "/var/tmp", "/dev/shm")]
    refused: list[str] = []
    for shown, name, base in places:
        for last in ("ray", f"dmx-ray-{os.getuid()}"):
            folder = Path(base).absolute() / last
            why = _unfit(folder, make=name == "RAY_TMPDIR")
            if why is None:
                if refused and "=" in refused[0]:
                    logger.warning("%s; Ray's files go to %s", "; ".join(refused), folder)
                return str(folder)
        refused.append(f"{shown} {why}")
    raise ConfigError(
        f"Ray finds no folder for its sockets and logs: {'; '.join(refused)}; set RAY_TMPDIR to a "
        f"folder that can be written, with a path of at most "
        f"{_SOCKET_BYTES - len(_LONGEST) - len('/ray')} bytes."
    )


def _give_token() -> None:
    """A token for a private Ray where it cannot be kept in a home folder, as Ray does it."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    with suppress(OSError, RuntimeError):  # no home at all is the latter
        path = Path.home() / _TOKEN
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _start_here(**options: Any) -> None:
    """Start a private Ray, twice where the first is too slow.

    Ray gives its own processes 30 s to start, which a busy machine may need for them.

    Raises:
        RunFailedError: it does not start; nothing is lost by that.
    """
    folder = ray_folder()
    _give_token()
    for last in (False, True):
        try:
            with _on_loopback(), _ours():
                ray.init(
                    address="local",
                    _temp_dir=folder,
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
                    f"{folder}/session_latest/logs; on a busy machine, try again."
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


def _resolved(address: str) -> str:
    """HOST:PORT of the cluster that Ray would join, which may be one that is gone."""
    return address if "://" in address else services.canonicalize_bootstrap_address_or_die(address)


def _reach(address: str) -> None:
    """Look whether a Ray answers at HOST:PORT; Ray itself would try for many minutes.

    Its protocol rests on HTTP/2, whose servers greet whoever connects.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return
    why = "what listens there is no Ray"
    try:
        line = socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS)
        with line:
            line.sendall(_HELLO)
            said = line.recv(9)
    except TimeoutError:
        why = f"no answer within {ANSWER_SECONDS:.0f} s"
    except (OSError, OverflowError) as error:
        why = str(error)
    else:
        if said[3:4] == _SETTINGS or os.environ.get("RAY_USE_TLS", "0") != "0":
            return
    raise ConnectionError(f"{address}: {why}")


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
