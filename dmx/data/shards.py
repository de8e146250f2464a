"""Make a large generated set in shards: parallel, resumable after kill -9, equal for any workers.

A maker is a function `make(start, stop, **arguments) -> dict of arrays` whose result depends on
nothing else. Shard boundaries do not depend on the number of workers, every finished shard is
renamed into place whole, and a second run makes only what is missing.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmx.data.progress import progress
from dmx.errors import DataError
from dmx.storage.files import explained, write_atomic

log = logging.getLogger(__name__)
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What is to be made.

    Attributes:
        store: the store that the shards will become; they lie in a hidden folder beside it.
        maker: "module:function", importable in every worker.
        arguments: keyword arguments of the maker, JSON values.
        total: number of examples. size: examples per shard.
        unit: what an example is called, plural.
    """

    store: Path
    maker: str
    arguments: Mapping[str, Any]
    total: int
    size: int
    unit: str

    @property
    def folder(self) -> Path:
        """Where the shards lie; other arguments have another folder, so nothing is mixed up."""
        key = json.dumps([self.maker, dict(self.arguments), self.size], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self.store.with_name(f".{self.store.name}.shards-{digest}")

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First example of the shard, and the one after its last."""
        return shard * self.size, min((shard + 1) * self.size, self.total)

    def path(self, shard: int) -> Path:
        """File of the shard; a last, shorter shard has its own name, so `total` may grow later."""
        start, stop = self.bounds(shard)
        return self.folder / f"{start:08d}-{stop:08d}.npz"


def make_shards(plan: ShardPlan, *, workers: int, address: str | None = None) -> None:
    """Make the shards that are missing.

    Args:
        workers: local processes; 1 works in this process. With `address` it limits nothing.
        address: of a Ray cluster whose CPUs make the shards instead.

    Raises:
        DataError: the disk is full or read-only, or a worker died. Finished shards stay.
    """
    with explained(plan.folder, "create"):
        plan.folder.mkdir(parents=True, exist_ok=True)
        for stale in plan.folder.glob(".*.partial"):
            stale.unlink()
    missing = [shard for shard in range(len(plan)) if not plan.path(shard).exists()]
    todo = sum(stop - start for start, stop in map(plan.bounds, missing))
    if not missing:
        return
    done = plan.total - todo
    if done:
        log.info("continuing %s: %d of %d %s exist", plan.store.name, done, plan.total, plan.unit)
    if address is not None:
        from dmx.data.ray_shards import ray_shards

        finished = ray_shards(plan, missing, address)
    elif workers > 1 and len(missing) > 1:
        from dmx.data.shard_pool import pooled_shards

        finished = pooled_shards(plan, missing, min(workers, len(missing)))
    else:
        finished = ((shard, run_maker(plan, shard)) for shard in missing)
    with progress(plan.store.name, plan.total, plan.unit, done) as advance:
        for shard, content in finished:
            with explained(plan.path(shard), "write"):
                write_atomic(plan.path(shard), content)
            start, stop = plan.bounds(shard)
            advance(stop - start)


def run_maker(plan: ShardPlan, shard: int) -> bytes:
    """The content of one shard, made in this process."""
    start, stop = plan.bounds(shard)
    return pack(load_maker(plan.maker)(start, stop, **plan.arguments))


def load_maker(name: str) -> Callable[..., Arrays]:
    """The function called "module:function"."""
    module, _, function = name.partition(":")
    maker: Callable[..., Arrays] = getattr(importlib.import_module(module), function)
    return maker


def pack(arrays: Arrays) -> bytes:
    """Arrays as the bytes of a compressed npz file, whose parts carry a CRC."""
    buffer = io.BytesIO()
    # Not np.savez: it stamps no time, but lets zipfile choose a level that may change.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            part = io.BytesIO()
            np.lib.format.write_array(part, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), part.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def read_shards(plan: ShardPlan) -> Iterator[tuple[int, Arrays]]:
    """(first example, arrays) of every shard, in order.

    Raises:
        DataError: a shard is damaged; it is removed, so that the next run makes it again.
    """
    for shard in range(len(plan)):
        path = plan.path(shard)
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            path.unlink(missing_ok=True)
            raise DataError(
                f"Shard {path} is damaged ({error}) and was removed; run the same command again."
            ) from error
        yield plan.bounds(shard)[0], arrays


def remove_shards(plan: ShardPlan) -> None:
    """Delete the shards, once the store holds their content."""
    shutil.rmtree(plan.folder, ignore_errors=True)
