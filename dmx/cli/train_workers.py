"""Who does a single run's work: this process, or several in a Ray cluster."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from dmx.config import RunConfig
from dmx.errors import ConfigError
from dmx.process import num_cores
from dmx.training.job import Job, Workers, check_batch, check_device, share_out


def choose(args: argparse.Namespace, config: RunConfig) -> Workers:
    """One worker with all of this machine's cores, or as many as the options say.

    Raises:
        ConfigError: the options do not go together, or ask for more than this machine has.
    """
    if args.threads < 0:
        raise ConfigError(f"--threads is {args.threads}; it must not be negative.")
    gpus = args.gpus_per_trial or 0
    if gpus < 0:
        raise ConfigError(f"--gpus-per-trial is {gpus}; it must not be negative.")
    count = share_out(cpus=1, gpus=gpus, workers=args.workers_per_trial).count
    there = num_cores() if args.address is None else count
    workers = share_out(cpus=args.threads or there, gpus=gpus, workers=count)
    check_batch(config.train.batch_size, count)
    if count > 1:
        check_device(config.train.device, workers)
    if count == 1 and args.address is not None:
        raise ConfigError(
            "--address is for a run of several workers; add --gpus-per-trial, or leave it out."
        )
    if count > 1 and args.address is None:
        from dmx.cluster import capacity

        capacity.check_room(workers, capacity.local_resources())
    return workers


@contextlib.contextmanager
def connected(workers: Workers, address: str | None) -> Iterator[None]:
    """Within the block the cluster at `address` is connected, and the workers fit into it.

    Raises:
        ConfigError: they do not, or no cluster answers.
    """
    if address is None:  # this machine was looked at; its Ray starts with the run
        yield
        return
    from dmx.cluster import capacity, connection

    with connection.connect(address) as resources:
        capacity.check_room(workers, resources)
        yield


def opened(job: Job, address: str | None) -> contextlib.AbstractContextManager[Any]:
    """The runner of a job of several workers, and its cluster; Ray is imported only here."""
    from dmx.cluster import connection

    return connection.opened(job, address)
