"""Rungs: where ASHA and Hyperband stop trials, as a function of the reports in their order."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

LEAST_FACTOR = 1.1
"""Nearer to 1 there are thousands of rungs, and none of them decides much."""


@dataclass(frozen=True)
class RungEntry:
    """A trial at a rung.

    Attributes:
        accuracy: its dev accuracy there. promoted: whether it went on. needed: the least accuracy
            with which it would; None for the first.
    """

    trial: int
    accuracy: float
    promoted: bool
    needed: float | None = None


@dataclass
class Rung:
    """One rung of a bracket. `steps`: where it lies. `entries`: in the order of their arrival."""

    steps: float
    entries: list[RungEntry] = field(default_factory=list)
    bracket: int = 0

    def __post_init__(self) -> None:
        self._trials = {e.trial for e in self.entries}
        self._sorted = sorted(e.accuracy for e in self.entries if not math.isnan(e.accuracy))

    def cutoff(self, reduction_factor: float) -> float | None:
        """The accuracy that the next trial must reach to go on; None before the first.

        The quantile 1 - 1/factor, linear between order statistics, in numpy.nanpercentile's own
        arithmetic: accuracies are fractions of one number of examples, so ties are common, and
        a last digit would decide them.
        """
        values = self._sorted
        if not values:
            return None
        quantile = (1 - 1 / reduction_factor) * 100 / 100
        place = (len(values) - 1) * quantile
        index = math.floor(place)
        if index + 1 >= len(values):
            return values[-1]
        low, high, share = values[index], values[index + 1], place - index
        if share >= 0.5:
            return high - (high - low) * (1 - share)
        return low + (high - low) * share

    def __contains__(self, trial: int) -> bool:
        return trial in self._trials

    def enter(self, trial: int, accuracy: float, reduction_factor: float) -> RungEntry:
        """Add a trial, and decide whether it goes on."""
        needed = self.cutoff(reduction_factor)
        entry = RungEntry(trial, accuracy, needed is None or not accuracy < needed, needed)
        self.entries.append(entry)
        self._trials.add(trial)
        if not math.isnan(accuracy):
            bisect.insort(self._sorted, accuracy)
        return entry


class Bracket:
    """The rungs of ASHA (Li et al. 2020, arXiv 1810.05934), or of one of Hyperband's brackets.

    Rungs lie at grace * factor^k below max_steps, for k >= number. A report fills the highest rung
    that its step has reached and that its trial has not filled, and the trial stops there when
    it is below the top 1/factor of those that came before it.
    """

    def __init__(
        self, *, grace_steps: float, max_steps: float, reduction_factor: float, number: int = 0
    ) -> None:
        self.factor = reduction_factor
        self.rungs: list[Rung] = []
        k = number
        while (steps := grace_steps * reduction_factor**k) < max_steps:
            self.rungs.append(Rung(steps, bracket=number))
            k += 1

    def report(self, trial: int, step: float, accuracy: float) -> tuple[Rung, RungEntry] | None:
        """Record a report: the rung that it fills, if it fills one, and the trial's entry there."""
        for rung in reversed(self.rungs):
            if step >= rung.steps and trial not in rung:
                return rung, rung.enter(trial, accuracy, self.factor)
        return None


class Brackets:
    """All brackets of a study, filled report by report; ASHA has one.

    Attributes:
        stopped: trial -> why it was stopped: the rung, its accuracy, and what was needed.
    """

    def __init__(
        self, scheduler: str, *, grace_steps: float, max_steps: float, reduction_factor: float
    ) -> None:
        self._max_steps, self._factor = max_steps, reduction_factor
        count = 1
        if scheduler == "hyperband":
            count = num_brackets(
                grace_steps=grace_steps, max_steps=max_steps, reduction_factor=reduction_factor
            )
        self._brackets = [
            Bracket(
                grace_steps=grace_steps,
                max_steps=max_steps,
                reduction_factor=reduction_factor,
                number=number,
            )
            for number in range(count)
        ]
        self.stopped: dict[int, str] = {}

    def report(self, trial: int, step: float, accuracy: float) -> bool:
        """Record a report; False when the trial is to stop."""
        if step >= self._max_steps:
            return True  # it ends by itself, as COMPLETE
        number = bracket_of(trial, len(self._brackets), self._factor)
        found = self._brackets[number].report(trial, step, accuracy)
        if found is None or found[1].promoted:
            return True
        rung, entry = found
        self.stopped[trial] = (
            f"rung {rung.steps:.0f}: {accuracy:.4f}, and {entry.needed:.4f} was needed"
        )
        return False

    def fill(self, reports: Iterable[tuple[int, float, float]]) -> None:
        """Record (trial, step, accuracy) of each report, in their order."""
        for trial, step, accuracy in reports:
            self.report(trial, step, accuracy)

    @property
    def rungs(self) -> list[Rung]:
        """Of all brackets, bracket 0 and its lowest rung first."""
        return [rung for bracket in self._brackets for rung in bracket.rungs]


def num_brackets(*, grace_steps: float, max_steps: float, reduction_factor: float) -> int:
    """Brackets of Hyperband (Li et al. 2018, arXiv 1603.06560).

    Bracket b lets no trial end before grace_steps * reduction_factor^b; in the last one, none ends
    before its full budget.
    """
    count = 0
    while grace_steps * reduction_factor**count < max_steps:
        count += 1
    return count + 1


def bracket_of(trial: int, count: int, reduction_factor: float) -> int:
    """The bracket of a trial, a function of its number alone.

    Hyperband gives bracket b, of `count` = s_max + 1, ceil(count / (s + 1) * factor^s) trials with
    s = s_max - b, so that each costs about the same. A trial goes where most is lacking of that
    share (the lower bracket on a tie): ten trials are split as meant, too.
    """
    if count == 1:
        return 0
    dealt, chosen = _deal(count, reduction_factor)
    while len(chosen) <= trial:
        chosen.append(next(dealt))
    return chosen[trial]


@functools.cache
def _deal(count: int, factor: float) -> tuple[Iterator[int], list[int]]:
    """The brackets of trial 0, 1, ... and those that were drawn already: each report asks."""

    def brackets() -> Iterator[int]:
        sizes = [math.ceil(count / (s + 1) * factor**s - 1e-9) for s in range(count - 1, -1, -1)]
        taken = [0] * count
        for trials in itertools.count(1):
            lacking = [s * trials / sum(sizes) - t for s, t in zip(sizes, taken, strict=True)]
            chosen = max(range(count), key=lambda b: (lacking[b], -b))
            taken[chosen] += 1
            yield chosen

    return brackets(), []


def describe_rungs(
    scheduler: str, *, grace_steps: int, max_steps: int, reduction_factor: float
) -> str:
    """Where trials may end or change, in words."""
    if scheduler == "pbt":
        return f"pbt, a comparison every {grace_steps:,} steps"
    if scheduler == "none":
        return "none, every trial runs its full budget"
    if scheduler == "hyperband":
        count = num_brackets(
            grace_steps=grace_steps, max_steps=max_steps, reduction_factor=reduction_factor
        )
        return (
            f"hyperband, {count} brackets with rungs from {grace_steps:,} steps, "
            f"factor {reduction_factor:g}"
        )
    bracket = Bracket(
        grace_steps=grace_steps, max_steps=max_steps, reduction_factor=reduction_factor
    )
    steps = [f"{rung.steps:,.0f}" for rung in bracket.rungs]
    at = f"rungs at {', '.join(steps)} steps" if steps else "no rung before the end"
    return f"{scheduler}, {at}, the best 1/{reduction_factor:g} go on"
