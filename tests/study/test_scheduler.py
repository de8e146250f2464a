"""ASHA against the rule itself, and after a restart at every report."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dmx.runs.layout import DEV_ACCURACY, FAILURE, STEPS, UNDER_WAY
from dmx.runs.study import Search
from dmx.search.rungs import SuccessiveHalving
from dmx.search.schedulers import DONE, WAIT, Idle, Scheduler, Segment
from dmx.search.study_log import StudyLog
from dmx.study.ray_tune import NUMBER_KEY, Decisions
from dmx.study.study import catch_up
from tests.study.helpers import next_trial, open_log

MAX_STEPS, GRACE, FACTOR = 20, 2, 3.0
TRIALS = 12


@dataclass
class Rule:
    """ASHA as arXiv 1810.05934 and Ray have it, written anew.

    Rungs stand at grace * factor^k. A report is recorded in the highest rung that it has reached
    and that does not know the trial; it stops the trial when it is below the best 1/factor
    quantile of what was recorded there before (linear between order statistics).
    """

    rungs: dict[float, dict[int, float]] = field(
        default_factory=lambda: {GRACE * FACTOR**k: {} for k in range(3)}  # 2, 6, 18
    )

    def stops(self, number: int, step: int, value: float) -> bool:
        if step >= MAX_STEPS:
            return False
        for milestone in sorted(self.rungs, reverse=True):
            recorded = self.rungs[milestone]
            if step < milestone or number in recorded:
                continue
            before = sorted(recorded.values())
            recorded[number] = value
            return bool(before) and value < self.quantile(before)
        return False

    @staticmethod
    def quantile(values: list[float]) -> float:
        place = (1 - 1 / FACTOR) * (len(values) - 1)
        low = math.floor(place)
        high = min(low + 1, len(values) - 1)
        return values[low] + (place - low) * (values[high] - values[low])


def open_study(folder: Path) -> StudyLog:
    return open_log(folder, num_trials=TRIALS)


SETTINGS = Search(
    searched={},
    scheduler="asha",
    sampler="tpe",
    seed=1,
    num_trials=TRIALS,
    max_steps=MAX_STEPS,
    grace_steps=GRACE,
    reduction_factor=FACTOR,
)


def asha() -> SuccessiveHalving:
    return SuccessiveHalving(SETTINGS)


def rungs(scheduler: SuccessiveHalving) -> list[tuple[int, dict[int, float]]]:
    """(steps, {trial: accuracy}), lowest first."""
    found = scheduler.rungs
    return [(int(r.steps), {e.trial: e.accuracy for e in r.entries}) for r in found]


def stops(decisions: Decisions, number: int, **result: Any) -> bool:
    """Whether a trial is stopped after a result, which Ray gives the trial's config."""
    return decisions("an id", {**result, "config": {NUMBER_KEY: number}})


def script(seed: int) -> list[tuple[int, int, float]]:
    """(trial, step, accuracy) in an order that four workers could produce."""
    draw = random.Random(seed)
    level = [draw.random() * 0.5 for _ in range(TRIALS)]
    at, waiting, running, found = [0] * TRIALS, list(range(TRIALS)), [], []
    while waiting or running:
        while waiting and len(running) < 4:
            running.append(waiting.pop(0))
        number = draw.choice(running)
        at[number] += 2
        found.append((number, at[number], level[number] + 0.01 * at[number] + draw.random() * 0.05))
        if at[number] >= MAX_STEPS:
            running.remove(number)
    return found


def play(folder: Path, reports: list[tuple[int, int, float]], restarts: set[int]) -> Any:
    """Decisions by (trial, step), and the rungs; before each report in `restarts` all is lost."""
    log, scheduler = open_study(folder), asha()
    decisions: dict[tuple[int, int], bool] = {}
    stopped: set[int] = set()
    for number in range(TRIALS):
        log.start(number)
    for place, (number, step, value) in enumerate(reports):
        if place in restarts:
            before = rungs(scheduler)
            log.close()
            log, scheduler = open_study(folder), asha()
            assert scheduler.stopped(log).keys() == stopped
            assert rungs(scheduler) == before, "replayed rungs are the live ones"
        if number in stopped:
            continue
        decider = Decisions(log, scheduler)
        result = {STEPS: step, DEV_ACCURACY: value, "best_dev_accuracy": value}
        decisions[number, step] = stops(decider, number, **result)
        again = stops(decider, number, **result)
        assert again == decisions[number, step], "a repeated report decides the same"
        if decisions[number, step]:
            stopped.add(number)
    assert scheduler.stopped(log).keys() == stopped
    recorded = rungs(scheduler)
    log.close()
    return decisions, recorded


