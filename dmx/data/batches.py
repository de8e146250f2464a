"""Batches of a split: seeded, a pure function of the step, so that any step can be resumed.

The training stream is endless: epoch after epoch, each a permutation; batch s holds the stream's
places s*B to (s+1)*B, so batches may span two epochs, as in the reference.
"""

from __future__ import annotations

import functools
import operator
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmx.data.store import Split

_WINDOW_BATCHES = 64
"""`bucketed` sorts by length within windows of so many batches: enough for even lengths, and the
order of examples stays random across windows."""


@dataclass(frozen=True)
class Batch:
    """Ids [B, L] (any integer type), the second text of a pair or None, and labels [B] int64."""

    input_ids: Tensor
    input_ids_1: Tensor | None
    labels: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with all its tensors changed."""
        other = None if self.input_ids_1 is None else change(self.input_ids_1)
        return Batch(change(self.input_ids), other, change(self.labels))

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; the copy is asynchronous from pinned memory."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def chunks(self, size: int) -> Iterator[Batch]:
        """Micro-batches of `size` sequences, in order."""
        for start in range(0, self.labels.shape[0], size):
            yield self.map(operator.itemgetter(slice(start, start + size)))


def make_batch(split: Split, indices: np.ndarray, length: int) -> Batch:
    """The examples at `indices`, zero-padded to `length`."""
    sides = [split.gather(indices, length, side) for side in range(1 + split.paired)]
    # torch has few operations on uint16; ids stay below 512, so int16 holds them.
    ids, *other = (
        torch.from_numpy(side.view(np.int16) if side.dtype == np.uint16 else side) for side in sides
    )
    return Batch(ids, other[0] if other else None, torch.from_numpy(split.labels[indices]))


class TrainOrder:
    """Which examples make up training batch `step`.

    Args:
        lengths: [N] real lengths, for `bucketed`.
        batch_size: B. seed: of the permutations. order: see DataConfig.order.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, order: str) -> None:
        assert len(lengths) > 0
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.order = order
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)
        self._window = functools.lru_cache(maxsize=1)(self._bucketed)
        self._chain = (0, list(range(len(lengths))), seed)

    def __call__(self, step: int) -> np.ndarray:
        """[B] example numbers of batch `step`, counting from 0."""
        if self.order == "bucketed":
            window, place = divmod(step, _WINDOW_BATCHES)
            return self._window(window)[place]
        return self._stream(step * self.batch_size, self.batch_size)

    def _stream(self, start: int, count: int) -> np.ndarray:
        parts = []
        while count:
            epoch, offset = divmod(start, len(self.lengths))
            part = self._epoch(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self.order == "reference":
            return self._reference_epoch(epoch)
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))

    def _reference_epoch(self, epoch: int) -> np.ndarray:
        """LRADataset's order: one list, shuffled again for each epoch by a chain of seeds."""
        done, examples, seed = self._chain
        if epoch < done:
            done, examples, seed = 0, list(range(len(self.lengths))), self.seed
        while done <= epoch:
            random.Random(seed).shuffle(examples)
            seed = random.Random(seed).randint(0, 9999999)
            done += 1
        self._chain = (done, examples, seed)
        return np.array(examples)

    def _bucketed(self, window: int) -> np.ndarray:
        """[_WINDOW_BATCHES, B] of a window, by length, in random order."""
        size = _WINDOW_BATCHES * self.batch_size
        indices = self._stream(window * size, size)
        by_length = indices[np.argsort(self.lengths[indices], kind="stable")]
        shuffled = np.random.default_rng([self.seed, window, 1]).permutation(_WINDOW_BATCHES)
        return by_length.reshape(_WINDOW_BATCHES, self.batch_size)[shuffled]


class TrainBatches:
    """Reads the training batches one step ahead in a thread.

    Args:
        split: the train split. order: which examples. length: L to pad to.
        device: where batches are wanted; on CUDA they are copied from pinned memory.
        share: which of a batch's examples; all of them unless several processes share it.
    """

    def __init__(
        self,
        split: Split,
        order: TrainOrder,
        length: int,
        device: torch.device,
        share: slice = slice(None),
    ) -> None:
        self._split, self._order, self._length, self._device = split, order, length, device
        self._share = share
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dmx-batches")
        self._ahead: tuple[int, object] | None = None

    def __call__(self, step: int) -> Batch:
        """Batch `step` on the device."""
        if self._ahead is not None and self._ahead[0] == step:
            batch = self._ahead[1].result()  # type: ignore[attr-defined]
        else:
            # In the thread as well: the order's state is not made for two at once.
            batch = self._pool.submit(self._read, step).result()
        self._ahead = (step + 1, self._pool.submit(self._read, step + 1))
        return batch.to(self._device)

    def _read(self, step: int) -> Batch:
        batch = make_batch(self._split, self._order(step)[self._share], self._length)
        return batch.map(Tensor.pin_memory) if self._device.type == "cuda" else batch

    def close(self) -> None:
        """Stop the reading thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def eval_batches(
    split: Split,
    batch_size: int,
    length: int,
    device: torch.device,
    share: slice = slice(None),
    skip: int = 0,
) -> Iterator[Batch]:
    """Every example of a split exactly once, the ragged last batch included, sorted by length.

    `share`: which of the batches; all of them unless several processes share the split.
    `skip`: how many of them are left out, the first ones.
    """
    order = np.argsort(split.lengths, kind="stable")
    for start in range(0, len(order), batch_size)[share][skip:]:
        yield make_batch(split, order[start : start + batch_size], length).to(device)
