"""The processes that train one run together: each one's share, and the sums of all.

Each process has the whole model and takes its share of every batch. The sum of all gradients is
taken once a step, by one all-reduce of all of them, after the backward passes. This is what
DistributedDataParallel computes, without its hooks in the backward pass, which do not fit here:
a share may have other micro-batches than its neighbour's, or none; a step that ran out of memory
is done again by one process alone; and weights that no process used must keep "no gradient", or
AdamW would decay them. Overlapping the sum with the backward pass would gain little: the models are
small (a million weights are 4 MB) beside the work of a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


class PeerLost(Exception):
    """Another process of the run is gone; what is left continues from the last checkpoint."""


class ProcessGroup:
    """One process alone: rank 0 of 1. It shares nothing out, and sums of all are its own."""

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes checkpoints and reports."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Of anything in order, which every process takes one of in turn."""
        return slice(self.rank, None, self.size)

    def seed(self, seed: int, step: int) -> None:
        """Set the random generators for a step; alone, they simply run on."""

    def add_gradients(self, parameters: Iterable[nn.Parameter], late: bool = False) -> bool:
        """Put the sum of all processes' gradients in place of the own ones.

        Returns:
            Whether any of them is `late`.
        """
        return late

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same in each."""
        return values

    def largest(self, value: float) -> float:
        """The largest of all processes' values."""
        return value

    def broadcast_object(self, value: Any) -> Any:
        """The main process's value, in every process; the others' is not looked at."""
        return value

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by the main process's."""


SINGLE_PROCESS = ProcessGroup()


class TorchProcessGroup(ProcessGroup):
    """The processes of torch's default process group, one device each.

    Every method raises PeerLost when another process does not answer any more.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Where values must lie to be exchanged; NCCL knows nothing but the process's own GPU.
        self._device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def seed(self, seed: int, step: int) -> None:
        """A stream for each step and process, so that no process's state needs to be kept."""
        words = np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0] >> 1))

    def add_gradients(self, parameters: Iterable[nn.Parameter], late: bool = False) -> bool:
        """One all-reduce for all of them; a weight that no process used keeps no gradient."""
        wanted = [p for p in parameters if p.requires_grad]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in wanted]
        used = torch.tensor([*(float(p.grad is not None) for p in wanted), float(late)])
        flat = torch.cat([part.reshape(-1) for part in parts] + [used.to(parts[0])])
        self._reduce(flat)
        *counts, any_late = flat[-len(used) :].tolist()
        start = 0
        for parameter, count in zip(wanted, counts, strict=True):
            stop = start + parameter.numel()
            parameter.grad = flat[start:stop].view_as(parameter) if count else None
            start = stop
        return bool(any_late)

    def total(self, values: Tensor) -> Tensor:
        values = values.clone()
        self._reduce(values)
        return values

    def largest(self, value: float) -> float:
        found = torch.tensor(value, dtype=torch.float64, device=self._device)
        self._reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def broadcast_object(self, value: Any) -> Any:
        box = [value]
        try:
            dist.broadcast_object_list(box, src=0, device=self._device)
        except RuntimeError as error:
            raise PeerLost(str(error)) from None
        return box[0]

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        try:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)
        except RuntimeError as error:
            raise PeerLost(str(error)) from None

    def _reduce(self, values: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        try:
            dist.all_reduce(values, operation)
        except RuntimeError as error:
            raise PeerLost(str(error)) from None
