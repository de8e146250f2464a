"""The device a run uses: choosing it, its precision, its memory, and the CPU's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from dmx.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device for `train.device`; `auto` is CUDA, else CPU.

    MPS is taken by name alone: nothing of dmx has been tested there.

    Raises:
        ConfigError: the named device is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise ConfigError(f"train.device is {name}, which this machine does not have; use auto.")
    return torch.device(name)


def sum_dtype(device: torch.device) -> torch.dtype:
    """In what losses and counts are summed: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def precision_of(device: torch.device, precision: str) -> str:
    """What `train.precision` comes to: `auto` is bf16 on a GPU that computes in it, else fp32.

    Older GPUs (T4, V100) emulate bf16, slower than fp32; torch.cuda.is_bf16_supported counts them.
    """
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if has_bf16 else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision for `train.precision`."""
    if precision_of(device, precision) == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def total_memory(device: torch.device) -> float:
    """Bytes of memory: of the GPU, else of the machine, or what its container may use of it."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # `max` is no number
            limits.append(float(Path("/sys/fs/cgroup", file).read_text()))
    return min(limits)


_PROCESS = Path("/proc/self")


def reset_peak_memory(device: torch.device) -> None:
    """From here on `peak_memory_mb` counts anew: what an earlier trial needed is forgotten.

    Of a process Linux alone forgets it; elsewhere its peak is that of its whole life.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB since `reset_peak_memory`: of the device on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# glibc gives freed memory back to the system and fetches it anew, page by page, each of which the
# system fills with zeros first: with temporaries of a megabyte that is a tenth of a training step
# on a CPU. Kept, it costs nothing but that it stays with the process.
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