@pytest.mark.parametrize("seed", range(4))
def test_decisions_are_the_rules(tmp_path, seed):
    decisions, recorded = play(tmp_path / "s", script(seed), set())
    rule = Rule()
    stopped: set[int] = set()
    for number, step, value in script(seed):
        if number not in stopped:
            expected = rule.stops(number, step, value)
            assert decisions[number, step] == expected, (number, step)
            if expected:
                stopped.add(number)
    assert recorded == [(int(m), rule.rungs[m]) for m in sorted(rule.rungs)]
    assert 3 <= len(stopped) < TRIALS, "the script is one in which ASHA does something"


def test_a_restart_before_any_report_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    reports = script(5)
    expected = play(tmp_path / "whole", reports, set())
    assert play(tmp_path / "all", reports, set(range(len(reports)))) == expected


def test_a_failure_and_training_that_goes_on_are_no_results(tmp_path):
    log = open_study(tmp_path / "s")
    log.start(0)
    for scheduler in (asha(), Scheduler(SETTINGS)):
        decisions = Decisions(log, scheduler)
        failed = {STEPS: 2, DEV_ACCURACY: 0.0, FAILURE: "it broke", "done": True}
        under_way = {STEPS: 2, DEV_ACCURACY: 0.0, UNDER_WAY: True, "done": False}
        assert stops(decisions, 0, **failed) and not stops(decisions, 0, **under_way)
        assert not log.history and not scheduler.stopped(log)
    log.close()


def test_without_a_scheduler_everything_is_recorded(tmp_path):
    log = open_study(tmp_path / "s")
    decisions = Decisions(log, Scheduler(SETTINGS))
    for number in range(3):
        log.start(number)
        for step in (2, 4, 6):
            result = {STEPS: step, DEV_ACCURACY: -number, "best_dev_accuracy": 0}
            assert not stops(decisions, number, **result)
    assert [r[:2] for r in log.history] == [(n, s) for n in range(3) for s in (2, 4, 6)]
    log.close()


def test_segments_are_a_function_of_the_record(tmp_path):
    """Interrupted trials come first; a study waits for those that train, and then it is done."""
    log, scheduler = open_log(tmp_path / "s", num_trials=3), Scheduler(SETTINGS)

    def take() -> Segment | Idle:
        found = scheduler.next_segment(log)
        assert scheduler.next_segment(log) == found, "asking changes nothing"
        if isinstance(found, Segment):
            log.start(found.trial)
            log.in_flight.add(found.trial)
        return found

    assert [take() for _ in range(4)] == [*(Segment(n, MAX_STEPS) for n in range(3)), WAIT]
    log.in_flight.discard(1)  # its process was lost
    assert take() == Segment(1, MAX_STEPS)
    log.finish(1, "FAILED", "it broke")
    log.in_flight.discard(1)
    assert take() is WAIT
    log.close()
    log = open_log(tmp_path / "s", num_trials=3)
    assert [take(), take(), take()] == [Segment(0, MAX_STEPS), Segment(2, MAX_STEPS), WAIT]
    for number in (0, 2):
        log.finish(number, "FAILED", "it broke")
        log.in_flight.discard(number)
    assert take() is DONE
    log.close()


class Heard:
    """Notes what an observer hears."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.known: list[int] = []
        self.reasons: list[str] = []

    def continues(self, trials):
        self.known = [t.number for t in trials]

    def reported(self, number, metrics):
        self.calls.append(("reported", number, metrics[STEPS]))

    def ended(self, result):
        self.calls.append(("ended", result.number, result.status))
        self.reasons.append(result.reason)


def test_what_a_crash_left_undone_is_carried_out_and_shown(tmp_path):
    """A kill after the journal's line, and before the table and TensorBoard, hides nothing."""
    log, scheduler, heard = open_study(tmp_path / "s"), asha(), Heard()
    catch_up(log, scheduler, (heard,))
    assert heard.calls == [], "a fresh study has nothing to catch up with"
    decisions = Decisions(log, scheduler)
    for number, value in ((0, 0.9), (1, 0.1)):
        assert next_trial(log) is not None
        result = {STEPS: 2, DEV_ACCURACY: value, "best_dev_accuracy": value}
        assert stops(decisions, number, **result) == bool(number)
    log.close()  # killed: the trial was not stopped yet

    log, heard = open_study(tmp_path / "s"), Heard()
    catch_up(log, asha(), (heard,))
    assert heard.calls == [("reported", 1, 2), ("ended", 1, "PRUNED")]
    assert heard.known == [0], "the other one is told of now"
    assert heard.reasons == ["rung 2: 0.1000, and 0.9000 was needed"]
    assert (next_trial(log) or (None,))[0] == 0
    log.close()  # killed: the outcome is written, and was not shown

    log, heard = open_study(tmp_path / "s"), Heard()
    catch_up(log, asha(), (heard,))
    assert heard.calls == [("ended", 1, "PRUNED")]
    log.close()
