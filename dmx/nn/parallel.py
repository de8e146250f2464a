"""Runs shares of a CPU computation side by side, each on one thread.

torch splits every single operation over its threads and waits for all of them. With operations of
some 50 microseconds that wait is most of the time, and far more where another process wants the
core. Here a thread takes a share of the pieces through all operations, and there is one wait.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

ROWS_AT_ONCE = (1024, 4096)
"""The least and the most rows of a piece: a temporary 128 floats wide has half to two megabytes."""
_PIECES = 16
"""As many are wanted: every thread needs some, and each costs some 40 calls."""

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def is_fast(x: Tensor) -> bool:
    """Whether the handwritten versions run for x."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )


@contextlib.contextmanager
def single_thread(x: Tensor) -> Iterator[None]:
    """No threads of torch's own around small work on a CPU.

    They would spin for milliseconds after it, on the cores that the shares' threads then need.
    """
    threads = torch.get_num_threads()
    if x.device.type != "cpu" or threads == 1 or torch.compiler.is_compiling():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rows_at_once(rows: int) -> int:
    """Rows of a piece, where there are so many in all; whatever the number of threads."""
    least, most = ROWS_AT_ONCE
    return min(max(least, -(-rows // _PIECES)), most)


def row_pieces(rows: int) -> list[slice]:
    """0..rows-1 as slices of `rows_at_once`, the last one shorter."""
    size = rows_at_once(rows)
    return [slice(a, min(a + size, rows)) for a in range(0, rows, size)]


def run_shares(
    work: Callable[[Sequence[Piece]], Result],
    pieces: Sequence[Piece],
    costs: Sequence[int] | None = None,
) -> list[Result]:
    """`work` of each of at most `torch.get_num_threads()` contiguous shares of the pieces.

    The shares depend on nothing but the number of threads, so that sums over them repeat exactly.

    Args:
        work: called without autograd. It must not draw from torch's default generator.
        pieces: what to work on.
        costs: how long each takes, up to a factor; equally long by default.

    Returns:
        The results in the order of the shares; there is at least one.
    """
    threads = torch.get_num_threads()
    if torch._C._len_torch_dispatch_stack():  # a counter, say, which sees this thread only
        threads = 1
    shares = split_evenly(pieces, costs or [1] * len(pieces), threads)
    if len(shares) == 1:
        with torch.no_grad():
            return [work(shares[0])]
    return list(_pool(threads).map(partial(_call, work), shares))


def split_evenly(
    pieces: Sequence[Piece], costs: Sequence[int], shares: int
) -> list[Sequence[Piece]]:
    """At most `shares` contiguous parts of nearly equal cost, none empty but an only one."""
    total = sum(costs)
    parts: list[Sequence[Piece]] = []
    first, done = 0, 0
    for index, cost in enumerate(costs):
        done += cost
        if done * shares >= total * (len(parts) + 1) and len(parts) < shares - 1:
            parts.append(pieces[first : index + 1])
            first = index + 1
    if first < len(pieces) or not parts:
        parts.append(pieces[first:])
    return parts


def _call(work: Callable[[Sequence[Piece]], Result], share: Sequence[Piece]) -> Result:
    with torch.no_grad():  # autograd's mode belongs to the thread
        return work(share)


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            started = threading.Barrier(threads)

            def start() -> None:
                torch.set_num_threads(1)  # of this thread, and the default of threads to come
                torch.get_num_threads()  # takes the default, once per thread: now, while it is 1
                started.wait()

            pool = ThreadPoolExecutor(threads, "dmx", initializer=start)
            list(pool.map(lambda _: None, range(threads)))
            torch.set_num_threads(threads)  # so put the default back
            _pools[threads] = pool
        return _pools[threads]


os.register_at_fork(after_in_child=_pools.clear)  # a child has the pools but not their threads
