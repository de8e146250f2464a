"""The memory allocator of the C library, set for training steps that take the same memory again.

glibc gives freed memory back to the system and fetches it anew, page by page, each of which the
system fills with zeros first: with temporaries of a megabyte that is a tenth of a training step on
a CPU. Kept, it costs nothing but that it stays with the process.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_NEVER = 2**31 - 1
_LARGEST_KEPT_BYTES = 32 * 2**20
"""Larger pieces are few, and kept they would leave gaps. glibc itself never goes above this."""


def keep_freed_memory() -> None:
    """From now on freed memory stays in this process. Nothing happens without glibc."""
    if (libc := _glibc()) is not None:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)


def give_back_memory() -> None:
    """What is free now goes back to the system."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
