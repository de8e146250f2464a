"""What a study, a run or a stage will cost before it is launched: work, memory and hours."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dmx.config import RunConfig
from dmx.costs.measure import Probe, StepCost, count_step, probe_step, sizes, stand_in
from dmx.data.prepare import default_data_root, is_prepared
from dmx.data.store import Store
from dmx.errors import ConfigError
from dmx.format import duration, scaled
from dmx.nn.device import pick_device
from dmx.schema import check_number
from dmx.search.simulate import ExpectedSteps, expected_steps
from dmx.tasks import NUM_IMAGES, Task

if TYPE_CHECKING:
    from dmx.study.study import StudyConfig

_MOST_MODELS = 16
"""Models of different size that are counted, of all that a space can propose."""
_COUNT_SECONDS = 20.0
_PROBE_SECONDS = 6.0
_STAGE_EXAMPLES = 4
"""Enough for a typical number of real tokens, which FLOPs and memory hang on."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """An estimate, of a study or of a single run.

    Attributes:
        models: counted, by rising FLOPs. num_models: of different size that the space proposes.
        probes: measured on the cheapest and the dearest model; empty where this machine cannot
            stand for the one that will train (`note` says why).
        steps: optimizer steps in all, but for final_steps, those of retraining the best with other
            seeds.
        gpus_per_trial, cpus_per_trial, slots: trials at once.
    """

    what: str
    models: tuple[StepCost, ...]
    num_models: int = 1
    probes: tuple[Probe, ...]
    steps: ExpectedSteps
    final_steps: int = 0
    eval_every_steps: int
    num_trials: int = 1
    gpus_per_trial: float = 0.0
    cpus_per_trial: float = 1.0
    slots: int = 1
    note: str = ""

    @property
    def memory_bytes(self) -> float:
        """Of the largest model: measured on a GPU, else weights, AdamW and what backward keeps."""
        peaks = [p.peak_memory_bytes for p in self.probes if p.peak_memory_bytes is not None]
        return max(peaks or [m.memory_bytes for m in self.models])

    @property
    def step_seconds(self) -> float:
        """Of a step, averaged over the models; NaN where nothing was measured."""
        return self._averaged([p.step_seconds for p in self.probes])

    @property
    def eval_seconds(self) -> float:
        """Of an evaluation, averaged over the models; NaN where nothing was measured."""
        return self._averaged([p.eval_seconds for p in self.probes])

    def _averaged(self, measured: list[float]) -> float:
        """A time that grows linearly with FLOPs between the two probes, over all models."""
        if not measured:
            return math.nan
        low, high = self.models[0].flops, self.models[-1].flops
        slope = (measured[-1] - measured[0]) / (high - low) if high > low else 0.0
        mean = math.fsum(m.flops for m in self.models) / len(self.models)
        return measured[0] + max(slope, 0.0) * (mean - low)

    @property
    def evaluations(self) -> int:
        """Of the dev split, in all."""
        return math.ceil((self.steps.expected + self.final_steps) / self.eval_every_steps)

    @property
    def trial_seconds(self) -> float:
        """Training and evaluating of all trials one after another, final seeds included."""
        steps = self.steps.expected + self.final_steps
        return self.step_seconds * steps + self.eval_seconds * self.evaluations

    @property
    def wall_seconds(self) -> float:
        """With as many trials at once as there is room for."""
        return self.trial_seconds / max(min(self.slots, self.num_trials), 1)

    @property
    def hours(self) -> float:
        """GPU-hours; core-hours where no GPU is used."""
        return self.trial_seconds * (self.gpus_per_trial or self.cpus_per_trial) / 3600


# -- estimates ----------------------------------------------------------------------------------


def study_cost(
    config: StudyConfig,
    store: Store,
    *,
    slots: int,
    final_seeds: int = 0,
    seconds: float = _PROBE_SECONDS,
    num_dev: int | None = None,
) -> Cost:
    """Estimate a study: count models at the space's corners, time the cheapest and the dearest.

    Args:
        slots: trials at once. seconds: for timing each of the two.
        num_dev: examples of the dev split; None takes the store's.
    """
    runs = corner_runs(config)
    every = runs[0].train.eval_every_steps
    return _cost(
        runs,
        store,
        what=f"study of {config.num_trials} trials, up to {config.max_steps:,} steps each",
        cpus=config.workers.cpus * config.workers.count,
        gpus=config.workers.gpus * config.workers.count,
        seconds=seconds,
        num_dev=num_dev,
        steps=expected_steps(config, eval_every_steps=every, slots=slots),
        num_trials=config.num_trials,
        slots=slots,
        final_steps=final_seeds * config.max_steps,
    )


def run_cost(
    config: RunConfig,
    store: Store,
    *,
    threads: int,
    seconds: float = _PROBE_SECONDS,
    num_dev: int | None = None,
    examples: int = 2,
) -> Cost:
    """Estimate a single run; `seconds` and `num_dev` as in study_cost, `examples` in count_step."""
    train = config.train
    on_gpu = train.device == "cuda" or (train.device == "auto" and torch.cuda.is_available())
    return _cost(
        [config],
        store,
        what=f"run of {train.num_steps:,} steps",
        cpus=threads,
        gpus=1.0 if on_gpu else 0.0,
        seconds=seconds,
        num_dev=num_dev,
        examples=examples,
        steps=ExpectedSteps(full=train.num_steps, expected=float(train.num_steps)),
    )


def stage_cost(
    config: RunConfig, store: Store | None, num_dev: int, *, threads: int
) -> tuple[Cost, str]:
    """Estimate one run of a stage; without data, on a few examples made for it.

    Args:
        num_dev: examples of the dev split. threads: CPU threads of a worker.

    Returns:
        The estimate, always with a probe, and what it was measured on.
    """
    pick_device(config.train.device)
    with contextlib.ExitStack() as stack:
        data = store or stack.enter_context(stand_in(config.task_info))
        cost = run_cost(
            config, data, threads=threads, seconds=1.0, num_dev=num_dev, examples=_STAGE_EXAMPLES
        )
        return cost, data.manifest.label if store is not None else data.manifest.data_name


def _cost(
    runs: Sequence[RunConfig],
    store: Store,
    *,
    cpus: float,
    gpus: float,
    seconds: float,
    num_dev: int | None,
    examples: int = 2,
    **more: Any,
) -> Cost:
    """Count the runs' models, and time the cheapest and the dearest, where this machine can."""
    distinct = _distinct(runs)
    counted = _counted(distinct, store, examples)
    ends = [run for _, run in counted]
    note = ""
    if gpus and not torch.cuda.is_available():
        ends, note = [], "this machine has no GPU, so no time can be measured here"
    elif len(ends) > 1:
        ends = [ends[0], ends[-1]]
    return Cost(
        models=tuple(step for step, _ in counted),
        num_models=len(distinct),
        probes=tuple(
            probe_step(run, store, num_threads=max(int(cpus), 1), seconds=seconds, num_dev=num_dev)
            for run in ends
        ),
        note=note,
        eval_every_steps=runs[0].train.eval_every_steps,
        cpus_per_trial=cpus,
        gpus_per_trial=gpus,
        **more,
    )


