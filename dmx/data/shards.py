"""Make a large generated set in shards: parallel, resumable after kill -9, equal for any workers.

A maker is a function `make(start, stop, **arguments) -> dict of arrays` whose result depends on
nothing else. Shard boundaries do not depend on the number of workers, every finished shard is
renamed into place whole, and a second run makes only what is missing.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmx.errors import DataError, DmxError
from dmx.storage.files import explained, write_atomic
from dmx.terminal import progress

log = logging.getLogger(__name__)
Arrays = dict[str, npt.NDArray[Any]]
_POLL_SECONDS = 0.1
_REFUSED, _BROKEN = 3, 4
"""Exit codes of a worker that says why: an error of dmx's own, any other."""
_TASKS_PER_CPU = 2


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What is to be made. A shard is the range of its examples."""

    store: Path  # that the shards will become; they lie in a hidden folder beside it
    maker: str  # "module:function", importable in every worker
    arguments: Mapping[str, Any]  # keyword arguments of the maker, JSON values
    total: int  # examples
    size: int  # examples per shard

    @property
    def folder(self) -> Path:
        """Where the shards lie; other arguments have another folder, so nothing is mixed up."""
        key = json.dumps([self.maker, dict(self.arguments), self.size], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self.store.with_name(f".{self.store.name}.shards-{digest}")

    @property
    def shards(self) -> list[range]:
        """All of them, in order."""
        starts = range(0, self.total, self.size)
        return [range(start, min(start + self.size, self.total)) for start in starts]

    @property
    def missing(self) -> list[range]:
        """Those still to be made."""
        return [shard for shard in self.shards if not self.path(shard).exists()]

    def path(self, shard: range) -> Path:
        """File of the shard; a last, shorter shard has its own name, so `total` may grow later."""
        return self.folder / f"{shard.start:08d}-{shard.stop:08d}.npz"

    def job(self, shard: range) -> tuple[str, int, int, dict[str, Any]]:
        """What makes the shard: the arguments of `_make`."""
        return self.maker, shard.start, shard.stop, dict(self.arguments)

    def put(self, shard: range, content: bytes) -> None:
        """Write the shard's file."""
        with explained(self.path(shard), "write"):
            write_atomic(self.path(shard), content)


def make_shards(plan: ShardPlan, *, workers: int, on_cluster: bool = False) -> None:
    """Make the shards that are missing.

    Args:
        workers: local processes; 1 works in this process.
        on_cluster: the CPUs of the Ray cluster that is connected make the shards instead.

    Raises:
        DataError: the disk is full or read-only, or a worker died. Finished shards stay.
    """
    with explained(plan.folder, "create"):
        plan.folder.mkdir(parents=True, exist_ok=True)
        for stale in plan.folder.glob(".*.partial"):
            stale.unlink()
    if not (missing := plan.missing):
        return
    if done := plan.total - sum(map(len, missing)):
        log.info("continuing %s: %d of %d examples exist", plan.store.name, done, plan.total)
    if on_cluster:
        finished = _on_cluster(plan, missing)
    elif workers > 1 and len(missing) > 1:
        finished = _in_processes(plan, missing, min(workers, len(missing)))
    else:
        finished = _in_order(plan, missing)
    with progress(plan.store.name, plan.total, "examples", done) as advance:
        for shard in finished:
            advance(len(shard))


def read_shards(plan: ShardPlan) -> Iterator[tuple[int, Arrays]]:
    """(first example, arrays) of every shard, in order.

    Raises:
        DataError: a shard is damaged; it is removed, so that the next run makes it again.
    """
    for shard in plan.shards:
        path = plan.path(shard)
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            path.unlink(missing_ok=True)
            raise DataError(
                f"Shard {path} is damaged ({error}) and was removed; run the same command again."
            ) from error
        yield shard.start, arrays


def _make(maker: str, start: int, stop: int, arguments: dict[str, Any]) -> bytes:
    """A shard as the bytes of a compressed npz file, whose parts carry a CRC."""
    module, _, function = maker.partition(":")
    arrays = getattr(importlib.import_module(module), function)(start, stop, **arguments)
    buffer = io.BytesIO()
    # Not np.savez, which compresses for three times as long.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as part:
                np.lib.format.write_array(part, array, allow_pickle=False)
    return buffer.getvalue()


