"""The watchdog by itself, with a clock of its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dmx.cli.options import chosen
from dmx.cli.tune import parser
from dmx.errors import ConfigError
from dmx.study.plan import StudyOptions, make_plan
from dmx.study.ray_tune import LEAST_SECONDS, START_SECONDS, Watchdog, hang_timeout
from tests.tiny import one_sentence


class Tune:
    """What the watchdog sees of Tune: trials that start, report and end."""

    def __init__(self, timeout):
        self.now, self.killed = 0.0, []
        self.dog = Watchdog(timeout, kill=self.killed.append, clock=lambda: self.now)

    def trial(self, number):
        return _Trial(number)

    def call(self, event, trial, **more):
        getattr(self.dog, event)(iteration=0, trials=[], trial=trial, **more)

    def report(self, trial, **result):
        self.call("on_trial_result", trial, result={"steps": 1, **result})

    def wait(self, seconds):
        for _ in range(int(seconds)):
            self.now += 1
            self.dog.on_step_begin(iteration=0, trials=[])


class _Trial:
    """Hashable by identity, as Tune's are."""

    def __init__(self, number):
        self.config = {"trial_number": number}
        self.temporary_state = SimpleNamespace(ray_actor=f"actor {number}")


def test_who_reports_lives_and_who_does_not_is_killed_once():
    tune = Tune(10.0)
    quick, stuck = tune.trial(1), tune.trial(2)
    tune.call("on_trial_start", quick)
    tune.call("on_trial_start", stuck)
    tune.wait(START_SECONDS)
    assert tune.killed == [], "a process may take its time to start"
    tune.report(quick)
    tune.report(stuck)
    began = tune.now
    for _ in range(5):
        tune.wait(8)
        tune.report(quick)
        if tune.now - began <= 16:
            tune.report(stuck)
    assert tune.killed == ["actor 2"]
    assert tune.dog.hung == {2: "it made no progress for 10 s"}
    tune.call("on_trial_recover", stuck)
    tune.wait(100)
    assert tune.killed == ["actor 2", "actor 1"], "a trial that waits for a process is not hung"
    tune.call("on_trial_start", stuck)
    tune.wait(START_SECONDS + 1)
    assert tune.killed == ["actor 2", "actor 1", "actor 2"]
    assert tune.dog.hung[2] == "it made no progress for 120 s"
    tune.call("on_trial_start", stuck)
    tune.report(stuck)
    assert 2 not in tune.dog.hung, "it moves again"


@pytest.mark.parametrize("end", ["on_trial_complete", "on_trial_error"])
def test_ended_trials_are_not_watched(end):
    tune = Tune(10.0)
    trial = tune.trial(1)
    tune.call("on_trial_start", trial)
    tune.call(end, trial)
    tune.wait(1000)
    assert tune.killed == []


def test_what_is_too_long():
    assert hang_timeout([], None) == LEAST_SECONDS == 1800
    assert hang_timeout([60.0] * 5, None) == 1800
    assert hang_timeout([300.0, 600.0, 4000.0], None) == 6000.0, "ten times the median"
    assert hang_timeout([300.0], 5.0) == 5.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trial-timeout", "0"], "--trial-timeout is 0.0; it must be positive."),
        (["--trial-timeout", "nan"], "--trial-timeout is nan; it must be positive."),
        (["--storage-patience", "-1"], "--storage-patience is -1.0; it must not be negative."),
        (["--max-concurrent-trials", "0"], "--max-concurrent-trials is 0; it must be at least 1."),
    ],
)
def test_limits_that_make_no_sense(words, said):
    args = parser().parse_args(["--attention", "softmax", "--task", "text", *words])
    with pytest.raises(ConfigError) as caught:
        make_plan(StudyOptions(**chosen(StudyOptions, args)), {})
    assert one_sentence(caught.value) == said