def corner_runs(config: StudyConfig) -> list[RunConfig]:
    """The runs at the corners of a study's space, and at its initial points."""
    return [run for _, run in config.space.check(config.task, config.overrides)]


def largest(runs: Iterable[RunConfig], store: Store) -> RunConfig:
    """The run that keeps most memory while it trains, as far as that can be counted."""
    return max(_counted(_distinct(runs), store), key=lambda found: found[0].memory_bytes)[1]


def _distinct(runs: Iterable[RunConfig]) -> list[RunConfig]:
    """The first run of each cost."""
    found: dict[str, RunConfig] = {}
    for run in runs:
        found.setdefault(sizes(run), run)
    return list(found.values())


def _counted(
    runs: list[RunConfig], store: Store, examples: int = 2
) -> list[tuple[StepCost, RunConfig]]:
    """Counted models by rising FLOPs; no more than fit into a moment, spread over all."""
    every = max(math.ceil(len(runs) / _MOST_MODELS), 1)
    last = [runs[-1]] if (len(runs) - 1) % every else []
    started = time.perf_counter()
    found: list[tuple[StepCost, RunConfig]] = []
    for run in [*runs[::every], *last]:
        if len(found) >= 2 and time.perf_counter() - started > _COUNT_SECONDS:
            break
        found.append((count_step(run, store, examples=examples), run))
    return sorted(found, key=lambda item: (item[0].flops, item[0].parameters))


