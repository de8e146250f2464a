"""The model over batches: forward, backward and evaluation, in pieces that fit the memory."""

from __future__ import annotations

import functools
import gc
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dmx.config import TrainConfig
from dmx.data.batches import Batch, eval_batches
from dmx.data.store import Split
from dmx.errors import RunFailedError
from dmx.model import Classifier
from dmx.nn.device import autocast, sum_dtype
from dmx.training.process_group import ProcessGroup

logger = logging.getLogger("dmx.trainer")
Result = TypeVar("Result")
_CPU_EVAL_BATCH = 32
_CUDA_EVAL_TIMES = 8
"""Small training batches need not make the evaluation slow: without gradients memory is cheap."""


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy (0..1) over every example of a split."""

    loss: float
    accuracy: float
    num_examples: int


class Interval:
    """What one process counts from an evaluation to the next, that evaluation included.

    Attributes:
        first: the step it began at. norm: of the latest gradient. seconds: spent on training.
        sums: [5] of sum_dtype: losses, hits and tokens of the training; losses and hits of as many
            `rounds` of the evaluation, in each of which every process takes one batch.
    """

    def __init__(self, first: int, device: torch.device) -> None:
        self.first, self.rounds = first, 0
        self.sums = torch.zeros(5, device=device, dtype=sum_dtype(device))
        self.norm = self.seconds = 0.0
        self._gathered = torch.zeros(0)

    def gather(self, group: ProcessGroup) -> None:
        """Note what every process has counted; all call it at the same moment."""
        table = self.sums.new_zeros(group.size, 5)
        table[group.rank] = self.sums
        self._gathered = group.total(table).cpu()

    def state(self) -> dict[str, Any]:
        """Of all processes, as they last gathered it: plain values and a tensor."""
        names = ("first", "rounds", "norm", "seconds")
        return {"counted": self._gathered, **{name: getattr(self, name) for name in names}}

    @classmethod
    def restored(
        cls, state: Mapping[str, Any], device: torch.device, group: ProcessGroup
    ) -> Interval:
        """What `state` gave; another number of processes keeps the sums, but evaluates anew."""
        made = cls(int(state["first"]), device)
        made._gathered = counted = state["counted"]
        made.norm, made.seconds = float(state["norm"]), float(state["seconds"])
        if len(counted) == group.size:
            made.sums, made.rounds = counted[group.rank].to(made.sums).clone(), int(state["rounds"])
        elif group.is_main:
            made.sums[:3] = counted[:, :3].sum(0)
        return made


class Passes:
    """What one process computes of a batch or a split; see ProcessGroup for the sums of all.

    Args:
        model: the weights. run: the model as it is called, compiled or not.
    """

    def __init__(
        self,
        model: Classifier,
        run: Callable[..., Tensor],
        train: TrainConfig,
        device: torch.device,
        group: ProcessGroup,
    ) -> None:
        self._model, self._run, self._device, self._group = model, run, device, group
        self._sum_dtype = sum_dtype(device)
        self._train = train
        share = -(-train.batch_size // group.size)
        micro = train.micro_batch_size or train.batch_size
        self.micro = AdaptiveMicroBatch(min(micro, share), train.batch_size, "training", device)
        size = train.eval_batch_size or micro
        if train.eval_batch_size is None and device.type == "cpu":
            size = max(size, _CPU_EVAL_BATCH)
        elif train.eval_batch_size is None and device.type == "cuda" and not model.mixes_examples:
            size *= _CUDA_EVAL_TIMES
        self._eval_batch_size = size
        self.evaluation = AdaptiveMicroBatch(size, size, "evaluation", device)

    def logits(self, batch: Batch) -> Tensor:
        """[B, C] float32."""
        with autocast(self._device, self._train.precision):
            logits = self._run(batch.input_ids, batch.input_ids_1)
        return logits.float()

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Leave the gradient of the whole batch's mean loss, as far as it comes from the examples
        here; (their part of that loss, of sum_dtype; how many were right).
        """
        return self.micro.run(functools.partial(self._backward, batch))

    def _backward(self, batch: Batch, size: int) -> tuple[Tensor, Tensor]:
        self._model.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=self._device, dtype=self._sum_dtype)
        correct = torch.zeros((), device=self._device, dtype=torch.int64)
        for chunk in batch.chunks(size):
            logits = self.logits(chunk)
            loss = F.cross_entropy(logits, chunk.labels)
            loss = loss / (self._train.batch_size / len(chunk.labels))
            loss.backward()
            loss_sum += loss.detach().to(self._sum_dtype)
            correct += (logits.argmax(-1) == chunk.labels).sum()
        return loss_sum, correct

    @torch.no_grad()
    def evaluate(
        self, data: Split, length: int, done: Interval | None = None, until: float = math.inf
    ) -> Evaluation | None:
        """Loss and accuracy over the whole split, the ragged last batch included.

        The batches are the same for any number of processes, and their sums are of sum_dtype.

        Args:
            done: how far it has come; it is brought further. until: as in Trainer.advance, which
                makes this return None.
        """
        self._model.eval()
        done = done or Interval(0, self._device)
        size, group = self._eval_batch_size, self._group
        rounds = -(-len(data) // (size * group.size))
        batches = eval_batches(data, size, length, self._device, group.share, done.rounds)
        while done.rounds < rounds:
            late = time.monotonic() >= until
            batch = next(batches, None)  # in the last round some processes have none
            if batch is not None:
                done.sums[3:] += self.score(batch)
            done.rounds += 1
            if until < math.inf and group.largest(float(late)) and done.rounds < rounds:
                return None
        loss, correct = group.total(done.sums[3:]).tolist()
        return Evaluation(loss / len(data), correct / len(data), len(data))

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """[2] of sum_dtype: the sum of the losses, and how many were right, in pieces that fit."""
        return self.evaluation.run(functools.partial(self._score, batch))

    def _score(self, batch: Batch, size: int) -> Tensor:
        sums = torch.zeros(2, device=self._device, dtype=self._sum_dtype)
        for chunk in batch.chunks(size):
            logits = self.logits(chunk)
            loss = F.cross_entropy(logits, chunk.labels, reduction="sum")
            sums[0] += loss.to(self._sum_dtype)
            sums[1] += (logits.argmax(-1) == chunk.labels).sum()
        return sums

    def agree(self) -> None:
        """All processes go on with the smallest pieces that one of them needs."""
        for pieces in (self.micro, self.evaluation):
            smallest = int(-self._group.largest(-pieces.size))
            if smallest < pieces.size:
                pieces.limit = smallest


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


class AdaptiveMicroBatch:
    """How many sequences go through the model at once, and less once they did not fit.

    Args:
        size: as wanted. batch_size: pieces stay divisors of it. what: for messages.

    Attributes:
        limit: the size that fitted after memory ran out; None while it never did.
    """

    def __init__(self, size: int, batch_size: int, what: str, device: torch.device) -> None:
        self._wanted, self._batch_size, self._what = size, batch_size, what
        self._device = device
        self.limit: int | None = None

    @property
    def size(self) -> int:
        return self._wanted if self.limit is None else min(self._wanted, self.limit)

    def run(self, attempt: Callable[[int], Result]) -> Result:
        """`attempt(size)`, and from its start again with smaller pieces while memory runs out.

        Each attempt finds torch's random generators as they were.

        Raises:
            RunFailedError: not even one sequence fits.
        """
        cuda = self._device if self._device.type == "cuda" else None
        state = torch.get_rng_state()
        cuda_state = None if cuda is None else torch.cuda.get_rng_state(cuda)
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
            torch.set_rng_state(state)
            if cuda is not None and cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state, cuda)
