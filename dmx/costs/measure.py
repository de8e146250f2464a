"""What one optimizer step costs: counted on the CPU, and measured by a few real steps here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from dmx.config import RunConfig, TrainConfig
from dmx.data.batches import Batch, eval_batches, make_batch
from dmx.data.store import Manifest, Store
from dmx.data.store_writer import StoreWriter, write_store
from dmx.errors import ConfigError, DmxError
from dmx.model import Classifier
from dmx.nn.device import pick_device, total_memory
from dmx.schema import to_dict
from dmx.tasks import Task
from dmx.training.trainer import Trainer, resolve

_STATE_BYTES = 4 * 4
"""Kept per parameter while training: weight, gradient, two moments, in float32."""

# -- counted ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One optimizer step over a whole batch, counted on real training examples.

    Attributes:
        parameters: of the model. tokens: real (unmasked) tokens of a batch.
        flops: forward and backward, matrix products and attention only.
        memory_bytes: weights, gradients, optimizer state and what one micro batch keeps for its
            backward pass. Temporaries and libraries come on top.
    """

    parameters: int
    tokens: float
    flops: float
    memory_bytes: float


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
    chosen = np.linspace(0, len(split) - 1, examples + 2)[1:-1].astype(np.int64)
    once = make_batch(split, chosen, length)
    twice = make_batch(split, np.concatenate([chosen, chosen]), length)
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
        memory_bytes=_STATE_BYTES * parameters + whole(1, micro, 1),
    )


def _count(model: Classifier, batch: Batch) -> tuple[int, int]:
    """(FLOPs, bytes kept for the backward pass) of one forward and backward pass."""
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
    alone = threads(1)  # the counter sees this thread only
    with alone, flops, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logits = model(batch.input_ids, batch.input_ids_1)
        F.cross_entropy(logits.float(), batch.labels).backward()
    model.zero_grad(set_to_none=True)
    return int(flops.get_total_flops()), sum(kept.values())


# -- measured ------------------------------------------------------------------------------------

_CPU_POSITIONS = 65536
"""Positions, masked ones included, of a step that is timed on a CPU; a larger batch is timed in
part and its time multiplied, since on a CPU it grows with the examples."""
_MOST_STEPS = 40


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Measured times.

    Attributes:
        step_seconds: of an optimizer step, the median. eval_seconds: of the whole dev split,
            estimated from a few batches. peak_memory_bytes: of the GPU, or None.
        steps: how many were timed, after one to warm up. device: "cpu", "cuda" or "mps".
    """

    step_seconds: float
    eval_seconds: float
    peak_memory_bytes: float | None
    steps: int
    device: str


def probe_step(
    config: RunConfig,
    store: Store,
    *,
    num_threads: int = 1,
    seconds: float = 6.0,
    num_dev: int | None = None,
) -> Probe:
    """Time real optimizer steps, and evaluation, for about `seconds`; nothing is written.

    Args:
        num_threads: CPU threads of a worker.
        num_dev: examples of the dev split; None takes the store's.
    """
    whole = config.train.batch_size
    length = config.model.max_length or config.task_info.max_length
    on_cpu = pick_device(config.train.device).type == "cpu"
    train = _part(config.train, max(_CPU_POSITIONS // length, 1)) if on_cpu else config.train
    # Enough steps for a schedule, however few the run has.
    train = dataclasses.replace(train, compile=False, num_steps=max(train.num_steps, 64))
    with threads(num_threads), torch.random.fork_rng():
        trainer = Trainer(dataclasses.replace(config, train=train), store)
        try:
            return _time(trainer, seconds, whole / train.batch_size, num_dev)
        finally:
            trainer.close()


def _part(train: TrainConfig, most: int) -> TrainConfig:
    """The same with a batch of at most `most` examples, in whole micro batches where that goes."""
    if train.batch_size <= most:
        return train
    micro = train.micro_batch_size or train.batch_size
    size = max(most // micro * micro, min(most, micro))
    return dataclasses.replace(
        train, batch_size=size, micro_batch_size=micro if size > micro else None
    )


def _time(trainer: Trainer, seconds: float, times: float, num_dev: int | None) -> Probe:
    """Measure; an optimizer step of the run is `times` as long as one of the trainer."""
    device = trainer.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started, measured = time.perf_counter(), []
    for step in range(_MOST_STEPS):
        batch = trainer.batches(step)
        before = time.perf_counter()
        trainer.train_step(batch)  # exactly what training does
        _wait(device)
        measured.append(time.perf_counter() - before)
        if step and time.perf_counter() - started > 0.7 * seconds:
            break
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    dev = trainer.store.split("dev")
    seen, before = 0, time.perf_counter()
    for batch in eval_batches(dev, trainer.passes.evaluation.size, trainer.length, device):
        trainer.probabilities(batch)
        _wait(device)
        seen += len(batch.labels)
        if time.perf_counter() - before > 0.3 * seconds:
            break
    per_example = (time.perf_counter() - before) / max(seen, 1)
    timed = sorted(measured[1:])
    return Probe(
        step_seconds=timed[len(timed) // 2] * times,
        eval_seconds=per_example * (len(dev) if num_dev is None else num_dev),
        peak_memory_bytes=None if peak is None else float(peak),
        steps=len(timed),
        device=device.type,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch uses so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(count, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- without data -------------------------------------------------------------------------------

_NUM_EXAMPLES = 8
GENERATED, RANDOM = "freshly generated images", "random tokens of the full length"


@contextlib.contextmanager
def stand_in(task: Task) -> Iterator[Store]:
    """A store in a temporary folder, gone afterwards; its manifest's data_name says what it is.

    Pathfinder's images are generated, as the run itself will do; all else is random tokens of the
    full length, which costs as much as the longest real examples.
    """
    examples, name = _examples(task)
    manifest = Manifest(
        task=task.name,
        data_name=name,
        origin="dmx/costs/measure.py",
        note=name,
        num_classes=task.num_classes,
        max_length=task.max_length,
        vocab_size=task.vocab_size,
        paired=task.paired,
        dtype="uint16",
    )

    def fill(writer: StoreWriter) -> None:
        for number, ids in enumerate(examples):
            other = ids[::-1].copy() if task.paired else None
            writer.add("train", ids, number % task.num_classes, other)
        for split in ("dev", "test"):
            writer.place(split, np.arange(len(examples)))

    with tempfile.TemporaryDirectory(prefix="dmx-stand-in-") as root:
        folder = Path(root) / task.name
        yield write_store(folder, manifest, fill)


def _examples(task: Task) -> tuple[list[npt.NDArray[np.uint16]], str]:
    if task.family == "pathfinder":
        from dmx.data.pathfinder import Generator

        with contextlib.suppress(DmxError):  # released sets have no generator
            generator = Generator(task.name, 123)
            images = [generator.image(i)[0].reshape(-1) for i in range(_NUM_EXAMPLES)]
            return [image.astype(np.uint16) for image in images], GENERATED
    draw = np.random.default_rng(0)
    shape = (_NUM_EXAMPLES, task.max_length)
    return list(draw.integers(1, task.vocab_size - 1, shape).astype(np.uint16)), RANDOM
