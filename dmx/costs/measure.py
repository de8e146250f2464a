"""What one optimizer step costs: counted on the CPU, and measured by a few real steps here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dmx.config import RunConfig, TrainConfig
from dmx.data.batches import Batch, eval_batches, make_batch
from dmx.data.store import Manifest, Store
from dmx.data.store_writer import StoreWriter, write_store
from dmx.errors import ConfigError, DmxError
from dmx.model import Classifier
from dmx.nn.device import pick_device, total_memory
from dmx.schema import flatten, to_dict
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


def sizes(config: RunConfig) -> str:
    """What a run's cost depends on, as text: not on dropout rates. Equal ones cost the same."""
    train = config.train
    shape = {"attention": to_dict(config.attention), "model": to_dict(config.model)}
    kept = [(k, v) for k, v in flatten(shape).items() if "dropout" not in k]
    return repr((sorted(kept), train.batch_size, train.micro_batch_size))


def num_parameters(config: RunConfig) -> float:
    """Parameters of a run's model, without its memory; infinite where no tensor is so large.

    NaN where the attention cannot be built without memory.
    """
    task = config.task_info
    config = config.resolved(
        vocab_size=config.model.vocab_size or task.vocab_size,
        num_classes=config.model.num_classes or task.num_classes,
    )
    layers = config.model.num_layers  # all of the same shape
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
        need = _STATE_BYTES * parameters
        if need > have:
            finite = math.isfinite(need)
            where = "the GPU" if device.type == "cuda" else "this machine"
            raise ConfigError(
                f"{name}the model has {f'{parameters:.3g}' if finite else 'more than 10^18'} "
                "parameters: weights, gradients and the optimizer's state "
                f"{f'need {need / 2**30:,.0f} GiB' if finite else 'fit nowhere'}, and {where} has "
                f"{have / 2**30:,.0f} GiB of memory; make the model smaller."
            )


def count_step(config: RunConfig, store: Store, *, examples: int = 2) -> StepCost:
    """Count a step on the CPU, on `examples` training examples and on twice as many.

    The difference of the two is what an example costs; what remains is the cost of a pass. The
    examples are spread over the split, so that their lengths are typical.

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        model = Classifier(config.model, config.attention, paired=config.task_info.paired)
        on_gpu = train.device != "cpu" and torch.cuda.is_available()
        if on_gpu and not model.encoder.packs_on_accelerators:
            model.encoder.packs = False  # counted here, as the run computes it there
        model.train()
        counted = list(zip(_count(model, once), _count(model, twice), strict=True))
    micro = train.micro_batch_size or train.batch_size
    # A pass over n examples costs fixed + n * each, in FLOPs and in bytes.
    each = [max(second - first, 0) / examples for first, second in counted]
    fixed = [max(c[0] - e * examples, 0) for c, e in zip(counted, each, strict=True)]
    parameters = sum(p.numel() for p in model.parameters())
    sides = [once.input_ids] if once.input_ids_1 is None else [once.input_ids, once.input_ids_1]
    real = sum(float(torch.count_nonzero(ids)) for ids in sides) / examples
    return StepCost(
        parameters=parameters,
        tokens=real * train.batch_size,
        flops=fixed[0] * (train.batch_size // micro) + each[0] * train.batch_size,
        memory_bytes=_STATE_BYTES * parameters + fixed[1] + each[1] * micro,
    )


def _same_as(known: Any) -> Callable[..., int]:
    """PyTorch's own formula of another operation; like those in its table, it takes tensors."""
    count = functools.partial(flop_registry[known])
    count._get_raw = True  # type: ignore[attr-defined]
    return count


_ATEN = torch.ops.aten
_SDPA = "_scaled_dot_product_flash_attention"
_FORMULAS = {  # what PyTorch's table lacks: in-place products, and the CPU's attention
    getattr(_ATEN, lacking): _same_as(getattr(_ATEN, known))
    for lacking, known in (
        ("addmm_", "addmm"),
        ("baddbmm_", "baddbmm"),
        (f"{_SDPA}_for_cpu", _SDPA),
        (f"{_SDPA}_for_cpu_backward", f"{_SDPA}_backward"),
    )
}


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
        num_threads: CPU threads of a worker. num_dev: examples of the dev split, or the store's.
    """
    length = config.model.max_length or config.task_info.max_length
    on_cpu = pick_device(config.train.device).type == "cpu"
    train = _part(config.train, max(_CPU_POSITIONS // length, 1)) if on_cpu else config.train
    times = config.train.batch_size / train.batch_size
    # Enough steps for a schedule, however few the run has.
    train = dataclasses.replace(train, compile=False, num_steps=max(train.num_steps, 64))
    with threads(num_threads), torch.random.fork_rng():
        trainer = Trainer(dataclasses.replace(config, train=train), store)
        device, dev = trainer.device, store.split("dev")
        try:
            steps, peak = _time_steps(trainer, 0.7 * seconds)
            per_example = _time_evaluation(trainer, 0.3 * seconds)
        finally:
            trainer.close()
    return Probe(
        step_seconds=sorted(steps)[len(steps) // 2] * times,
        eval_seconds=per_example * (len(dev) if num_dev is None else num_dev),
        peak_memory_bytes=peak,
        steps=len(steps),
        device=device.type,
    )


def _part(train: TrainConfig, most: int) -> TrainConfig:
    """The same with a batch of at most `most` examples, in whole micro batches where that goes."""
    if train.batch_size <= most:
        return train
    micro = train.micro_batch_size or train.batch_size
    size = max(most // micro * micro, min(most, micro))
    return dataclasses.replace(
        train, batch_size=size, micro_batch_size=micro if size > micro else None
    )


def _time_steps(trainer: Trainer, seconds: float) -> tuple[list[float], float | None]:
    """Seconds of each step after the first one, and the GPU's peak memory in bytes."""
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    started, measured = time.perf_counter(), []
    for step in range(_MOST_STEPS):
        batch = trainer.batches(step)
        before = time.perf_counter()
        trainer.train_step(batch)  # exactly what training does
        _wait(trainer.device)
        measured.append(time.perf_counter() - before)
        if step and time.perf_counter() - started > seconds:
            break
    peak = float(torch.cuda.max_memory_allocated(trainer.device)) if on_gpu else None
    return measured[1:], peak


def _time_evaluation(trainer: Trainer, seconds: float) -> float:
    """Seconds an example."""
    dev, size = trainer.store.split("dev"), trainer.passes.evaluation.size
    seen, before = 0, time.perf_counter()
    for batch in eval_batches(dev, size, trainer.length, trainer.device):
        trainer.probabilities(batch)
        _wait(trainer.device)
        seen += len(batch.labels)
        if time.perf_counter() - before > seconds:
            break
    return (time.perf_counter() - before) / max(seen, 1)


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