# -- for a dry run ------------------------------------------------------------------------------


class DryData(NamedTuple):
    """What a dry run measures on.

    Attributes:
        num_dev: examples of the dev split; None where they are the store's. words: for the user.
    """

    store: Store
    num_dev: int | None
    words: str


@contextlib.contextmanager
def dry_data(
    task: Task, root: Path | None, obtain: Callable[[Path], Store], *, generate: bool
) -> Iterator[DryData]:
    """The task's data; a stand-in where the run itself would generate them, as nothing is written.

    Args:
        root: the data root; None is the default one.
        obtain: opens data that are there, or a sample, which it puts into the folder it is given.
        generate: the run may generate data.

    Raises:
        DataError: see obtain.
    """
    root = default_data_root() if root is None else root
    if generate and task.generated and not is_prepared(task.name, root):
        num_dev = NUM_IMAGES // 10 if task.published is None else task.published.counts[0][1]
        with stand_in(task) as store:
            words = (
                f"{task.name} is not in {root}; the run would generate it. Measured on "
                f"{store.manifest.data_name}"
            )
            yield DryData(store, num_dev, words)
        return
    with tempfile.TemporaryDirectory(prefix="dmx-dry-run-") as temporary:
        store = obtain(Path(temporary))
        yield DryData(store, None, f"{store.manifest.label}; {dict(store.manifest.splits)}")


def check_price(price: float | None, *, dry_run: bool = True) -> None:
    """Refuse a price that is none, or that no estimate would use."""
    if price is not None and not dry_run:
        raise ConfigError(
            "--price-per-gpu-hour is for --dry-run, which starts nothing; add --dry-run, or leave "
            "it out."
        )
    check_number("--price-per-gpu-hour", price, least=0)


def describe(cost: Cost, price_per_gpu_hour: float | None = None) -> list[str]:
    """The estimate as lines for the terminal."""
    models, probes = cost.models, cost.probes
    counted = f" ({len(models)} of {cost.num_models} sizes counted)" if cost.num_models > 1 else ""
    process = "" if cost.gpus_per_trial else "; the process itself needs about 400 MiB more"
    lines = [
        f"cost of the {cost.what}:",
        f"  parameters: {_range([m.parameters for m in models])}{counted}",
        f"  per step: {_range([m.flops for m in models], 'FLOP')}, "
        f"{scaled(models[0].tokens)} real tokens",
        "  memory for weights, optimizer and activations: "
        f"{_range([m.memory_bytes for m in models], 'B', 1024)}{process}",
    ]
    if peaks := [p.peak_memory_bytes for p in probes if p.peak_memory_bytes is not None]:
        lines.append(f"  memory measured on the GPU: {_range(peaks, 'B', 1024)}")
    if cost.num_trials > 1:
        lines.append(
            f"  optimizer steps: about {scaled(cost.steps.expected)} of {scaled(cost.steps.full)}; "
            f"early stopping saves about {100 * cost.steps.saved:.0f} %"
        )
    if not probes:
        return [*lines, f"  time: not estimated ({cost.note})"]
    lines.append(
        f"  measured on {probes[0].device}: {_span([p.step_seconds for p in probes])} a step, "
        f"{_span([p.eval_seconds for p in probes])} an evaluation"
    )
    if cost.num_trials > 1:
        trial = duration(cost.trial_seconds / cost.num_trials)
        lines.append(f"  time: about {trial} a trial on average, {cost.slots} at once")
    lines.append(f"  wall time: about {duration(cost.wall_seconds)}, without start-up")
    if not cost.gpus_per_trial:
        return [*lines, f"  core-hours: about {cost.hours:.2f} (no GPU)"]
    money = ""
    if price_per_gpu_hour is not None:
        money = f"; {cost.hours * price_per_gpu_hour:.2f} at {price_per_gpu_hour:g} each"
    return [*lines, f"  GPU-hours: about {cost.hours:.2f}{money}"]


def _range(values: Sequence[float], unit: str = "", base: int = 1000) -> str:
    return _from_to(values, lambda value: scaled(value, unit, base))


def _span(seconds: Sequence[float]) -> str:
    return _from_to(seconds, duration)


def _from_to(values: Sequence[float], text: Callable[[float], str]) -> str:
    first, last = text(min(values)), text(max(values))
    return first if first == last else f"{first} to {last}"
