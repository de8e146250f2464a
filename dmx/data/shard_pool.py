"""Local worker processes for shards: plain subprocesses that die with their parent.

Not multiprocessing: its spawned workers import the caller's main module again, its forked ones
inherit the locks of torch and Ray threads, and both outlive a parent killed with -9. Here a worker
reads requests from its standard input, so the parent's death is an end of file.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO

from dmx.data.shards import ShardPlan
from dmx.errors import ConfigError, DataError

HEADER_BYTES = 9
"""One status byte (o = shard, e = error) and the payload's length, 8 bytes, little endian."""
_ERRORS = {"ConfigError": ConfigError, "DataError": DataError}


def pooled_shards(plan: ShardPlan, shards: list[int], workers: int) -> Iterator[tuple[int, bytes]]:
    """(shard, content) as `workers` processes finish them, in any order.

    Raises:
        DataError: a worker died (killed for memory, say), or the maker raised it.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for shard in shards:
        todo.put(shard)
    done: queue.SimpleQueue[tuple[int, bytes | BaseException]] = queue.SimpleQueue()
    processes = [_start() for _ in range(workers)]
    threads = [
        threading.Thread(target=_feed, args=(process, plan, todo, done), daemon=True)
        for process in processes
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in shards:
            shard, result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield shard, result
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _start() -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        # One process per core: threads inside a worker would only compete.
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "dmx.data.shard_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C goes to the parent alone
    )


def _feed(
    process: subprocess.Popen[bytes],
    plan: ShardPlan,
    todo: queue.SimpleQueue[int],
    done: queue.SimpleQueue[tuple[int, bytes | BaseException]],
) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    while True:
        try:
            shard = todo.get_nowait()
        except queue.Empty:
            return
        start, stop = plan.bounds(shard)
        request = [plan.maker, start, stop, dict(plan.arguments)]
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            done.put((shard, _answer(process.stdout)))
        except (OSError, EOFError):
            code = process.wait()
            done.put((shard, DataError(f"A worker process died ({_how(code)}) {_remedy(plan)}.")))
            return
        except BaseException as error:  # handed to the caller's thread
            done.put((shard, error))
            return


def _answer(stream: IO[bytes]) -> bytes:
    header = _read(stream, HEADER_BYTES)
    payload = _read(stream, int.from_bytes(header[1:], "little"))
    if header[:1] == b"o":
        return payload
    kind, message = json.loads(payload)
    raise _ERRORS.get(kind, RuntimeError)(message)


def _read(stream: IO[bytes], count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError
    return content


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _remedy(plan: ShardPlan) -> str:
    return (
        f"while making {plan.store.name}, perhaps for lack of memory; what is done is kept, so run "
        "the same command again, with fewer --workers"
    )
