"""A Ray cluster of several hosts, and a study on it, for soak_hosts.py; it is no command."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from soak_net import ROOT, Host, Network
from soak_rounds import Study

RAY = str(Path(sys.executable).parent / "ray")  # PATH need not hold this environment's programs
PORT = 6379
START_SECONDS = 180.0
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
}
"""Ray gives a silent node up within seconds; its own settings are for networks, not for tests."""
_NO_LOCKS = """
import errno, fcntl, os
_flock = fcntl.flock

def flock(file, operation):
    number = file if isinstance(file, int) else file.fileno()
    if os.readlink(f"/proc/self/fd/{number}").startswith(SHARED):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    return _flock(file, operation)

fcntl.flock = flock
"""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Look until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"no {what} within {seconds:.0f} s")
        time.sleep(0.05)


class RayHosts:
    """A head without cores, and workers of one core each, all with one token.

    Args:
        folder: that all hosts share. quick: see QUICK; else Ray's own patience.
        locks: whether the shared folder has any; without, hosts are as those that a file server
            has taken their locks from.
    """

    def __init__(self, folder: Path, *, workers: int, quick: bool, locks: bool) -> None:
        self.folder = folder
        self._network = Network(folder)
        self._token = secrets.token_hex(16)
        path = [str(ROOT)]
        if not locks:
            path.insert(0, str(folder / "no-locks"))
            (folder / "no-locks").mkdir()
            text = _NO_LOCKS.replace("SHARED", repr(str(folder / "runs")))
            (folder / "no-locks" / "sitecustomize.py").write_text(text)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "TMPDIR"}
        self.env = {
            **kept,
            **(QUICK if quick else {}),
            "PYTHONPATH": ":".join(path),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        try:
            self.head = self.add("head")
            self._ray(self.head, "--head", f"--port={PORT}", "--dashboard-host=127.0.0.1", cpus=0)
            self.workers = [self.add(f"worker-{n + 1}") for n in range(workers)]
            for worker in self.workers:
                self.join(worker)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """For --address."""
        return f"{self.head.address}:{PORT}"

    def add(self, name: str, *, token: bool = True) -> Host:
        """A host that has the token, or not, and runs nothing yet."""
        host = self._network.add(name)
        (host.home / ".ray").mkdir()
        if token:
            (host.home / ".ray" / "auth_token").write_text(self._token)
        return host

    def join(self, host: Host, cpus: int = 1) -> None:
        """Let a host be a node of the cluster."""
        self._ray(host, f"--address={self.address}", cpus=cpus)

    def _ray(self, host: Host, *words: str, cpus: int) -> None:
        # Ray finds a host's address by its route to the internet; here is none.
        own = [f"--node-ip-address={host.address}", f"--num-cpus={cpus}"]
        host.run([RAY, "start", *words, *own], self.env, START_SECONDS)

    def join_again(self, host: Host) -> float:
        """Once its node, given up while it was away, has ended: seconds that took."""
        began = time.monotonic()
        wait_until(lambda: not host.runs("raylet"), f"end of the node on {host.name}", 600)
        seconds = time.monotonic() - began
        host.run([RAY, "stop", "--force"], self.env, START_SECONDS)
        self.join(host)
        return seconds

    def host_of(self, claim: dict[str, Any]) -> Host | None:
        """Where whoever wrote this claim is, or None where that host is dead."""
        found = [h for h in self.workers if h.name == claim["host"] and h.alive]
        return found[0] if found else None

    def replace(self, host: Host) -> None:
        """Kill all of a host at once, and let another one join."""
        host.die()
        self.workers.remove(host)
        self.workers.append(self.add(f"worker-{self._network.count}"))
        self.join(self.workers[-1])

    def close(self) -> None:
        """End all hosts."""
        self._network.close()


@contextlib.contextmanager
def ray_hosts(folder: Path, **how: Any) -> Iterator[RayHosts]:
    """A cluster that is gone after the block, whatever happens in it."""
    hosts = RayHosts(folder, **how)
    try:
        yield hosts
    finally:
        hosts.close()


class HostStudy(Study):
    """A study whose driver is on one of the hosts."""

    def __init__(
        self, words: list[str], study: Path, log_file: Path, hosts: RayHosts, driver: Host
    ) -> None:
        super().__init__(words, study, log_file)
        self._hosts, self._driver = hosts, driver

    def _popen(self, words: list[str], out: object) -> subprocess.Popen[bytes]:
        how = {"stdout": out, "stderr": out, "start_new_session": True}
        return self._driver.start(words, self._hosts.env, **how)

    def claim(self, trial: int) -> dict[str, Any]:
        """Who works on a trial; {} where it has ended."""
        return next((claim for number, claim in self.claims() if number == trial), {})
