"""The gates that ship: always, threshold, above_chance, plateau, budget, all, any."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmx.curriculum.gates.base import GATES, Decision, Gate
from dmx.errors import ConfigError
from dmx.registry import choices_message
from dmx.runs.layout import BEST_DEV_ACCURACY, REPORT_KEYS
from dmx.runs.stages import Attempt


@GATES.register("always")
@dataclass(frozen=True, kw_only=True)
class AlwaysGate(Gate):
    """Passes whatever has a checkpoint: the seeds' recipe, which looks at no number."""

    def decide(self, attempt: Attempt) -> Decision:
        return Decision(passed=True, reason=f"always: best dev accuracy {_best(attempt):.4f}")


@GATES.register("threshold")
@dataclass(frozen=True, kw_only=True)
class ThresholdGate(Gate):
    """Passes when a metric reaches a bound.

    Attributes:
        metric: a key of the stage's reports; the default is the promoted checkpoint's accuracy.
        at_least, at_most: the bounds, both included; one of them or both.
    """

    metric: str = BEST_DEV_ACCURACY
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.metric not in REPORT_KEYS:
            raise ConfigError(f"metric {choices_message(self.metric, REPORT_KEYS)}.")
        if self.at_least is None and self.at_most is None:
            raise ConfigError("at_least is required (or at_most) and has no value.")

    def decide(self, attempt: Attempt) -> Decision:
        value = attempt.metric(self.metric)
        if not math.isfinite(value):
            return Decision(passed=False, reason=f"threshold: {self.metric} was not reported")
        if self.at_least is not None and value < self.at_least:
            return _no(f"threshold: {self.metric} {value:.4f} is below {self.at_least:g}")
        if self.at_most is not None and value > self.at_most:
            return _no(f"threshold: {self.metric} {value:.4f} is above {self.at_most:g}")
        return Decision(
            passed=True, reason=f"threshold: {self.metric} {value:.4f} is within bounds"
        )


@GATES.register("above_chance")
@dataclass(frozen=True, kw_only=True)
class AboveChanceGate(Gate):
    """Passes when the best dev accuracy is `margin` above 1 / num_classes, whatever the task."""

    margin: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.margin < 1.0:
            raise ConfigError(f"margin is {self.margin}; it must lie between 0 and 1.")

    def decide(self, attempt: Attempt) -> Decision:
        chance, best = 1.0 / attempt.num_classes, _best(attempt)
        text = f"above_chance: {best:.4f} against chance {chance:.4f} + {self.margin:g}"
        return Decision(passed=best >= chance + self.margin, reason=text)


@GATES.register("plateau")
@dataclass(frozen=True, kw_only=True)
class PlateauGate(Gate):
    """Passes when training has run its course: the last evaluations brought no real gain.

    A stage that was still improving when its steps ran out does not pass; `on_fail: longer`
    then gives it more.

    Attributes:
        evaluations: how many of the last evaluations are looked at.
        min_gain: dev accuracy that counts as a gain.
    """

    evaluations: int = 5
    min_gain: float = 0.002

    def __post_init__(self) -> None:
        if self.evaluations < 1:
            raise ConfigError(f"evaluations is {self.evaluations}; it must be at least 1.")
        if not self.min_gain >= 0.0:
            raise ConfigError(f"min_gain is {self.min_gain}; it must not be negative.")

    def decide(self, attempt: Attempt) -> Decision:
        curve = attempt.dev_accuracies
        if len(curve) <= self.evaluations:
            return _no(
                f"plateau: {len(curve)} evaluations, more than {self.evaluations} are needed"
            )
        before, recent = max(curve[: -self.evaluations]), max(curve[-self.evaluations :])
        text = f"plateau: the last {self.evaluations} evaluations gained {recent - before:+.4f}"
        return Decision(passed=recent - before <= self.min_gain, reason=text)


@GATES.register("budget")
@dataclass(frozen=True, kw_only=True)
class BudgetGate(Gate):
    """Passes when the attempt stayed within its means.

    Attributes:
        max_steps: optimizer steps. max_seconds: wall seconds of the attempt's training.
    """

    max_steps: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_seconds is None:
            raise ConfigError("max_steps is required (or max_seconds) and has no value.")

    def decide(self, attempt: Attempt) -> Decision:
        if self.max_steps is not None and attempt.steps > self.max_steps:
            return _no(f"budget: {attempt.steps} steps, more than {self.max_steps}")
        if self.max_seconds is not None and attempt.seconds > self.max_seconds:
            return _no(f"budget: {attempt.seconds:.0f} s, more than {self.max_seconds:g}")
        text = f"budget: {attempt.steps} steps and {attempt.seconds:.0f} s are within limits"
        return Decision(passed=True, reason=text)


@dataclass(frozen=True, kw_only=True)
class _Combination(Gate):
    gates: tuple[Gate, ...]

    def __post_init__(self) -> None:
        if not self.gates:
            raise ConfigError("gates is empty; it must list at least one gate.")


@GATES.register("all")
@dataclass(frozen=True, kw_only=True)
class AllGate(_Combination):
    """Passes when every one of `gates` passes."""

    def decide(self, attempt: Attempt) -> Decision:
        decisions = [gate.decide(attempt) for gate in self.gates]
        refused = [d for d in decisions if not d.passed]
        return Decision(passed=not refused, reason=_reasons(refused or decisions))


@GATES.register("any")
@dataclass(frozen=True, kw_only=True)
class AnyGate(_Combination):
    """Passes when at least one of `gates` passes."""

    def decide(self, attempt: Attempt) -> Decision:
        decisions = [gate.decide(attempt) for gate in self.gates]
        passed = [d for d in decisions if d.passed]
        return Decision(passed=bool(passed), reason=_reasons(passed or decisions))


def _best(attempt: Attempt) -> float:
    return max((a for a in attempt.dev_accuracies if math.isfinite(a)), default=-math.inf)


def _no(reason: str) -> Decision:
    return Decision(passed=False, reason=reason)


def _reasons(decisions: list[Decision]) -> str:
    return "; ".join(d.reason for d in decisions)