def _in_order(plan: ShardPlan, shards: list[range]) -> Iterator[range]:
    for shard in shards:
        plan.put(shard, _make(*plan.job(shard)))
        yield shard


# -- worker processes ---------------------------------------------------------------------------
# Plain subprocesses, each with its part of the shards, which it puts into their places itself. Not
# multiprocessing nor concurrent.futures: their spawned workers run a caller's script once more,
# which then has to have a `__main__` guard; their forked ones inherit the locks of torch's and
# Ray's threads; and both outlive a parent that is killed with -9.


def _in_processes(plan: ShardPlan, shards: list[range], count: int) -> Iterator[range]:
    """Shards as `count` processes finish them, in any order."""
    workers = [_start_worker(plan, shards[number::count]) for number in range(count)]
    left = set(shards)
    try:
        while left:
            ended = [worker for worker in workers if worker.poll() is not None]
            done = {shard for shard in left if plan.path(shard).exists()}
            yield from done
            left -= done
            for worker in ended:
                _check(worker, plan)
            if left:
                time.sleep(_POLL_SECONDS)
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.communicate()


def _start_worker(plan: ShardPlan, shards: list[range]) -> subprocess.Popen[bytes]:
    """A worker, its job on standard input, whose end is its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        # One process per core: threads inside a worker would only compete.
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }
    worker = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import _work; _work()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C goes to the parent alone
    )
    assert worker.stdin is not None
    with suppress(BrokenPipeError):  # it is dead, which `_check` says
        job = [asdict(plan) | {"store": str(plan.store)}, [[s.start, s.stop] for s in shards]]
        worker.stdin.write(json.dumps(job).encode() + b"\n")
        worker.stdin.flush()
    return worker


def _check(worker: subprocess.Popen[bytes], plan: ShardPlan) -> None:
    """Raise what ended the worker, if it is not that its part is done."""
    code = worker.returncode
    assert worker.stdout is not None
    if code in (_REFUSED, _BROKEN) and (said := worker.stdout.read().decode()):
        raise DataError(said) if code == _REFUSED else RuntimeError(said)
    if code:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise DataError(
            f"A worker process died ({how}) while making {plan.store.name}, perhaps for lack of "
            "memory; what is done is kept, so run the same command again, with fewer --workers."
        )


def _work() -> None:
    """A worker's life."""
    # The answer has the real stdout for itself; whatever a library writes goes to stderr.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job, ranges = json.loads(sys.stdin.buffer.readline())  # see _start_worker
    plan = ShardPlan(**job | {"store": Path(job["store"])})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = 0
    try:
        for _ in _in_order(plan, [range(*ends) for ends in ranges]):
            pass
    except Exception as error:
        code = _REFUSED if isinstance(error, DmxError) else _BROKEN
        answer.write(str(error) if code == _REFUSED else traceback.format_exc())
        answer.flush()
    os._exit(code)  # at once: an ordinary end would wait for the thread


def _end_with_parent() -> None:
    while os.read(0, 1):  # to the end of its input, which is the parent's end
        pass
    os._exit(_BROKEN)


# -- a Ray cluster ------------------------------------------------------------------------------


def _on_cluster(plan: ShardPlan, shards: list[range]) -> Iterator[range]:
    """Shards as the connected cluster finishes them; their bytes come back and are written here,
    so that nodes need no shared file system.
    """
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 0))
    if not cpus:
        raise DataError(
            "the Ray cluster has no CPU, and each shard is made by one; start a node with CPUs, or "
            "leave --address out."
        )
    log.info("making %s on %d CPUs of the Ray cluster", plan.store.name, cpus)
    # A node that dies takes its tasks along; Ray runs them again elsewhere.
    make = ray.remote(num_cpus=1, max_retries=3)(_make)
    todo = iter(shards)
    running: dict[Any, range] = {}
    while True:
        for shard in itertools.islice(todo, cpus * _TASKS_PER_CPU - len(running)):
            running[make.remote(*plan.job(shard))] = shard
        if not running:
            return
        (ready,), _ = ray.wait(list(running), num_returns=1)
        shard = running.pop(ready)
        try:
            plan.put(shard, ray.get(ready))
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise DataError(
                f"A Ray task failed while making {plan.store.name}: {reason} What is done is "
                "kept; run the same command again."
            ) from error
        yield shard
