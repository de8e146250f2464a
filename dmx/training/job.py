"""A job: what a process needs to know to do a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmx.storage.patience import PATIENCE_SECONDS
from dmx.storage.places import SHARED, Places


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to know to do a run; plain values, so that it can be sent anywhere.

    Attributes:
        run_config: the experiment (RunConfig as a plain dict).
        data_folder: the prepared store. folder: where checkpoints go, on storage all nodes see.
        threads: CPU threads.
        places: object storage and local copies, where nodes share no file system.
        patience_seconds: how long to wait for a storage that is full, read-only or gone.
        workers: processes that train it together; more than one need Ray (see
            dmx.cluster.gang).
        cpus_per_worker, gpus_per_worker: what each of several workers has; `threads` is each's.
        within: a folder above `folder` that is there while its storage is; None does not look.
        stop_at: end this piece at that optimizer step; the run itself goes on in another job.
        adopt: a checkpoint to go on from with this config's settings, where the run's own last one
            is not beyond it (see adopt.adopt).
        slice_seconds: how long Runner.step trains at most before it comes back; None is to the next
            evaluation.
        takes_over: a former process of the run was given up, or would be by whoever starts this
            one; where it still holds the folder, cut off with its host, it is not waited for.
    """

    run_config: Mapping[str, Any]
    data_folder: str
    folder: str
    threads: int = 1
    places: Places = SHARED
    patience_seconds: float = PATIENCE_SECONDS
    workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    within: str | None = None
    stop_at: int | None = None
    adopt: str | None = None
    slice_seconds: float | None = None
    takes_over: bool = False
