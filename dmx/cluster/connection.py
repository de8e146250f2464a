"""The connection to Ray: a private local cluster, or a running one."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmx.cluster import capacity
from dmx.cluster.capacity import Resources
from dmx.cluster.gang import Gang
from dmx.errors import ConfigError, RunFailedError
from dmx.process import own_signals
from dmx.registry import page
from dmx.training.job import Job

import ray  # isort: skip
from ray._private import ray_constants, services  # isort: skip
from ray.exceptions import AuthenticationError, RayError  # isort: skip

logger = logging.getLogger("dmx.cluster")
ANSWER_SECONDS = 30.0
_SOCKET_BYTES = 107
"""Of a unix socket's path, on Linux."""
_LONGEST = "/session_2026-11-29_21-31-33_123456_1234567/sockets/plasma_store"
_SETTINGS = b"\4"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + bytes(5)
"""What a client of HTTP/2 says first; the fourth byte of the answer is SETTINGS, too."""
_TOKEN = Path(".ray", "auth_token")


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[Resources]:
    """Within the block Ray is connected: to a private local cluster, or to `address`.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():  # else a caller (tests, a notebook) brought its own cluster
            options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
            try:
                if address is None:
                    _start_here(num_cpus=capacity.local_resources().num_cpus, **options)
                else:
                    _join(address, **options)
            except (ConnectionError, TimeoutError, ValueError, RuntimeError, RayError) as error:
                raise ConfigError(_why_not(address, error)) from None
            stack.callback(ray.shutdown)
        stack.enter_context(capacity.watched())
        yield capacity.resources()


def _join(address: str, **options: Any) -> None:
    _reach(_resolved(address))
    with _ours():
        ray.init(address=address, **options)
    if not _has_token():
        logger.warning(
            "the cluster at %s was started without a token: whoever reaches its ports may run code "
            "there (see %s)",
            *(address, page("security")),
        )


@contextlib.contextmanager
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

    `make`: the folder that it lies in may be missing.
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
    with contextlib.suppress(OSError, RuntimeError):  # no home at all is the latter
        path = Path.home() / _TOKEN
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _start_here(**options: Any) -> None:
    """Start a private Ray, twice where the first is too slow.

    Ray gives its own processes 30 s to start, which a busy machine may need for them.
    """
    folder = ray_folder()
    _give_token()
    for last in (False, True):
        try:
            with _on_loopback(), _ours():
                ray.init(
                    address="local",  # not the default: an older cluster's file may be there
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


@contextlib.contextmanager
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

    Its protocol rests on HTTP/2, whose servers greet every client.
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


@contextlib.contextmanager
def opened(job: Job, address: str | None) -> Iterator[Gang]:
    """A gang in a cluster of this machine's own, or in the one at `address`."""
    with connect(address) as resources:
        capacity.check_room(job.workers, resources)
        with contextlib.closing(Gang(job)) as gang:
            yield gang
