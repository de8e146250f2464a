"""A clean GPU for each test, or a skipped one. `DMX_GPU_TESTS_ON=cpu` tries the tests themselves.

On a CPU what needs no memory or stream of a GPU runs, so that a GPU's minutes are not spent on
mistakes of a test. Nothing here is evidence about CUDA then.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

# cuBLAS repeats its results exactly with it; it is read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
TRY_ON_CPU = os.environ.get("DMX_GPU_TESTS_ON") == "cpu"


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """No TF32: its error of 3e-4 would hide others."""
    torch.set_float32_matmul_precision("highest")
    yield
    if torch.cuda.is_initialized():
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def device() -> str:
    """The GPU; a CPU where the tests themselves are tried."""
    if not torch.cuda.is_available() and not TRY_ON_CPU:
        pytest.skip("no CUDA device: torch.cuda.is_available() is false")
    return "cpu" if TRY_ON_CPU else "cuda"


@pytest.fixture
def gpu(device: str) -> torch.device:
    """A real GPU, for what a CPU has not."""
    if device == "cpu":
        pytest.skip("needs a real CUDA device, not a CPU in its place")
    return torch.device(device)
