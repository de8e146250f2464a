"""What one run could leave behind in its process for the next: torch's switches, caches, memory."""

from __future__ import annotations

import functools
import gc
import random
import sys
from dataclasses import dataclass

import numpy as np
import torch

from dmx.nn.allocator import give_back_memory


@functools.cache
def _pass_over_imports() -> None:
    """Once: what is still there stays, mostly modules; to look through it takes 0.2 s each time."""
    gc.freeze()


@dataclass(frozen=True)
class ProcessState:
    """torch's process-wide switches. Threads and torch's random state are each run's own to set."""

    deterministic: bool
    warn_only: bool
    matmul_precision: str
    cudnn_benchmark: bool
    cudnn_deterministic: bool
    default_dtype: torch.dtype
    grad_enabled: bool
    anomaly: bool

    @classmethod
    def now(cls) -> ProcessState:
        """As they are."""
        return cls(
            deterministic=torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            matmul_precision=torch.get_float32_matmul_precision(),
            cudnn_benchmark=torch.backends.cudnn.benchmark,
            cudnn_deterministic=torch.backends.cudnn.deterministic,
            default_dtype=torch.get_default_dtype(),
            grad_enabled=torch.is_grad_enabled(),
            anomaly=torch.is_anomaly_enabled(),
        )

    def restore(self) -> None:
        """As they were; and what a former run compiled, drew or kept is forgotten."""
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.backends.cudnn.deterministic = self.cudnn_deterministic
        torch.set_default_dtype(self.default_dtype)
        torch.set_grad_enabled(self.grad_enabled)
        torch.autograd.set_detect_anomaly(self.anomaly)
        random.seed(0)
        np.random.seed(0)  # nothing of ours draws from these two, but an added attention may
        if "torch._dynamo" in sys.modules:  # it takes a second to import, for nothing
            torch.compiler.reset()
        gc.collect()
        _pass_over_imports()
        give_back_memory()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
