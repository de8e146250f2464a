"""What a study optimises: accuracy, or accuracy and what it costs; and the Pareto front."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dmx.errors import ConfigError
from dmx.runs.layout import (
    BEST_DEV_ACCURACY,
    DEV_ACCURACY,
    PARAMETERS,
    PEAK_MEMORY_MB,
    SAMPLES_PER_SECOND,
)

Direction = Literal["maximize", "minimize"]
Reports = Sequence[Mapping[str, Any]]
"""What a trial reported, by rising step."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One thing to optimise.

    Attributes:
        name: as in --objective. label: with its unit, for tables and axes.
        direction: which values are better. of: its value from a trial's reports, or NaN.
        help: what is measured.
    """

    name: str
    label: str
    direction: Direction
    of: Callable[[Reports], float]
    help: str


def _numbers(reports: Reports, key: str) -> list[float]:
    found = (r.get(key) for r in reports)
    return [
        float(v)
        for v in found
        if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
    ]


def _accuracy(reports: Reports) -> float:
    found = _numbers(reports, BEST_DEV_ACCURACY) + _numbers(reports, DEV_ACCURACY)
    return max(found, default=math.nan)


def _latency(reports: Reports) -> float:
    found = [1000 / v for v in _numbers(reports, SAMPLES_PER_SECOND) if v > 0]
    return statistics.median(found) if found else math.nan


def _memory(reports: Reports) -> float:
    return max(_numbers(reports, PEAK_MEMORY_MB), default=math.nan)


def _parameters(reports: Reports) -> float:
    return max(_numbers(reports, PARAMETERS), default=math.nan)


OBJECTIVES: Mapping[str, Objective] = {
    o.name: o
    for o in (
        Objective(
            name="accuracy",
            label="dev accuracy",
            direction="maximize",
            of=_accuracy,
            help="the highest accuracy on the dev split, in 0..1",
        ),
        Objective(
            name="latency",
            label="latency, ms per sample",
            direction="minimize",
            of=_latency,
            help="milliseconds of training (forward, backward, update) per sequence: the median "
            "over the trial's evaluations of 1000 / samples_per_second",
        ),
        Objective(
            name="memory",
            label="peak memory, MiB",
            direction="minimize",
            of=_memory,
            help="the highest peak_memory_mb: of the GPU, or of the trial's process without one",
        ),
        Objective(
            name="parameters",
            label="parameters",
            direction="minimize",
            of=_parameters,
            help="trainable numbers of the model",
        ),
    )
}
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


def evaluate(names: Sequence[str], reports: Reports) -> tuple[float, ...]:
    """A trial's value of each objective; NaN where it was not measured."""
    return tuple(OBJECTIVES[name].of(reports) for name in names)


def missing(names: Sequence[str], values: Sequence[float]) -> str:
    """Why a trial cannot count: `it reported no latency`; "" where every value is finite."""
    lacking = [
        "dev accuracy" if name == ACCURACY else name
        for name, value in zip(names, values, strict=True)
        if not math.isfinite(value)
    ]
    return "it reported no " + " and no ".join(lacking) if lacking else ""


def pareto_front(
    names: Sequence[str], points: Mapping[int, Sequence[float]] | Iterable[tuple[int, Any]]
) -> tuple[int, ...]:
    """The trials that no other one beats, by number.

    A trial is beaten by one that is no worse in any objective and better in one; equal ones stand
    side by side, as in Optuna's `study.best_trials`. Trials with a value that is not finite are
    left out.
    """
    signs = [1.0 if d == "maximize" else -1.0 for d in directions(names)]
    scored = {
        number: tuple(s * v for s, v in zip(signs, values, strict=True))
        for number, values in dict(points).items()
        if all(map(math.isfinite, values))
    }

    def beaten(own: tuple[float, ...]) -> bool:
        return any(
            all(o >= v for o, v in zip(other, own, strict=True)) and other != own
            for other in scored.values()
        )

    return tuple(sorted(number for number, own in scored.items() if not beaten(own)))
