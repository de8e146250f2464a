"""Out of memory: the same work again in smaller pieces, down to one sequence at a time."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from dmx.errors import RunFailedError

logger = logging.getLogger("dmx.trainer")
Result = TypeVar("Result")

# What torch's CUDA allocator says has a type of its own; all else is only known by its text. The
# driver and the libraries speak up where others hold the memory that torch does not: trials share
# a GPU, and kernels and workspaces are loaded as they are needed.
_SIGNS = (
    "can't allocate memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of a device or of the machine ran out, as torch and Python report it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def smaller(size: int, batch_size: int) -> int | None:
    """The largest divisor of `batch_size` that is at most half of `size`; None below one."""
    return next((d for d in range(size // 2, 0, -1) if batch_size % d == 0), None)


class Pieces:
    """How many sequences go through the model at once, and less once they did not fit.

    Args:
        size: as wanted. batch_size: pieces stay divisors of it. what: for messages.

    Attributes:
        limit: the size that fitted after memory ran out; None while it never did.
    """

    def __init__(self, size: int, batch_size: int, what: str) -> None:
        self._wanted, self._batch_size, self._what = size, batch_size, what
        self.limit: int | None = None

    @property
    def size(self) -> int:
        """Sequences at once."""
        return self._wanted if self.limit is None else min(self._wanted, self.limit)

    def run(self, attempt: Callable[[int], Result], before_retry: Callable[[], None]) -> Result:
        """`attempt(size)`, and from its start again with smaller pieces while memory runs out.

        Raises:
            RunFailedError: not even one sequence fits.
        """
        while True:
            size = self.size
            try:
                return attempt(size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Past the handler, whose traceback would keep the failed attempt's tensors alive.
            less = smaller(size, self._batch_size)
            if less is None:
                raise RunFailedError(
                    f"out of memory with one sequence at a time ({self._what}); "
                    "take a smaller model or a device with more memory."
                )
            logger.warning(
                "out of memory with %d sequences at once (%s); going on with %d, "
                "the batch stays the same.",
                *(size, self._what, less),
            )
            self.limit = less
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            before_retry()


class RandomState:
    """The default generators as they are now, to be put back before a step is done again."""

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._device = device if device.type == "cuda" else None
        self._cuda = None if self._device is None else torch.cuda.get_rng_state(self._device)

    def restore(self) -> None:
        """Back to that moment."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None and self._device is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
