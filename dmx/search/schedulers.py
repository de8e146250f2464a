"""Population based training: when a population is compared, who copies whom, and what changes.

Jaderberg et al. 2017 (arXiv 1711.09846), with truncation selection: at fixed steps the worst fifth
take weights and settings of members drawn from the best fifth, and each copied setting that may
change is perturbed or drawn anew. All of it is a function of the seed, the step and the scores.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmx.errors import ConfigError
from dmx.search.space import Distribution, Scalar, SearchSpace

QUANTILE = 0.2
"""The share that copies, and the share that is copied from; at least one member each."""
RESAMPLE = 0.25
"""How often a setting is drawn anew instead of being multiplied by one of FACTORS."""
FACTORS = (0.8, 1.2)
LEAST_MEMBERS = 4
GENERATION = "compared"
"""The journal's event: {"event", "step", "exploits": [{"trial", "source", "params"}]}."""


@dataclass(frozen=True)
class Exploit:
    """At `step`, `trial` goes on from the weights of `source`, with the settings `point`."""

    step: int
    trial: int
    source: int
    point: Mapping[str, Scalar]


def changeable(name: str) -> bool:
    """Whether a setting may change within a run: rates, and nothing that shapes the model."""
    return name in ("optim.learning_rate", "optim.weight_decay") or name.endswith("dropout")


def check_population(space: SearchSpace, num_trials: int) -> None:
    """Refuse a search that population based training cannot do.

    Raises:
        ConfigError: a searched value shapes the model or the data, a value is conditional, nothing
            is searched, or there are too few members.
    """
    fixed = [name for name in space.names() if not changeable(name)]
    if fixed:
        raise ConfigError(
            f"scheduler pbt copies weights between trials, so {', '.join(fixed)} cannot be "
            "searched; fix each with --set, or use another scheduler."
        )
    if space.conditions:
        raise ConfigError("scheduler pbt cannot search conditional values; fix their condition.")
    if not space.space:
        raise ConfigError("scheduler pbt has nothing to change; every value is fixed.")
    if num_trials < LEAST_MEMBERS:
        raise ConfigError(
            f"scheduler pbt with {num_trials} trials has nobody to copy from; it needs "
            f"at least {LEAST_MEMBERS}."
        )


def boundaries(*, every: int, evaluation: int, max_steps: int) -> tuple[int, ...]:
    """The steps at which the population is compared, and the last step at the end.

    Args:
        every: the wanted interval, rounded up to whole evaluations. evaluation: steps between two.
    """
    interval = math.ceil(every / evaluation) * evaluation
    return (*range(interval, max_steps, interval), max_steps)


def decide(
    *,
    seed: int,
    step: int,
    scores: Mapping[int, float],
    points: Mapping[int, Mapping[str, Scalar]],
    space: SearchSpace,
) -> tuple[Exploit, ...]:
    """Who copies whom at a step.

    Args:
        scores: dev accuracy at that step of every member that is still in the population.
        points: the current settings of each.
    """
    order = sorted(scores, key=lambda n: (-scores[n], n))  # the earlier one on a tie
    if len(order) < 2:
        return ()
    count = max(1, int(QUANTILE * len(order)))
    best, worst = order[:count], order[-count:]
    found = []
    for trial in sorted(worst):
        draw = random.Random(zlib.crc32(f"{seed}/{step}/{trial}".encode()))
        source = draw.choice(best)
        if scores[source] > scores[trial]:
            point = explore(points[source], space, draw)
            found.append(Exploit(step, trial, source, point))
    return tuple(found)


def explore(
    point: Mapping[str, Scalar], space: SearchSpace, draw: random.Random
) -> dict[str, Scalar]:
    """The settings near `point`: each is drawn anew, or moved by a fifth, or to the next choice."""
    return {
        name: _fresh(dist, draw) if draw.random() < RESAMPLE else _moved(point[name], dist, draw)
        for name, dist in space.space.items()
    }


def _fresh(dist: Distribution, draw: random.Random) -> Scalar:
    if dist.kind == "choice":
        return draw.choice(dist.values)
    low, high = (float(v) for v in dist.values)
    if dist.kind.startswith("log"):
        value = math.exp(draw.uniform(math.log(low), math.log(high)))
    else:
        value = draw.uniform(low, high)
    return _within(value, dist)


def _moved(value: Scalar, dist: Distribution, draw: random.Random) -> Scalar:
    if dist.kind == "choice":
        place = dist.values.index(value) + draw.choice((-1, 1))
        return dist.values[min(max(place, 0), len(dist.values) - 1)]
    return _within(float(value) * draw.choice(FACTORS), dist)


def _within(value: float, dist: Distribution) -> Scalar:
    low, high = (float(v) for v in dist.values)
    value = min(max(value, low), high)
    return round(value) if dist.kind.endswith("int") else value


def apply(
    point: Mapping[str, Any], exploits: Mapping[int, Mapping[str, Any]], step: float
) -> dict[str, Any]:
    """The settings of a member at a step: those it began with, and what changed before the step.

    Args:
        exploits: step -> settings of that member from then on.
    """
    current = dict(point)
    for at in sorted(exploits):
        if at < step:
            current.update(exploits[at])
    return current
