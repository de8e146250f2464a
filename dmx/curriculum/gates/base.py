"""Gates, pure decisions whether a curriculum stage is good enough; those that ship."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from dmx.errors import ConfigError
from dmx.registry import NamedConfig, Registry, choices_message
from dmx.runs.curriculum import Attempt
from dmx.runs.layout import BEST_DEV_ACCURACY, REPORT_KEYS
from dmx.schema import check_range

GATES: Registry[type[Gate]] = Registry("gate", "dmx.curriculum.gates")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a gate says, and which rule fired with which numbers."""

    passed: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Gate(NamedConfig):
    """Base of every gate: a frozen config whose `decide` depends on the attempt's record alone."""

    registry: ClassVar[Registry[type[Gate]]] = GATES

    def decide(self, attempt: Attempt) -> Decision:
        """Whether the attempt passes; it left a checkpoint, else no gate is asked.

        A metric that is missing or NaN never passes.
        """
        raise NotImplementedError


def _decision(passed: bool, gate: Gate, reason: str) -> Decision:
    return Decision(passed=passed, reason=f"{gate.name}: {reason}")


@GATES.register("always")
@dataclass(frozen=True, kw_only=True)
class AlwaysGate(Gate):
    """Passes whatever has a checkpoint: the seeds' recipe, which looks at no number."""

    def decide(self, attempt: Attempt) -> Decision:
        return _decision(True, self, f"best dev accuracy {_best(attempt):.4f}")


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
        value = attempt.last(self.metric)
        if not math.isfinite(value):
            return _decision(False, self, f"{self.metric} was not reported")
        passed, how = True, "within bounds"
        if self.at_least is not None and value < self.at_least:
            passed, how = False, f"below {self.at_least:g}"
        elif self.at_most is not None and value > self.at_most:
            passed, how = False, f"above {self.at_most:g}"
        return _decision(passed, self, f"{self.metric} {value:.4f} is {how}")


@GATES.register("above_chance")
@dataclass(frozen=True, kw_only=True)
class AboveChanceGate(Gate):
    """Passes when the best dev accuracy is `margin` above 1 / num_classes, whatever the task."""

    margin: float = 0.05

    def __post_init__(self) -> None:
        check_range(self, "margin", above=0, below=1)

    def decide(self, attempt: Attempt) -> Decision:
        chance, best = 1.0 / attempt.num_classes, _best(attempt)
        text = f"{best:.4f} against chance {chance:.4f} + {self.margin:g}"
        return _decision(best >= chance + self.margin, self, text)


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
        check_range(self, "evaluations", least=1)
        check_range(self, "min_gain", least=0)

    def decide(self, attempt: Attempt) -> Decision:
        curve, last = attempt.dev_accuracies, self.evaluations
        if len(curve) <= last:
            return _decision(False, self, f"{len(curve)} evaluations, more than {last} are needed")
        gain = max(curve[-last:]) - max(curve[:-last])
        return _decision(
            gain <= self.min_gain, self, f"the last {last} evaluations gained {gain:+.4f}"
        )


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
        steps, seconds = attempt.steps, attempt.seconds
        if self.max_steps is not None and steps > self.max_steps:
            return _decision(False, self, f"{steps} steps, more than {self.max_steps}")
        if self.max_seconds is not None and seconds > self.max_seconds:
            return _decision(False, self, f"{seconds:.0f} s, more than {self.max_seconds:g}")
        return _decision(True, self, f"{steps} steps and {seconds:.0f} s are within limits")


@dataclass(frozen=True, kw_only=True)
class _Combination(Gate):
    gates: tuple[Gate, ...]

    _decides: ClassVar[Any]
    """`all` or `any`."""

    def __post_init__(self) -> None:
        if not self.gates:
            raise ConfigError("gates is empty; it must list at least one gate.")

    def decide(self, attempt: Attempt) -> Decision:
        decisions = [gate.decide(attempt) for gate in self.gates]
        passed = self._decides(d.passed for d in decisions)
        # Those that decided: of `all` the refusals, of `any` the passes; else every one.
        reasons = [d.reason for d in decisions if d.passed == passed]
        return Decision(passed=passed, reason="; ".join(reasons))


@GATES.register("all")
@dataclass(frozen=True, kw_only=True)
class AllGate(_Combination):
    """Passes when every one of `gates` passes."""

    _decides: ClassVar[Any] = all


@GATES.register("any")
@dataclass(frozen=True, kw_only=True)
class AnyGate(_Combination):
    """Passes when at least one of `gates` passes."""

    _decides: ClassVar[Any] = any


def _best(attempt: Attempt) -> float:
    return max((a for a in attempt.dev_accuracies if math.isfinite(a)), default=-math.inf)
