"""ASHA and Hyperband: the rungs where trials stop, a function of the reports in their order."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dmx.runs.study import Report
from dmx.search.schedulers import Record, Scheduler, Settings


def rung_steps(settings: Settings) -> list[float]:
    """Where the rungs lie: at grace * factor^k below the full budget."""
    steps = (settings.grace_steps * settings.reduction_factor**k for k in itertools.count())
    return list(itertools.takewhile(lambda at: at < settings.max_steps, steps))


def num_brackets(settings: Settings) -> int:
    """Brackets of Hyperband (Li et al. 2018, arXiv 1603.06560); ASHA has one.

    Bracket b has no rung before grace * factor^b; in the last one no trial ends before its full
    budget.
    """
    return len(rung_steps(settings)) + 1 if settings.scheduler == "hyperband" else 1


def deal(count: int, reduction_factor: float) -> Iterator[int]:
    """The bracket of trial 0, 1, ..., a function of its number alone.

    Hyperband gives bracket b, of `count` = s_max + 1, ceil(count / (s + 1) * factor^s) trials with
    s = s_max - b, so that each costs about the same. A trial goes where most is lacking of that
    share (the lower bracket on a tie): ten trials are split as meant, too.
    """
    sizes = [
        math.ceil(count / (s + 1) * reduction_factor**s - 1e-9) for s in range(count - 1, -1, -1)
    ]
    taken = [0] * count
    for trials in itertools.count(1):
        lacking = [s * trials / sum(sizes) - t for s, t in zip(sizes, taken, strict=True)]
        chosen = lacking.index(max(lacking))
        taken[chosen] += 1
        yield chosen


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
        place = (len(values) - 1) * ((1 - 1 / reduction_factor) * 100 / 100)
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
        needed = self.cutoff(reduction_factor)
        entry = RungEntry(trial, accuracy, needed is None or not accuracy < needed, needed)
        self.entries.append(entry)
        self._trials.add(trial)
        if not math.isnan(accuracy):
            bisect.insort(self._sorted, accuracy)
        return entry


class SuccessiveHalving(Scheduler):
    """`asha` (Li et al. 2020, arXiv 1810.05934, the variant that stops) and `hyperband`.

    A report fills the highest rung of its trial's bracket that its step has reached and that the
    trial has not filled, and the trial stops there when it is below the top 1/factor of those that
    came before it.

    Attributes:
        rungs: of all brackets, bracket 0 and its lowest rung first.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._factor, steps = settings.reduction_factor, rung_steps(settings)
        self._brackets = [
            [Rung(at, bracket=number) for at in steps[number:]]
            for number in range(num_brackets(settings))
        ]
        self.rungs = list(itertools.chain(*self._brackets))
        self._dealt: list[int] = []  # and no iterator: Ray pickles what it is given
        self._stopped: dict[int, str] = {}
        self._read = 0

    def stopped(self, record: Record) -> Mapping[int, str]:
        return self.fill(record.history)

    def fill(self, history: Sequence[Report]) -> Mapping[int, str]:
        """Take up what is new in a study's history; see `stopped`."""
        for report in history[self._read :]:
            self.report(report.trial, report.step, report.dev_accuracy)
        self._read = len(history)
        return self._stopped

    def report(self, trial: int, step: int, accuracy: float) -> bool:
        """Record a report; False when the trial is to stop."""
        if step >= self._max_steps:
            return True  # it ends by itself, as COMPLETE
        if trial >= len(self._dealt):
            dealt = deal(len(self._brackets), self._factor)
            self._dealt = list(itertools.islice(dealt, 2 * trial + 16))
        for rung in reversed(self._brackets[self._dealt[trial]]):
            if step >= rung.steps and trial not in rung:
                entry = rung.enter(trial, accuracy, self._factor)
                if not entry.promoted:
                    self._stopped[trial] = (
                        f"rung {rung.steps:.0f}: {accuracy:.4f}, and {entry.needed:.4f} was needed"
                    )
                return entry.promoted
        return True


def describe_rungs(settings: Settings) -> str:
    """Where trials may end or change, in words."""
    kind, factor = settings.scheduler, f"{settings.reduction_factor:g}"
    if kind == "pbt":
        return f"pbt, a comparison every {settings.grace_steps:,} steps"
    if kind == "none":
        return "none, every trial runs its full budget"
    if kind == "hyperband":
        return (
            f"hyperband, {num_brackets(settings)} brackets with rungs from "
            f"{settings.grace_steps:,} steps, factor {factor}"
        )
    steps = [f"{at:,.0f}" for at in rung_steps(settings)]
    at = f"rungs at {', '.join(steps)} steps" if steps else "no rung before the end"
    return f"{kind}, {at}, the best 1/{factor} go on"
