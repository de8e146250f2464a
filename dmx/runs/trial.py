"""What was trained and what it reported; what a study optimises of it, and the Pareto front."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dmx.errors import ConfigError
from dmx.runs import events, layout
from dmx.runs.layout import (
    BEST_DEV_ACCURACY,
    BEST_STEP,
    DEV_ACCURACY,
    PARAMETERS,
    PEAK_MEMORY_MB,
    SAMPLES_PER_SECOND,
    TRAIN_SECONDS,
)

TrialStatus = Literal["RUNNING", "COMPLETE", "PRUNED", "FAILED"]


def number(values: Mapping[str, Any], key: str) -> float:
    """A metric as a float; NaN where it is missing or no number."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


@dataclass(kw_only=True)
class Trained:
    """What was trained once.

    Attributes:
        curve: step -> flat metrics at the evaluation there.
        folder: where its checkpoints lie, or None.
    """

    number: int
    curve: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def reports(self) -> tuple[Mapping[str, Any], ...]:
        """Flat metrics at each evaluation, by rising step."""
        return tuple(self.curve[step] for step in sorted(self.curve))

    @property
    def last_report(self) -> Mapping[str, Any]:
        """Flat metrics at the last evaluation; {} before the first."""
        return self.curve[self.steps] if self.curve else {}

    @property
    def steps(self) -> int:
        """Optimizer steps, as far as reported."""
        return max(self.curve, default=0)

    @property
    def seconds(self) -> float:
        """Training time, as far as reported."""
        return float(self.last_report.get(TRAIN_SECONDS, 0.0))

    @property
    def best(self) -> float:
        """The highest dev accuracy, or NaN."""
        return self.highest(DEV_ACCURACY, BEST_DEV_ACCURACY)

    @property
    def best_step(self) -> int:
        return int(self.last_report.get(BEST_STEP, 0))

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the best one, if there is one."""
        found = None if self.folder is None else self.folder / layout.BEST_DIR
        return found if found is not None and found.is_dir() else None

    def last(self, key: str) -> float:
        """A metric of the last report, or NaN."""
        return number(self.last_report, key)

    def median(self, key: str) -> float:
        """The median of a metric over all reports, or NaN; steadier than the last."""
        return _median(number(r, key) for r in self.curve.values())

    def highest(self, *keys: str, within: float = math.inf) -> float:
        """The highest value of some metrics over all reports of so many steps, or NaN."""
        found = (number(r, k) for step, r in self.curve.items() if step <= within for k in keys)
        return max(filter(math.isfinite, found), default=math.nan)


def _median(values: Iterable[float]) -> float:
    found = list(filter(math.isfinite, values))
    return statistics.median(found) if found else math.nan


# -- what is optimised ----------------------------------------------------------------------

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Objective:
    """One thing to optimise.

    Attributes:
        name: as in --objective. label: with its unit, for tables and axes.
        direction: which values are better. of: its value of what was trained, or NaN.
    """

    name: str
    label: str
    direction: Direction
    of: Callable[[Trained], float]


def _latency(trained: Trained) -> float:
    """Milliseconds of training (forward, backward, update) per sequence."""
    speeds = (number(r, SAMPLES_PER_SECOND) for r in trained.curve.values())
    return _median(1000 / speed for speed in speeds if 0 < speed < math.inf)


def _memory(trained: Trained) -> float:
    """Of the GPU, or of the trial's process without one."""
    return trained.highest(PEAK_MEMORY_MB)


_ALL = (
    Objective("accuracy", "dev accuracy", "maximize", lambda trained: trained.best),
    Objective("latency", "latency, ms per sample", "minimize", _latency),
    Objective("memory", "peak memory, MiB", "minimize", _memory),
    Objective("parameters", "parameters", "minimize", lambda trained: trained.highest(PARAMETERS)),
)
OBJECTIVES: Mapping[str, Objective] = {objective.name: objective for objective in _ALL}
ACCURACY = "accuracy"
DEFAULT = (ACCURACY,)


def parse_objectives(text: str) -> tuple[str, ...]:
    """The names in a comma list, accuracy first.

    Raises:
        ConfigError: an unknown or repeated name, more than three, or accuracy is not among them.
    """
    names = [name.strip() for name in text.split(",")]
    choices = ", ".join(OBJECTIVES)
    for name in names:
        if name not in OBJECTIVES:
            raise ConfigError(f"--objective {name!r} is unknown; choices: {choices}.")
    if len(set(names)) != len(names):
        raise ConfigError(f"--objective {text} names one twice.")
    if ACCURACY not in names:
        raise ConfigError(
            f"--objective {text} leaves accuracy out; without it the cheapest model wins untrained."
        )
    if len(names) > 3:
        raise ConfigError(
            f"--objective {text} names {len(names)}; with more than three nearly every trial is on "
            "the front."
        )
    return tuple(sorted(names, key=lambda n: n != ACCURACY))


