"""Schedulers: what is trained next, and what is stopped, as pure functions of a study's record.

A scheduler keeps nothing that is not in the record: it is made anew from it at each start, and what
it remembers of the reports that it has read only spares reading them again.
"""

from __future__ import annotations

import enum
import math
import random
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dmx.errors import ConfigError
from dmx.runs.layout import DEV_ACCURACY
from dmx.runs.study import SchedulerKind
from dmx.search.rungs import Brackets
from dmx.search.space import Distribution, Scalar, SearchSpace


class _Trial(Protocol):
    """A trial, see runs.run.Trial."""

    @property
    def curve(self) -> Mapping[int, Mapping[str, Any]]: ...
    @property
    def changes(self) -> Mapping[int, Mapping[str, Any]]: ...
    def params_at(self, step: float) -> Mapping[str, Any]: ...


class Record(Protocol):
    """What a scheduler decides by.

    `in_flight` are the trials that train a segment now; all else is a runs.study.Study.
    """

    @property
    def num_trials(self) -> int: ...
    @property
    def in_flight(self) -> Collection[int]: ...
    @property
    def by_number(self) -> Mapping[int, _Trial]: ...
    @property
    def history(self) -> Sequence[tuple[int, int, Mapping[str, Any], float]]: ...
    @property
    def outcomes(self) -> Collection[int]: ...
    @property
    def compared(self) -> Collection[int]: ...


@dataclass(frozen=True)
class Segment:
    """A piece of training.

    Attributes:
        trial: its number; one that is not in the record yet is to be proposed.
        until: train up to this step.
        adopt: the step at which it goes on from another trial's weights, or None.
    """

    trial: int
    until: int
    adopt: int | None = None


class Idle(enum.Enum):
    """There is no segment: WAIT until others have come further; DONE is the end of the study."""

    WAIT = enum.auto()
    DONE = enum.auto()


WAIT, DONE = Idle.WAIT, Idle.DONE


@dataclass(frozen=True)
class Exploit:
    """`trial` goes on from the weights of `source`, with the searched values `params`."""

    trial: int
    source: int
    params: Mapping[str, Scalar]


@dataclass(frozen=True)
class Comparison:
    """A population's decision at a step; it is carried out and recorded before training goes on."""

    step: int
    exploits: tuple[Exploit, ...]


class Scheduler:
    """`none`: every trial trains its full budget in one segment. The others are built on it.

    Attributes:
        proposes_at_once: whether all trials are proposed before the first one trains.
    """

    proposes_at_once = False

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps

    def keep_training(self, record: Record, trial: int, step: int) -> bool:
        """Whether a trial goes on after its report at a step, the latest one in the record."""
        return trial not in self.stopped(record)

    def stopped(self, record: Record) -> Mapping[int, str]:
        """Trials that are to be stopped, and why: the rung."""
        return {}

    def next_segment(self, record: Record) -> Segment | Idle:
        """What is trained next; a trial that was interrupted comes before one that is new."""
        busy, ended = record.in_flight, record.outcomes
        free = (n for n in _numbers(record) if n not in ended and n not in busy)
        trial = next(free, None)
        if trial is None:
            return WAIT if busy else DONE
        return Segment(trial, self._max_steps)

    def comparison(self, record: Record) -> Comparison | None:
        """The decision that is due between all trials; None where there is none."""
        return None


def _numbers(record: Record) -> range:
    """Of all trials, the new ones included; a study that was continued may want fewer."""
    return range(max(record.num_trials, len(record.by_number)))


def _alive(record: Record) -> list[int]:
    """Trials that have not ended, by number."""
    return [trial for trial in _numbers(record) if trial not in record.outcomes]


class SuccessiveHalving(Scheduler):
    """`asha` (Li et al. 2020, arXiv 1810.05934, the variant that stops) and `hyperband`."""

    def __init__(
        self, kind: SchedulerKind, *, grace_steps: int, max_steps: int, reduction_factor: float
    ) -> None:
        super().__init__(max_steps)
        self.brackets = Brackets(
            kind,
            grace_steps=min(grace_steps, max_steps),
            max_steps=max_steps,
            reduction_factor=reduction_factor,
        )
        self._read = 0

    def stopped(self, record: Record) -> Mapping[int, str]:
        while self._read < len(record.history):
            trial, step, metrics, _ = record.history[self._read]
            self._read += 1
            accuracy = metrics.get(DEV_ACCURACY)
            if accuracy is not None:
                self.brackets.report(trial, step, accuracy)
        return self.brackets.stopped


