"""torch's process group of one run's workers, on the network that Ray itself uses."""

from __future__ import annotations

import os
from typing import Any

import psutil  # isort: skip  Ray brings its own
import ray  # isort: skip
from ray.train.torch import TorchConfig  # isort: skip

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an IP address; None where none has."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def use_node_interface() -> None:
    """Let gloo listen where Ray does, unless the user has said where.

    Gloo listens at what the host's name resolves to. That is often an address of this host alone:
    Debian's installer writes `127.0.1.1 NAME` into /etc/hosts. Others then cannot connect.
    """
    if GLOO_INTERFACE not in os.environ:
        name = interface_of(ray.util.get_node_ip_address())
        if name is not None:
            os.environ[GLOO_INTERFACE] = name


class NodesTorchConfig(TorchConfig):
    """Ray Train's process group, whose members meet on their nodes' own addresses."""

    @property
    def backend_cls(self) -> Any:
        """Ray Train's backend, with one thing done before it starts."""

        class Backend(super().backend_cls):  # type: ignore[misc]
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                worker_group.execute(use_node_interface)
                super().on_start(worker_group, backend_config)

        return Backend
