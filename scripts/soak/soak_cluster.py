"""Ray nodes on this machine that can be killed, for soak.py; it is no command."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from pathlib import Path

from dmx.cluster import capacity, connection, gang  # noqa: F401  sets Ray's environment before Ray is imported

from ray.cluster_utils import Cluster  # isort: skip


def children(pid: int) -> list[int]:
    """A process and all below it, the deepest last."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found.extend(parents.get(one, []))
    return found


def parents(pid: int) -> list[int]:
    """The processes above one, the nearest first."""
    found = []
    while pid > 1:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            break
        pid = int(fields[1])
        found.append(pid)
    return found


def kill(pid: int) -> bool:
    """Kill -9; False when it is gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


class Nodes:
    """A head without cores, and nodes of one core each; Ray's own defaults for everything else."""

    def __init__(self, count: int = 2) -> None:
        # Not Ray's own folder: `--address auto` of others must not lead here.
        self._folder = tempfile.mkdtemp(prefix="soak-", dir="/tmp")  # socket paths must be short
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": self._folder}
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args=head,
            shutdown_at_exit=True,
        )
        self._nodes = [self._add() for _ in range(count)]

    @property
    def address(self) -> str:
        """For --address."""
        return str(self._cluster.address)

    def _add(self) -> object:
        return self._cluster.add_node(num_cpus=1, include_dashboard=False)

    def kill_node_of(self, pid: int) -> bool:
        """Kill -9 the node that runs process `pid`, with all its processes; then add another."""
        above = set(parents(pid))
        for node in self._nodes:
            raylet = node.all_processes["raylet"][0].process.pid  # type: ignore[attr-defined]
            if raylet in above:
                for one in children(raylet):
                    kill(one)
                self._nodes.remove(node)
                # For the books of cluster_utils; nothing of it is left to be killed.
                self._cluster.remove_node(node, allow_graceful=False)
                self._nodes.append(self._add())
                return True
        return False

    def close(self) -> None:
        """Stop all nodes."""
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
