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
import os
import socket
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

from dmx.data.progress import progress
from dmx.errors import ConfigError, DataError, DmxError
from dmx.storage.files import explained, write_atomic

log = logging.getLogger(__name__)
Arrays = dict[str, npt.NDArray[Any]]
_POLL_SECONDS = 0.1
_FAILED = 3
"""Exit code of a worker that says why."""
_TASKS_PER_CPU = 2
_CONNECT_SECONDS = 10.0
_PATIENCE_SECONDS = 30.0
_AGAIN_SECONDS = 180.0


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
        finished = _on_cluster(plan, missing, address)
    elif workers > 1 and len(missing) > 1:
        finished = _in_processes(plan, missing, min(workers, len(missing)))
    else:
        finished = (_make_here(plan, shard) for shard in missing)
    with progress(plan.store.name, plan.total, plan.unit, done) as advance:
        for shard in finished:
            start, stop = plan.bounds(shard)
            advance(stop - start)


def _make_here(plan: ShardPlan, shard: int) -> int:
    """Make the shard and put it into its place; its number."""
    content = _make(plan.maker, *plan.bounds(shard), dict(plan.arguments))
    with explained(plan.path(shard), "write"):
        write_atomic(plan.path(shard), content)
    return shard


def _make(maker: str, start: int, stop: int, arguments: dict[str, Any]) -> bytes:
    module, _, function = maker.partition(":")
    return pack(getattr(importlib.import_module(module), function)(start, stop, **arguments))


# -- worker processes ---------------------------------------------------------------------------
# Plain subprocesses, each with its part of the shards, which it puts into their places itself. Not
# multiprocessing nor concurrent.futures: their spawned workers run a caller's script once more,
# which then has to have a `__main__` guard; their forked ones inherit the locks of torch's and
# Ray's threads; and both outlive a parent that is killed with -9.


def _in_processes(plan: ShardPlan, shards: list[int], count: int) -> Iterator[int]:
    """Shards as `count` processes finish them, in any order.

    Raises:
        DataError: a worker died (killed for memory, say), or the maker raised it.
    """
    workers = [_Worker(plan, shards[number::count]) for number in range(count)]
    left = set(shards)
    try:
        while left:
            ended = [worker for worker in workers if worker.process.poll() is not None]
            done = {shard for shard in left if plan.path(shard).exists()}
            yield from sorted(done)
            left -= done
            for worker in ended:
                worker.check(plan)
            if left:
                time.sleep(_POLL_SECONDS)
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.communicate()


class _Worker:
    """`python -m dmx.data.shards`, its job on standard input, whose end is its own."""

    def __init__(self, plan: ShardPlan, shards: list[int]) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            # One process per core: threads inside a worker would only compete.
            "OMP_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dmx.data.shards"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C goes to the parent alone
        )
        job = {**asdict(plan), "store": str(plan.store), "arguments": dict(plan.arguments)}
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead, which `check` says
            self.process.stdin.write(json.dumps([job, shards]).encode() + b"\n")
            self.process.stdin.flush()

    def check(self, plan: ShardPlan) -> None:
        """Raise what ended the worker, if it is not that its part is done."""
        code = self.process.returncode
        if not code:
            return
        assert self.process.stdout is not None
        answer = self.process.stdout.read()
        if code == _FAILED and answer:
            kind, message = json.loads(answer)
            raise {"ConfigError": ConfigError, "DataError": DataError}.get(kind, RuntimeError)(
                message
            )
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise DataError(
            f"A worker process died ({how}) while making {plan.store.name}, perhaps for lack of "
            "memory; what is done is kept, so run the same command again, with fewer --workers."
        )


def _work() -> None:
    """A worker's life."""
    # The answer has the real stdout for itself; whatever a library writes goes to stderr.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job, shards = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    plan = ShardPlan(**{**job, "store": Path(job["store"])})
    try:
        for shard in shards:
            _make_here(plan, shard)
    except Exception as error:
        ours = isinstance(error, DmxError)
        told = [type(error).__name__, str(error)] if ours else ["", traceback.format_exc()]
        answer.write(json.dumps(told))
        answer.flush()
        os._exit(_FAILED)
    os._exit(0)  # at once: an ordinary end would wait for the thread


def _end_with_parent() -> None:
    while os.read(0, 1):  # to the end of its input, which is the parent's end
        pass
    os._exit(_FAILED)


# -- a Ray cluster ------------------------------------------------------------------------------


def _on_cluster(plan: ShardPlan, shards: list[int], address: str) -> Iterator[int]:
    """Shards as the cluster at `address` finishes them; their bytes come back and are written here,
    so that nodes need no shared file system.

    Raises:
        DataError: Ray is not installed, the cluster does not answer, or a task failed.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise DataError("--address needs Ray; run: pip install dmx-lra") from error
    started = not ray.is_initialized()
    if started:
        _check_reachable(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"No Ray cluster answers at {address!r}: {reason}") from error
    try:
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if not cpus:
            raise DataError(
                f"the Ray cluster at {address!r} has no CPU, and each shard is made by one; start "
                "a node with CPUs, or leave --address out."
            )
        log.info("making %s on %d CPUs of the Ray cluster", plan.store.name, cpus)
        # A node that dies takes its tasks along; Ray runs them again elsewhere.
        make = ray.remote(num_cpus=1, max_retries=3)(_make)
        todo = list(reversed(shards))
        running: dict[Any, int] = {}
        while todo or running:
            while todo and len(running) < cpus * _TASKS_PER_CPU:
                shard = todo.pop()
                task = make.remote(plan.maker, *plan.bounds(shard), dict(plan.arguments))
                running[task] = shard
            ready = _first(ray, list(running), cpus, _PATIENCE_SECONDS)
            shard = running.pop(ready)
            try:
                content = ray.get(ready)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise DataError(
                    f"A Ray task failed while making {plan.store.name}: {reason} What is done is "
                    "kept; run the same command again."
                ) from error
            with explained(plan.path(shard), "write"):
                write_atomic(plan.path(shard), content)
            yield shard
    finally:
        if started:
            ray.shutdown()


def _first(ray: Any, running: list[Any], cpus: int, seconds: float) -> Any:
    """The first that is done; says what is free where none is after so long, and again later."""
    waited = 0.0
    while True:
        done, _ = ray.wait(running, num_returns=1, timeout=seconds)
        if done:
            return done[0]
        waited, seconds = waited + seconds, max(seconds, _AGAIN_SECONDS)
        free = ray.available_resources().get("CPU", 0.0)
        log.warning(
            "no shard of data came back for %.0f s: each asks for 1 CPU, and %g of the cluster's "
            "%d are free; they wait for room where other work holds the rest.",
            waited,
            free,
            cpus,
        )


def _check_reachable(address: str) -> None:
    """Raise DataError at once when nothing listens at host:port; Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto" or "local"
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise DataError(f"No Ray cluster answers at {address!r}: {error}") from error


# -- files --------------------------------------------------------------------------------------


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


if __name__ == "__main__":
    _work()