def directions(names: Sequence[str]) -> list[Direction]:
    """Optuna's words for which values are better."""
    return [OBJECTIVES[name].direction for name in names]


def missing(values: Mapping[str, float]) -> str:
    """Why a trial with these values of its objectives cannot count: `it reported no latency`."""
    lacking = [
        "dev accuracy" if name == ACCURACY else name
        for name, value in values.items()
        if not math.isfinite(value)
    ]
    return "it reported no " + " and no ".join(lacking) if lacking else ""


def pareto_front(names: Sequence[str], points: Mapping[int, Sequence[float]]) -> tuple[int, ...]:
    """The trials that no other one beats, by number.

    A trial is beaten by one that is no worse in any objective and better in one; equal ones stand
    side by side, as in Optuna's `study.best_trials`. Trials with a value that is not finite are
    left out.
    """
    signs = [1.0 if d == "maximize" else -1.0 for d in directions(names)]
    scored = {
        number: tuple(s * v for s, v in zip(signs, values, strict=True))
        for number, values in points.items()
        if all(map(math.isfinite, values))
    }

    def beaten(own: tuple[float, ...]) -> bool:
        return any(
            all(o >= v for o, v in zip(other, own, strict=True)) and other != own
            for other in scored.values()
        )

    return tuple(sorted(number for number, own in scored.items() if not beaten(own)))


# -- a trial --------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Trial(Trained):
    """One trial of a study, or the only one of a single run.

    Attributes:
        number: in the order of proposal, from 0.
        status: COMPLETE (full budget), PRUNED (stopped by the scheduler), FAILED, or RUNNING.
        drawn: the searched values by SearchSpace's labels, which tell a setting's distributions
            under several conditions apart.
        error: one line of what failed, or "". reason: of an early stop, in this session: the rung.
        objectives: of its study.
        changes: step -> its searched values from then on, where it took over another trial.
        started_after: how many trials had ended when it was proposed.
    """

    status: TrialStatus = "RUNNING"
    drawn: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    reason: str = ""
    objectives: tuple[str, ...] = DEFAULT
    changes: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    started_after: int = 0

    @property
    def values(self) -> dict[str, float]:
        """Of each objective of its study, by name; NaN where it was not measured."""
        return self.values_of(self.objectives)

    def values_of(self, objectives: Iterable[str]) -> dict[str, float]:
        """The same of other objectives."""
        return {name: OBJECTIVES[name].of(self) for name in objectives}

    @property
    def params(self) -> dict[str, Any]:
        """The searched values by dotted RunConfig path."""
        return events.settings_of(self.drawn)

    def params_at(self, step: float) -> dict[str, Any]:
        """The searched values that its weights of a step were trained with."""
        found = self.params
        for changed, values in sorted(self.changes.items()):
            if changed < step:
                found = {**found, **values}
        return found


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The highest dev accuracy first, the earlier one on a tie; last those that have none."""
    return sorted(trials, key=lambda t: (-b if math.isfinite(b := t.best) else math.inf, t.number))


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The trial with the highest finite dev accuracy; the earliest on a tie; or None."""
    return next((t for t in ranked(trials) if math.isfinite(t.best)), None)


_HELP = {
    r"out of memory|allocate memory|OutOfMemory|does not fit": (
        "a smaller model or train.micro_batch_size needs less memory, and so do fewer trials at "
        "once (--max-concurrent-trials)"
    ),
    r"not finite": "search smaller learning rates, or set train.clip_gradient_norm=1.0",
    r"made no progress": "allow more time (--trial-timeout), or search smaller models",
    r"actor died|ActorDied|worker died|WorkerCrashed|NodeDied|SIGKILL": (
        "the system ended its process, mostly for want of memory: run fewer trials at once "
        "(--max-concurrent-trials) or smaller models"
    ),
    r"No space left|Disk quota": "make room on the disk, or give another --storage",
    r"reported no": "leave that objective out",
}
"""What an error says -> what would help."""


def describe_failures(trials: Sequence[Trial]) -> str:
    """What failed most, and what would help, in one sentence; "" where nothing failed.

    Errors that differ in numbers only are one.
    """
    failed = [t for t in trials if t.status == "FAILED"]
    if not failed:
        return ""
    kinds = [re.sub(r"\d[\d.,e+-]*", "#", trial.error) for trial in failed]
    ((most, times),) = Counter(kinds).most_common(1)
    first = failed[kinds.index(most)]
    error = first.error.rstrip(". ") or "it left no message"
    total = "All" if len(failed) == len(trials) else f"{len(failed)} of {len(trials)}"
    text = f"{total} {'trials' if len(trials) > 1 else 'trial'} failed"
    if times < len(failed):
        text += f", {times} of them"
    helps = (remedy for said, remedy in _HELP.items() if re.search(said, error))
    remedy = next(helps, f"trials/{first.number:04d}/error.txt may tell more")
    return f"{text} as trial {first.number}: {error}; {remedy}."
