"""A short measurement on the device at hand: what a stage costs in time, memory and operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from dmx.config import RunConfig
from dmx.data.batches import make_batch
from dmx.data.store import Store
from dmx.errors import DmxError
from dmx.model import Classifier
from dmx.trainer import build_model, pick_device

_CPU_POSITIONS = 16384
"""Positions, masked ones included, of the sequences that are measured on a CPU."""
_BUDGET_SECONDS = 1.0
_MAX_REPEATS = 3
_OPTIMIZER_COPIES = 4
"""Weights, gradients, and AdamW's two moments."""


def _same_as(known: Any) -> Callable[..., int]:
    """The formula of an operation in PyTorch's own table."""

    def count(*args: Any, **kwargs: Any) -> int:
        return int(flop_counter.flop_registry[known](*args, **kwargs))

    count._get_raw = True  # type: ignore[attr-defined]  # it takes tensors, not their shapes
    return count


_ATEN = torch.ops.aten
_FORMULAS = {  # PyTorch's own table lacks the in-place products and the CPU's attention
    _ATEN.addmm_: _same_as(_ATEN.addmm),
    _ATEN.baddbmm_: _same_as(_ATEN.baddbmm),
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _same_as(
        _ATEN._scaled_dot_product_flash_attention
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _same_as(
        _ATEN._scaled_dot_product_flash_attention_backward
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage costs.

    Attributes:
        parameters: number of them. input: what was measured on.
        tokens_per_sequence: real tokens of the measured sequences, on average.
        flops_per_step: floating-point operations of one optimizer step, forward and backward.
        memory_mb: weights, optimizer and the activations of a micro batch: measured on CUDA, from
            the sizes of all saved tensors elsewhere.
        step_seconds: of one optimizer step. evaluation_seconds: of one pass over the dev split.
        total_seconds: of the whole stage. device: where that was measured.
    """

    parameters: int
    input: str
    tokens_per_sequence: float
    flops_per_step: float
    memory_mb: float
    step_seconds: float
    evaluation_seconds: float
    total_seconds: float
    device: str


def probe(config: RunConfig, store: Store | None, num_dev: int, *, threads: int) -> Cost:
    """Measure a few sequences, forward and backward, and extrapolate to the stage.

    Args:
        config: resolved. store: its data; without them, generated or random input stands in.
        num_dev: examples of the dev split. threads: CPU threads of a worker.
    """
    torch.set_num_threads(1)  # operations in other threads than this one cannot be counted
    device = pick_device(config.train.device)
    assert config.model.max_length
    micro = config.train.micro_batch_size or config.train.batch_size
    count = (
        micro
        if device.type == "cuda"
        else min(micro, max(_CPU_POSITIONS // config.model.max_length, 2))
    )
    ids, other, labels, name = _input(config, store, count)
    tokens = float((ids != 0).sum()) / count
    model = build_model(config).to(device)
    pair = None if other is None else other.to(device)
    run = _Step(model, ids.to(device), pair, labels.to(device), _bf16(config, device))
    with _sizes_of_saved_tensors() as saved, _counter() as counter:
        run.train()
    torch.set_num_threads(threads)
    flops = float(counter.get_total_flops()) / count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    train = _time(run.train, device) / count
    parameters = sum(p.numel() for p in model.parameters())
    if device.type == "cuda":
        memory = 1.0 * torch.cuda.max_memory_allocated(device) + 2 * 4 * parameters
    else:
        memory = _OPTIMIZER_COPIES * 4 * parameters + sum(saved.values()) * micro / count
    evaluate = _time(run.evaluate, device) / count
    step = train * config.train.batch_size
    evaluation = evaluate * num_dev
    steps, every = config.train.num_steps, config.train.eval_every_steps
    return Cost(
        parameters=parameters,
        input=name,
        tokens_per_sequence=tokens,
        flops_per_step=flops * config.train.batch_size,
        memory_mb=memory / 2**20,
        step_seconds=step,
        evaluation_seconds=evaluation,
        total_seconds=steps * step + -(-steps // every) * evaluation,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    )


class _Step:
    """One forward and backward pass, or a forward pass only."""

    def __init__(
        self, model: Classifier, ids: Tensor, other: Tensor | None, labels: Tensor, bf16: bool
    ) -> None:
        self._model, self._ids, self._other, self._labels = model, ids, other, labels
        self._bf16 = bf16

    def _logits(self) -> Tensor:
        with torch.autocast(self._ids.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            logits: Tensor = self._model(self._ids, self._other)
        return logits.float()

    def train(self) -> None:
        self._model.train().zero_grad(set_to_none=True)
        F.cross_entropy(self._logits(), self._labels).backward()

    @torch.no_grad()
    def evaluate(self) -> None:
        self._model.eval()
        self._logits()


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def _bf16(config: RunConfig, device: torch.device) -> bool:
    wanted = config.train.precision
    return wanted == "bf16" or (wanted == "auto" and device.type == "cuda")


def _time(action: Callable[[], None], device: torch.device) -> float:
    """Seconds of the fastest call, after one to warm up where it is not the only one."""
    best, begun = float("inf"), time.perf_counter()
    for _ in range(_MAX_REPEATS):
        _wait(device)
        started = time.perf_counter()
        action()
        _wait(device)
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() - begun > _BUDGET_SECONDS:
            break
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _input(
    config: RunConfig, store: Store | None, count: int
) -> tuple[Tensor, Tensor | None, Tensor, str]:
    """Ids [B, L], the second text [B, L] or None, labels [B], and where they come from."""
    assert config.model.max_length and config.model.vocab_size
    length, task = config.model.max_length, config.task_info
    if store is not None:
        batch = make_batch(store.split("train"), np.arange(count), length)
        return batch.input_ids, batch.input_ids_1, batch.labels, store.manifest.label
    labels = torch.arange(count) % (config.model.num_classes or 2)
    if task.family == "pathfinder":
        try:
            return _images(task.name, count, length), None, labels, "freshly generated images"
        except DmxError:
            pass
    generator = torch.Generator().manual_seed(0)
    shape = (count, length)
    ids = torch.randint(1, config.model.vocab_size, shape, generator=generator)
    return ids, ids.flip(0) if task.paired else None, labels, "random tokens"


def _images(task: str, count: int, length: int) -> Tensor:
    from dmx.data.pathfinder import Generator

    generator = Generator(task, 123)
    images = [generator.image(index)[0].reshape(-1) for index in range(count)]
    ids = torch.from_numpy(np.stack(images)).long()
    return F.pad(ids, (0, length - ids.shape[1]))


@contextmanager
def _sizes_of_saved_tensors() -> Iterator[dict[int, int]]:
    """Storage address -> bytes of everything that autograd keeps within the block."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