# -- population based training -----------------------------------------------------------------

QUANTILE = 0.2
"""The share that copies, and the share that is copied from; at least one member each."""
RESAMPLE = 0.25
"""How often a setting is drawn anew instead of being multiplied by one of FACTORS."""
FACTORS = (0.8, 1.2)
MIN_MEMBERS = 4


class PopulationBasedTraining(Scheduler):
    """`pbt` (Jaderberg et al. 2017, arXiv 1711.09846), with truncation selection.

    At fixed steps the worst fifth take weights and settings of members drawn from the best fifth,
    and each copied setting is perturbed or drawn anew: a function of the seed, the step and the
    scores. Between two comparisons a member trains one segment, so members take turns where there
    are fewer slots than members.

    Args:
        steps: at which the population is compared, and the last one; see comparison_steps.
    """

    proposes_at_once = True

    def __init__(self, *, steps: Sequence[int], seed: int, space: SearchSpace) -> None:
        super().__init__(steps[-1])
        self._steps, self._seed, self._space = steps, seed, space

    def next_segment(self, record: Record) -> Segment | Idle:
        alive = _alive(record)
        reached = {n: max(record.by_number[n].curve, default=0) for n in alive}
        for trial in sorted(set(alive) - set(record.in_flight), key=lambda n: (reached[n], n)):
            at = reached[trial]
            if at in self._steps[:-1] and at not in record.compared:
                continue  # the others must get there first
            until = next((s for s in self._steps if s > at), self._max_steps)
            before = max((s for s in self._steps if s < until), default=0)
            adopts = before in record.by_number[trial].changes
            return Segment(trial, until, before if adopts else None)
        return WAIT if alive else DONE

    def comparison(self, record: Record) -> Comparison | None:
        """At the first step without one that every member has reached."""
        step = next((s for s in self._steps[:-1] if s not in record.compared), None)
        members = {n: record.by_number[n] for n in _alive(record)}
        if step is None or not members or any(step not in m.curve for m in members.values()):
            return None
        scores = {n: float(m.curve[step][DEV_ACCURACY]) for n, m in members.items()}
        params = {n: m.params_at(step) for n, m in members.items()}
        return Comparison(step, choose_exploits(self._seed, step, scores, params, self._space))


def comparison_steps(*, every: int, eval_every_steps: int, max_steps: int) -> tuple[int, ...]:
    """The steps at which a population is compared, and the last step at the end.

    Args:
        every: the wanted interval, rounded up to whole evaluations.
    """
    interval = math.ceil(every / eval_every_steps) * eval_every_steps
    return (*range(interval, max_steps, interval), max_steps)


def choose_exploits(
    seed: int,
    step: int,
    scores: Mapping[int, float],
    params: Mapping[int, Mapping[str, Scalar]],
    space: SearchSpace,
) -> tuple[Exploit, ...]:
    """Which trial copies which at a step.

    Args:
        scores: dev accuracy at that step of every member that is still in the population.
        params: the current searched values of each.
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
            found.append(Exploit(trial, source, explore(params[source], space, draw)))
    return tuple(found)


def explore(
    params: Mapping[str, Scalar], space: SearchSpace, draw: random.Random
) -> dict[str, Scalar]:
    """Values near `params`: each is drawn anew, or moved by a fifth, or to the next choice."""
    return {
        name: _fresh(dist, draw) if draw.random() < RESAMPLE else _moved(params[name], dist, draw)
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
        index = dist.values.index(value) + draw.choice((-1, 1))
        return dist.values[min(max(index, 0), len(dist.values) - 1)]
    return _within(float(value) * draw.choice(FACTORS), dist)


def _within(value: float, dist: Distribution) -> Scalar:
    low, high = (float(v) for v in dist.values)
    value = min(max(value, low), high)
    return round(value) if dist.kind.endswith("int") else value


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
    if num_trials < MIN_MEMBERS:
        raise ConfigError(
            f"scheduler pbt with {num_trials} trials has none to copy from; it needs "
            f"at least {MIN_MEMBERS}."
        )
