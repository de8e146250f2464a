"""What a curriculum does next, as pure functions of its configuration and its history."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dmx.config import RunConfig
from dmx.curriculum.config import CurriculumConfig, StageConfig
from dmx.runs.layout import DEV_ACCURACY
from dmx.runs.stages import History, Stage

NextStep = Literal["promote", "retry", "longer", "stop"]
_SEED_STEP = 1009
"""How far a retry's seeds lie from the stage's own."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A stage to start, or to continue after a crash.

    Attributes:
        number: the attempt's number, its folder. retry: see Attempt.
        config: what is trained. source: where the weights come from: {} for nowhere, else `path`
            with `stage` and `attempt` where it is a stage of this run.
        resumed: the attempt was launched before.
    """

    stage: StageConfig
    number: int
    retry: int
    config: RunConfig
    source: Mapping[str, Any]
    resumed: bool

    @property
    def reinit(self) -> tuple[str, ...]:
        """What may start afresh; weights of the stage itself fit as they are."""
        return () if self.source.get("stage") == self.stage.name else self.stage.reinit


def next_launches(
    curriculum: CurriculumConfig,
    history: History,
    selected: Collection[str],
    busy: Collection[str],
) -> list[Launch]:
    """Every stage that could run now, in the file's order.

    Args:
        selected: stages that this session may run. busy: stages that are running.
    """
    found = []
    for stage in curriculum.stages:
        if stage.name not in selected or stage.name in busy:
            continue
        state = history.stage(stage.name)
        if state.status in ("passed", "failed"):
            continue
        if stage.parent is not None and history.stage(stage.parent).promoted is None:
            continue
        found.append(_launch(stage, state, history))
    return found


def _launch(stage: StageConfig, state: Stage, history: History) -> Launch:
    current = state.current
    if current is not None and current.decision is None:
        retry, number = current.retry, current.number
    else:
        retry, number = len(state.attempts), state.num_attempts
    source = _source(stage, state, history, retry)
    return Launch(
        stage=stage,
        number=number,
        retry=retry,
        config=attempt_config(stage, retry),
        source=source,
        resumed=current is not None and current.decision is None,
    )


def _source(stage: StageConfig, state: Stage, history: History, retry: int) -> Mapping[str, Any]:
    on_fail = stage.on_fail
    if retry and on_fail.action == "longer" and not on_fail.afresh and stage.search is None:
        decision = state.attempts[retry - 1].decision
        assert decision is not None
        if decision["checkpoint"] is not None:
            return {"stage": stage.name, **_brief(decision["checkpoint"])}
    if stage.parent is not None:
        promoted = history.stage(stage.parent).promoted
        assert promoted is not None
        return {"stage": stage.parent, **_brief(promoted)}
    return {} if stage.init_path is None else {"path": stage.init_path}


def _brief(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return {key: checkpoint[key] for key in ("attempt", "path", "sha256")}


def attempt_config(stage: StageConfig, retry: int) -> RunConfig:
    """The stage's config, with the seeds or the steps of a later try."""
    config = stage.config
    if retry == 0:
        return config
    if stage.on_fail.action == "longer":
        steps = max(round(config.train.num_steps * stage.on_fail.factor**retry), 1)
        steps = max(steps, config.optim.warmup_steps + 1)
        return dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=steps))
    shift = _SEED_STEP * retry
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, seed=config.train.seed + shift),
        data=dataclasses.replace(config.data, seed=config.data.seed + shift),
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an attempt ends.

    Attributes:
        passed: what the gate said. reason: which rule fired. next: what follows.
        attempt: the attempt that is promoted, if one is.
    """

    passed: bool
    reason: str
    next: NextStep
    attempt: int | None = None

    @property
    def outcome(self) -> str:
        """What follows, in words."""
        if self.next == "promote":
            return "promoted" if self.passed else "promoted all the same (on_fail: continue)"
        return {
            "retry": "not passed; trying again with new seeds (on_fail: retry)",
            "longer": "not passed; training longer (on_fail: longer)",
            "stop": "not passed; this branch ends here (on_fail: stop)",
        }[self.next]


def judge(
    stage: StageConfig,
    state: Stage,
    checkpoints: Mapping[int, Mapping[str, Any]],
    failure: str | None,
) -> Verdict:
    """Decide about the stage's latest attempt.

    Args:
        checkpoints: the best one of each attempt, where one exists; see Stage.promoted.
        failure: why the attempt broke, if it did; then it never passes.
    """
    current = state.current
    assert current is not None
    if failure is None and current.number in checkpoints:
        decision = stage.gate.decide(current)
        passed, reason = decision.passed, decision.reason
    else:
        passed, reason = False, f"failed: {failure or 'it left no checkpoint'}"
    if passed:
        return Verdict(passed=True, reason=reason, next="promote", attempt=current.number)
    on_fail = stage.on_fail
    used = len(state.attempts) - 1
    again = on_fail.action == "retry" or (on_fail.action == "longer" and failure is None)
    if again and used < on_fail.times:
        return Verdict(passed=False, reason=reason, next=on_fail.action)  # type: ignore[arg-type]
    if "continue" in (on_fail.action, on_fail.then) and checkpoints:
        best = max(checkpoints, key=lambda n: (_accuracy(checkpoints[n]), -n))
        return Verdict(passed=False, reason=reason, next="promote", attempt=best)
    return Verdict(passed=False, reason=reason, next="stop")


def _accuracy(checkpoint: Mapping[str, Any]) -> float:
    accuracy = checkpoint[DEV_ACCURACY]
    return -1.0 if accuracy is None else float(accuracy)


def wanted_tests(
    curriculum: CurriculumConfig, history: History
) -> list[tuple[StageConfig, StageConfig]]:
    """(stage, stage whose test split) that are not measured yet: its own, and the last one's."""
    last = curriculum.last
    found = []
    for stage in curriculum.stages:
        state = history.stage(stage.name)
        if state.promoted is not None:
            places = (stage,) if stage is last else (stage, last)
            found += [(stage, on) for on in places if on.name not in state.tests]
    return found


def to_rejudge(
    curriculum: CurriculumConfig, history: History, selected: Collection[str]
) -> list[StageConfig]:
    """Stages that were refused by a gate, or an on_fail, that has been changed since."""
    found = []
    for stage in curriculum.stages:
        state = history.stage(stage.name)
        if stage.name not in selected or state.status != "failed" or state.current is None:
            continue
        if state.current.judging != stage.judging():
            found.append(stage)
    return found


def all_passed(history: History, selected: Collection[str]) -> bool:
    """Whether every selected stage was promoted."""
    return all(history.stage(name).status == "passed" for name in selected)


def has_work(curriculum: CurriculumConfig, history: History, selected: Collection[str]) -> bool:
    """Whether a session would find anything to do."""
    return bool(
        next_launches(curriculum, history, selected, ())
        or wanted_tests(curriculum, history)
        or to_rejudge(curriculum, history, selected)
    )
