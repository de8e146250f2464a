"""Schedulers: what is trained next, and what is stopped, as pure functions of a study's record.

A scheduler keeps nothing that is not in the record: it is made anew from it at each start, and what
it remembers of the reports that it has read only spares reading them again.
"""

from __future__ import annotations

import enum
import math
import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, Union

from dmx.errors import ConfigError
from dmx.runs.layout import DEV_ACCURACY
from dmx.runs.study import Search, Study, Takeover
from dmx.search.space import Scalar, SearchSpace

if TYPE_CHECKING:
    from dmx.study.study import StudyConfig

Settings: TypeAlias = Union[Search, "StudyConfig"]
"""Of a study, as its journal tells them or as it is run."""


class Record(Study):
    """A study as its driver knows it: what a scheduler decides by.

    Attributes:
        num_trials: of the whole study. in_flight: the trials that train a segment now.
    """

    def __init__(self, folder: Path, num_trials: int) -> None:
        super().__init__(folder)
        self.num_trials = num_trials
        self.in_flight: set[int] = set()

    def alive(self) -> Iterator[int]:
        """Trials that have not ended, by number, the new ones included."""
        # A study that was continued may want fewer than it has.
        count = max(self.num_trials, len(self.by_number))
        return (trial for trial in range(count) if trial not in self.outcomes)


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


class Comparison(NamedTuple):
    """A population's decision at a step; it is carried out and recorded before training goes on."""

    step: int
    takeovers: tuple[Takeover, ...]


class Scheduler:
    """`none`: every trial trains its full budget in one segment. The others are built on it.

    Attributes:
        proposes_at_once: whether all trials are proposed before the first one trains.
    """

    proposes_at_once = False

    def __init__(self, settings: Settings) -> None:
        self._max_steps = settings.max_steps

    def keep_training(self, record: Record, trial: int, step: int) -> bool:
        """Whether a trial goes on after its report at a step, the latest one in the record."""
        return trial not in self.stopped(record)

    def stopped(self, record: Record) -> Mapping[int, str]:
        """Trials that are to be stopped, and why: the rung."""
        return {}

    def next_segment(self, record: Record) -> Segment | Idle:
        """What is trained next; a trial that was interrupted comes before one that is new."""
        trial = next((n for n in record.alive() if n not in record.in_flight), None)
        if trial is None:
            return WAIT if record.in_flight else DONE
        return Segment(trial, self._max_steps)

    def comparison(self, record: Record) -> Comparison | None:
        """The decision that is due between all trials; None where there is none."""
        return None


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
    """

    proposes_at_once = True

    def __init__(self, config: StudyConfig) -> None:
        super().__init__(config)
        self._seed, self._space = config.seed, config.space
        run = self._space.run_config(config.task, config.overrides, self._space.first())
        self._steps = comparison_steps(
            every=config.grace_steps,
            eval_every_steps=run.train.eval_every_steps,
            max_steps=config.max_steps,
        )

    def next_segment(self, record: Record) -> Segment | Idle:
        alive = list(record.alive())
        reached = {n: max(record.by_number[n].curve, default=0) for n in alive}
        for trial in sorted(set(alive) - record.in_flight, key=lambda n: (reached[n], n)):
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
        members = {n: record.by_number[n] for n in record.alive()}
        if step is None or not members or any(step not in m.curve for m in members.values()):
            return None
        scores = {n: float(m.curve[step][DEV_ACCURACY]) for n, m in members.items()}
        params = {n: m.params_at(step) for n, m in members.items()}
        return Comparison(step, choose_takeovers(self._seed, step, scores, params, self._space))


def comparison_steps(*, every: int, eval_every_steps: int, max_steps: int) -> tuple[int, ...]:
    """Where a population is compared: every so many steps, in whole evaluations; and the end."""
    interval = math.ceil(every / eval_every_steps) * eval_every_steps
    return (*range(interval, max_steps, interval), max_steps)


def choose_takeovers(
    seed: int,
    step: int,
    scores: Mapping[int, float],
    params: Mapping[int, Mapping[str, Scalar]],
    space: SearchSpace,
) -> tuple[Takeover, ...]:
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
            found.append(Takeover(step, trial, source, explore(params[source], space, draw)))
    return tuple(found)


def explore(
    params: Mapping[str, Scalar], space: SearchSpace, draw: random.Random
) -> dict[str, Scalar]:
    """Values near `params`: each is drawn anew, or moved by a fifth, or to the next choice."""
    found = {}
    for name, dist in space.space.items():
        if draw.random() < RESAMPLE:
            found[name] = dist.sample(draw)
        elif dist.kind == "choice":
            index = dist.values.index(params[name]) + draw.choice((-1, 1))
            found[name] = dist.values[min(max(index, 0), len(dist.values) - 1)]
        else:
            found[name] = dist.clip(float(params[name]) * draw.choice(FACTORS))
    return found


def changeable(name: str) -> bool:
    """Whether a setting may change within a run: rates, and nothing that shapes the model."""
    return name in ("optim.learning_rate", "optim.weight_decay") or name.endswith("dropout")


def check_population(space: SearchSpace, num_trials: int) -> None:
    """Refuse a search that population based training cannot do."""
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
