"""`--trials-per-gpu auto`: how many trials share a GPU, from one trial's measured memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dmx.cluster import capacity
from dmx.config import RunConfig, parse_run_config
from dmx.costs.estimate import largest
from dmx.data.batches import Batch, make_batch
from dmx.data.store import Store, open_store
from dmx.errors import ConfigError
from dmx.schema import to_dict
from dmx.training.trainer import Trainer

import ray  # isort: skip

logger = logging.getLogger("dmx.tune")
AUTO = "auto"
_HEADROOM = 0.1
"""Share of a GPU that stays free: for longer batches, fragments, and other processes."""
_MOST = 16
"""More processes than this only take turns on a GPU's cores."""
_STEPS = 3


class Usage(NamedTuple):
    """Bytes of a GPU: what one trial's process took at its peak, and what there is."""

    peak: int
    total: int


def wanted(option: str | None) -> int | None:
    """The number that --trials-per-gpu gives; 1 for `auto`, until it is measured.

    Raises:
        ConfigError: it is neither a number nor `auto`.
    """
    if option is None or option == AUTO:
        return None if option is None else 1
    try:
        return int(option)
    except ValueError:
        raise ConfigError(
            f"--trials-per-gpu is {option!r}; it must be a whole number, or auto."
        ) from None


def trials_that_fit(usage: Usage, *, headroom: float = _HEADROOM, most: int = _MOST) -> int:
    """How many trials of this usage a GPU holds with some room to spare; at least one."""
    room = int(usage.total * (1.0 - headroom))
    return max(min(room // max(usage.peak, 1), most), 1)


def measure(runs: Sequence[RunConfig], store: Store) -> int:
    """Trials per GPU, from a few steps of the largest of these runs on a GPU of the cluster.

    The largest is the one that keeps most for its backward pass, as costs count it.
    """
    remote = ray.remote(num_cpus=1, num_gpus=1, max_retries=1)(peak_usage)
    with capacity.for_task():
        usage = ray.get(remote.remote(to_dict(largest(runs, store)), str(store.folder)))
    count = trials_that_fit(usage)
    logger.info(
        "the largest trial takes %.1f of %.1f GB of a GPU: %d trials per GPU",
        *(usage.peak / 2**30, usage.total / 2**30, count),
    )
    return count


def peak_usage(run_config: Mapping[str, Any], data_folder: str) -> Usage:
    """Train a few steps on the longest examples on this process's GPU; see Usage.

    The evaluation has batches of its own size. A configuration that has to shrink either takes the
    GPU whole.
    """
    config: RunConfig = parse_run_config(run_config)
    trainer = Trainer(config, open_store(Path(data_folder)))
    try:
        batch = _longest(trainer, "train", config.train.batch_size)
        for _ in range(_STEPS):
            trainer.train_step(batch)
        trainer.model.eval()
        trainer.passes.score(_longest(trainer, "dev", trainer.passes.evaluation.size))
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        # The driver's own part of the process is in no count of torch's.
        context = total - free - torch.cuda.memory_reserved()
        peak = torch.cuda.max_memory_reserved() + context
        passes = trainer.passes
        shrunk = passes.micro.limit is not None or passes.evaluation.limit is not None
        return Usage(total if shrunk else peak, total)
    finally:
        trainer.close()


def _longest(trainer: Trainer, split_name: str, count: int) -> Batch:
    split = trainer.store.split(split_name)
    order = np.argsort(split.lengths, kind="stable")[-count:]
    return make_batch(split, order, trainer.length).to(trainer.device)
