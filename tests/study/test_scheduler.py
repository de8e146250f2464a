"""ASHA against the rule itself, and after a restart at every report."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dmx.runs.metrics import DEV_ACCURACY, FAILURE, STEPS, UNDER_WAY
from dmx.search.ledger import Ledger
from dmx.search.rungs import Brackets
from dmx.study.ray_tune import NUMBER_KEY, RecordingScheduler
from dmx.study.study import _catch_up
from tests.study.helpers import space

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


def open_ledger(folder: Path) -> Ledger:
    return Ledger(folder, name="s", space=space(folder.parent), num_trials=TRIALS, seed=1)


def open_asha(ledger: Ledger, kind: str = "asha") -> RecordingScheduler:
    brackets = Brackets(kind, max_steps=MAX_STEPS, grace_steps=GRACE, reduction_factor=FACTOR)
    return RecordingScheduler(ledger, brackets)


def rungs(asha: RecordingScheduler) -> list[tuple[int, dict[int, float]]]:
    """(steps, {trial: accuracy}), lowest first."""
    assert asha._brackets is not None
    return [(int(r.steps), {e.trial: e.accuracy for e in r.entries}) for r in asha._brackets.rungs]


def fake_trial(number: int, session: str) -> Any:
    """Ray's trial, whose id is another in each session."""
    return SimpleNamespace(config={NUMBER_KEY: number}, trial_id=f"{session}_{number}")


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
    ledger = open_ledger(folder)
    asha = open_asha(ledger)
    decisions: dict[tuple[int, int], bool] = {}
    stopped: set[int] = set()
    for place, (number, step, value) in enumerate(reports):
        if place in restarts:
            before = rungs(asha)
            ledger.close()
            ledger = open_ledger(folder)
            asha = open_asha(ledger)
            assert rungs(asha) == before, "replayed rungs are the live ones"
            assert asha.stopped.keys() == stopped
        if number in stopped:
            continue
        trial = fake_trial(number, f"session{place}")
        asha.on_trial_add(None, trial)
        result = {STEPS: step, DEV_ACCURACY: value, "best_dev_accuracy": value}
        if step >= MAX_STEPS:
            asha.on_trial_complete(None, trial, result)
            decisions[number, step] = False
        else:
            decisions[number, step] = asha.on_trial_result(None, trial, result) == "STOP"
            again = asha.on_trial_result(None, trial, result) == "STOP"
            assert again == decisions[number, step], "a repeated report decides the same"
        if decisions[number, step]:
            stopped.add(number)
    recorded = rungs(asha)
    ledger.close()
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


def test_a_failure_is_not_a_result(tmp_path):
    ledger = open_ledger(tmp_path / "s")
    for scheduler in (open_asha(ledger), RecordingScheduler(ledger)):
        trial = fake_trial(0, "x")
        failed = {STEPS: 2, DEV_ACCURACY: 0.0, FAILURE: "it broke", "done": True}
        scheduler.on_trial_add(None, trial)
        assert scheduler.on_trial_result(None, trial, failed) == "STOP"
        scheduler.on_trial_complete(None, trial, failed)
        assert not ledger.reports and not scheduler.stopped
    assert all(not recorded for _, recorded in rungs(open_asha(ledger)))
    ledger.close()


def test_training_that_goes_on_is_not_a_result(tmp_path):
    ledger = open_ledger(tmp_path / "s")
    for scheduler in (open_asha(ledger), RecordingScheduler(ledger)):
        result = {STEPS: 2, DEV_ACCURACY: 0.0, UNDER_WAY: True, "done": False}
        scheduler.on_trial_add(None, fake_trial(0, "x"))
        assert scheduler.on_trial_result(None, fake_trial(0, "x"), result) == "CONTINUE"
        scheduler.on_trial_complete(None, fake_trial(0, "x"), result)
        assert not ledger.reports and not scheduler.stopped
    ledger.close()


def test_without_a_scheduler_everything_is_recorded(tmp_path):
    ledger = open_ledger(tmp_path / "s")
    fifo = RecordingScheduler(ledger)
    for number in range(3):
        for step in (2, 4):
            result = {STEPS: step, DEV_ACCURACY: -number, "best_dev_accuracy": 0}
            assert fifo.on_trial_result(None, fake_trial(number, "x"), result) == "CONTINUE"
        fifo.on_trial_complete(None, fake_trial(number, "x"), {**result, STEPS: 6})
    assert [(n, s) for n, s, _ in ledger.record.history()] == [
        (n, s) for n in range(3) for s in (2, 4, 6)
    ]
    ledger.close()


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
    ledger = open_ledger(tmp_path / "s")
    asha, heard = open_asha(ledger), Heard()
    _catch_up(ledger, asha, (heard,))
    assert heard.calls == [], "a fresh study has nothing to catch up with"
    for number, value in ((0, 0.9), (1, 0.1)):
        assert ledger.next_trial() is not None
        result = {STEPS: 2, DEV_ACCURACY: value, "best_dev_accuracy": value}
        decision = asha.on_trial_result(None, fake_trial(number, "x"), result)
        assert decision == ("STOP" if number else "CONTINUE")
    ledger.close()  # killed: the trial was not stopped yet

    ledger = open_ledger(tmp_path / "s")
    assert ledger.num_interrupted == 2
    heard = Heard()
    _catch_up(ledger, open_asha(ledger), (heard,))
    assert heard.calls == [("reported", 1, 2), ("ended", 1, "PRUNED")]
    assert heard.known == [0], "the other one is told of now"
    assert heard.reasons == ["rung 2: 0.1000, and 0.9000 was needed"]
    assert ledger.num_interrupted == 1 and (ledger.next_trial() or (None,))[0] == 0
    ledger.close()  # killed: the outcome is written, and was not shown

    ledger = open_ledger(tmp_path / "s")
    heard = Heard()
    _catch_up(ledger, open_asha(ledger), (heard,))
    assert heard.calls == [("ended", 1, "PRUNED")]
    ledger.close()
