"""What one optimizer step costs, counted: parameters, FLOPs, bytes moved, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dmx.config import RunConfig
from dmx.data.batches import Batch, make_batch
from dmx.data.store import Store
from dmx.errors import ConfigError
from dmx.model import Classifier
from dmx.nn.device import total_memory
from dmx.schema import to_dict
from dmx.training.trainer import resolve

_OPTIMIZER_BYTES = 7 * 4
"""AdamW per parameter: weight, gradient and two moments are read, all but the gradient written."""
_STATE_BYTES = 4 * 4
"""Kept per parameter while training: weight, gradient, two moments, in float32."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One optimizer step over a whole batch, counted on real training examples.

    Attributes:
        parameters: of the model. tokens: real (unmasked) tokens of a batch.
        flops: forward and backward, matrix products and attention only.
        bytes: read and written by all operations; an upper bound, since kernels may be fused.
        memory_bytes: weights, gradients, optimizer state and what one micro batch keeps for its
            backward pass. Temporaries and libraries come on top.
    """

    parameters: int
    tokens: float
    flops: float
    bytes: float
    memory_bytes: float


class _ByteCounter(TorchDispatchMode):
    """Sums the bytes that operations read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in read}
        is_view = all(t.untyped_storage().data_ptr() in known for t in written)
        if func._schema.is_mutable or not is_view:
            self.total += sum(map(_num_bytes, read)) + sum(map(_num_bytes, written))
        return out


def _num_bytes(tensor: torch.Tensor) -> int:
    """An expanded tensor is no bigger than its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _same_as(known: Any) -> Callable[..., int]:
    """PyTorch's own formula of another operation; like those in its table, it takes tensors."""

    def count(*args: Any, **kwargs: Any) -> int:
        return int(flop_counter.flop_registry[known](*args, **kwargs))

    count._get_raw = True  # type: ignore[attr-defined]
    return count


_ATEN = torch.ops.aten
_ATTENTION = "_scaled_dot_product_flash_attention"
_FORMULAS = {  # what PyTorch's table lacks: in-place products, and the CPU's attention
    _ATEN.addmm_: _same_as(_ATEN.addmm),
    _ATEN.baddbmm_: _same_as(_ATEN.baddbmm),
    **{
        getattr(_ATEN, f"{_ATTENTION}_for_cpu{end}"): _same_as(getattr(_ATEN, f"{_ATTENTION}{end}"))
        for end in ("", "_backward")
    },
}


def sizes(config: RunConfig) -> str:
    """What a run's cost depends on, as text; equal ones cost the same."""
    parts = (to_dict(config.attention), to_dict(config.model), config.train.batch_size)
    text = json.dumps(_without_dropout(parts), sort_keys=True, default=str)
    return text + str(config.train.micro_batch_size)


def _without_dropout(value: Any) -> Any:
    """Dropout rates change a result, and hardly its cost."""
    if isinstance(value, Mapping):
        return {k: _without_dropout(v) for k, v in value.items() if "dropout" not in k}
    return [_without_dropout(v) for v in value] if isinstance(value, list | tuple) else value


def num_parameters(config: RunConfig) -> float:
    """Parameters of a run's model, without its memory; infinite where no tensor is so large.

    NaN where the attention cannot be built without memory.
    """
    task = config.task_info
    config = config.resolved(
        vocab_size=config.model.vocab_size or task.vocab_size,
        num_classes=config.model.num_classes or task.num_classes,
    )
    # All layers have the same shape.
    layers = config.model.num_layers
    counts = []
    for some in range(min(layers, 1), min(layers, 2) + 1):
        model = dataclasses.replace(config.model, num_layers=some)
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                made = Classifier(model, config.attention, paired=task.paired)
        except Exception as error:  # an attention from elsewhere may raise anything
            return math.inf if "overflow" in str(error).lower() else math.nan
        counts.append(sum(p.numel() for p in made.parameters()))
    return float(counts[0] + (layers - 1) * (counts[-1] - counts[0]))


def check_memory(runs: Iterable[tuple[str, RunConfig]], device: torch.device) -> None:
    """Refuse models that no memory of this machine holds, without building them.

    Args:
        runs: what to call each in a message, and its config. device: that would train them.

    Raises:
        ConfigError: weights, gradients and optimizer state alone need more than there is.
    """
    kinds: dict[str, tuple[str, RunConfig]] = {}
    for name, run in runs:
        kinds.setdefault(sizes(run), (name, run))
    have = total_memory(device)
    for name, run in kinds.values():
        parameters = num_parameters(run)
        if _STATE_BYTES * parameters > have:
            many = f"{parameters:.3g}" if math.isfinite(parameters) else "more than 10^18"
            need = f"{_STATE_BYTES * parameters / 2**30:,.0f} GiB"
            need = f"need {need}" if math.isfinite(parameters) else "fit nowhere"
            where = "the GPU" if device.type == "cuda" else "this machine"
            raise ConfigError(
                f"{name}the model has {many} parameters: weights, gradients and the optimizer's "
                f"state {need}, and {where} has {have / 2**30:,.0f} GiB of memory; make the model "
                "smaller."
            )


def count_step(config: RunConfig, store: Store, *, examples: int = 2) -> StepCost:
    """Count a step on the CPU, on `examples` training examples and on twice as many.

    The difference of the two is what an example costs; what remains is the cost of a pass. The
    examples are spread over the split, so that their lengths are typical. One thread: the counters
    see only the thread they were started in.

    Raises:
        ConfigError: the model does not fit this machine's memory.
    """
    check_memory([("", config)], torch.device("cpu"))
    config = resolve(config, store.manifest)
    length = config.model.max_length
    assert length
    split = store.split("train")
    places = np.linspace(0, len(split) - 1, examples + 2)[1:-1].astype(np.int64)
    once = make_batch(split, places, length)
    twice = make_batch(split, np.concatenate([places, places]), length)
    train = config.train
    with threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        model = Classifier(config.model, config.attention, paired=config.task_info.paired)
        on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
        if on_gpu and not model.encoder.packs_on_accelerators:
            model.encoder.packs = False  # counted here, as the run computes it there
        model.train()
        first, second = _count(model, once), _count(model, twice)
    micro = train.micro_batch_size or train.batch_size
    passes = train.batch_size // micro

    def whole(kind: int, count: int, of: int) -> float:
        slope = max(second[kind] - first[kind], 0) / examples
        return max(first[kind] - slope * examples, 0) * of + slope * count

    parameters = sum(p.numel() for p in model.parameters())
    real = float(np.count_nonzero(once.input_ids.numpy())) / examples
    if once.input_ids_1 is not None:
        real += float(np.count_nonzero(once.input_ids_1.numpy())) / examples
    return StepCost(
        parameters=parameters,
        tokens=real * train.batch_size,
        flops=whole(0, train.batch_size, passes),
        bytes=whole(1, train.batch_size, passes) + _OPTIMIZER_BYTES * parameters,
        memory_bytes=_STATE_BYTES * parameters + whole(2, micro, 1),
    )


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch uses so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(count, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _count(model: Classifier, batch: Batch) -> tuple[int, int, int]:
    """(FLOPs, bytes moved, bytes kept for the backward pass) of one forward and backward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # a freed storage's address would be given out again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    model.zero_grad(set_to_none=True)
    flops = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    moved = _ByteCounter()
    with flops, moved, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logits = model(batch.input_ids, batch.input_ids_1)
        F.cross_entropy(logits.float(), batch.labels).backward()
    model.zero_grad(set_to_none=True)
    return int(flops.get_total_flops()), moved.total, sum(kept.values())
