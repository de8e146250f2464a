"""A job: what a process needs to know to do a run, and how cores and GPUs are shared out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmx.errors import ConfigError
from dmx.schema import check_number
from dmx.storage.files import STORAGE_TIMEOUT
from dmx.storage.remote import SHARED_FILESYSTEM, StorageLayout


@dataclass(frozen=True, kw_only=True)
class Workers:
    """`count` processes that share a run's work, with `cpus` CPU cores and `gpus` GPUs each."""

    count: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    @property
    def threads(self) -> int:
        """CPU threads of each."""
        return max(int(self.cpus), 1)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to know to do a run; plain values, so that it can be sent anywhere.

    Attributes:
        run_config: the experiment (RunConfig as a plain dict).
        data_folder: the prepared store. folder: where checkpoints go, on storage all nodes see.
        workers: the processes that train it; more than one need Ray (see dmx.cluster.gang).
        places: object storage and local copies, where nodes share no file system.
        storage_timeout: how long to wait for a storage that is full, read-only or gone.
        within: a folder above `folder` that is there while its storage is; None does not look.
        stop_at: end this piece at that optimizer step; the run itself goes on in another job.
        adopt: a checkpoint to go on from with this config's settings, where the run's own last one
            is not beyond it (see Trainer.adopt).
        slice_seconds: how long Runner.step trains at most before it comes back; None is to the next
            evaluation.
        takes_over: a former process of the run was given up, or would be by whoever starts this
            one; where it still holds the folder, cut off with its host, it is not waited for.
    """

    run_config: Mapping[str, Any]
    data_folder: str
    folder: str
    workers: Workers = Workers()
    places: StorageLayout = SHARED_FILESYSTEM
    storage_timeout: float = STORAGE_TIMEOUT
    within: str | None = None
    stop_at: int | None = None
    adopt: str | None = None
    slice_seconds: float | None = None
    takes_over: bool = False


def share_out(*, cpus: float, gpus: float, workers: int | None = None) -> Workers:
    """The workers of a run that has `cpus` cores and `gpus` GPUs in all.

    A run with several GPUs has a worker for each. Without a GPU `workers` says how many there are;
    None is one. Part of a GPU, or one, is for one worker.
    """
    check_number("--workers-per-trial", workers, least=1)
    if gpus > 1 and gpus != int(gpus):
        raise ConfigError(f"--gpus-per-trial is {gpus:g}; above 1 it must be a whole number.")
    count = max(int(gpus), 1) if workers is None else workers
    if gpus and count != max(int(gpus), 1):
        raise ConfigError(
            f"--workers-per-trial is {workers}, but a trial has {gpus:g} GPUs; every worker has "
            "one, so leave --workers-per-trial out."
        )
    each = cpus / count
    # Ray counts in steps of 1/10,000, and must not count more than there is.
    each = each if each == int(each) or count == 1 else math.floor(each * 10_000) / 10_000
    return Workers(count=count, cpus=each, gpus=gpus / count)


def check_device(device: str, workers: Workers) -> None:
    """Refuse workers that lack what `train.device` insists on, or have GPUs that it leaves idle."""
    if device == "cuda" and not workers.gpus:
        raise ConfigError(
            "train.device is cuda, but the run has no GPU; give it some with --gpus-per-trial, or "
            "leave train.device out."
        )
    if device == "cpu" and workers.gpus and workers.count > 1:
        raise ConfigError(
            "train.device is cpu, but every worker has a GPU; leave one of the two out."
        )


def check_batch(batch_size: int, workers: int) -> None:
    """Refuse more workers than a batch has sequences."""
    if workers > batch_size:
        raise ConfigError(
            f"{workers} workers cannot share a batch of {batch_size}; give fewer, or raise "
            "train.batch_size."
        )
