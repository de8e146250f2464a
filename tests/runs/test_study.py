"""The fold of a study's journal."""

from __future__ import annotations

import math

import pytest

from dmx.errors import StageError
from dmx.runs import events
from dmx.runs.study import Study

SETTINGS = {
    "event": "settings",
    "kind": "study",
    "settings": {"task": "text", "attention": "butterfly", "num_trials": 2, "max_steps": 4},
    "options": {},
    "environment": {},
    "attention": "butterfly-64",
}


def report(trial: int, step: int, accuracy: float, **more: float) -> dict:
    found = {"steps": step, "dev_accuracy": accuracy, "best_step": step, **more}
    return {"event": "report", "trial": trial, "step": step, "metrics": found}


def outcome(trial: int, status: str = "COMPLETE", value: float | None = 0.5) -> dict:
    return {"event": "outcome", "trial": trial, "status": status, "value": value, "error": ""}


def started(trial: int, **params: object) -> dict:
    return {"event": "started", "trial": trial, "params": params}


def fold(tmp_path, *found: dict) -> Study:
    study = Study(tmp_path / "s")
    for event in (SETTINGS, *found):
        study.add(event)
    return study


def test_trials_are_what_the_journal_says(tmp_path):
    label = "attention.block_size if attention.name=butterfly"
    study = fold(
        tmp_path,
        {**started(0), "params": {"optim.learning_rate": 0.1, label: 32}},
        report(0, 2, 0.3),
        started(1, **{"optim.learning_rate": 0.2}),
        report(0, 4, 0.5),
        report(1, 2, 0.4),
        outcome(0),
        outcome(1, "PRUNED", 0.4),
    )
    first, second = study.trials
    assert first.params == {"optim.learning_rate": 0.1, "attention.block_size": 32}
    assert (first.steps, first.best, first.status) == (4, 0.5, "COMPLETE")
    assert [r["steps"] for r in first.reports] == [2, 4]
    assert [(r.trial, r.step) for r in study.history] == [(0, 2), (0, 4), (1, 2)]
    assert (second.status, study.best, study.best_value) == ("PRUNED", 0, 0.5)
    assert study.complete and study.attention == "butterfly-64"
    assert study.best_params == first.params
    frame = study.trials_dataframe()
    assert list(frame["status"]) == ["COMPLETE", "PRUNED"]


def test_a_population_changes_its_values(tmp_path):
    taken = {"trial": 1, "source": 0, "params": {"optim.learning_rate": 0.05}}
    study = fold(
        tmp_path,
        started(0, **{"optim.learning_rate": 0.1}),
        started(1, **{"optim.learning_rate": 0.2}),
        report(1, 2, 0.1),
        {"event": "compared", "step": 2, "exploits": [taken]},
    )
    trial = study.by_number[1]
    assert study.compared == {2}
    assert trial.params_at(2) == {"optim.learning_rate": 0.2}
    assert trial.params_at(3) == {"optim.learning_rate": 0.05}


def test_a_test_counts_until_another_trial_ends(tmp_path):
    final = {
        **{"event": "final", "trial": 0, "step": 2, "test_accuracy": 0.45, "test_loss": None},
        **{"seeds": [1], "dev_accuracies": [0.4], "test_accuracies": [0.44]},
    }
    study = fold(tmp_path, started(0), report(0, 2, 0.3), outcome(0), final)
    assert (study.test_accuracy, study.finals.seeds) == (0.45, (1,))
    assert math.isnan(study.test_loss)
    study.add(outcome(1))
    assert math.isnan(study.test_accuracy) and study.finals is None


def test_several_objectives_have_a_front(tmp_path):
    settings = {**SETTINGS["settings"], "objectives": ["accuracy", "parameters"]}
    study = fold(tmp_path, {**SETTINGS, "settings": settings})
    for number, (accuracy, size) in enumerate(((0.5, 10.0), (0.6, 20.0), (0.55, 30.0))):
        for event in (started(number), report(number, 2, accuracy, parameters=size)):
            study.add(event)
        study.add(outcome(number))
    assert [t.number for t in study.best_trials] == [0, 1]
    assert study.best == 1
    assert study.by_number[2].values == {"accuracy": 0.55, "parameters": 30.0}


@pytest.mark.parametrize(
    "event",
    [
        {"event": "report", "trial": 0, "step": 2},
        {"event": "report", "trial": "0", "step": 2, "metrics": {"steps": 2}},
        {"event": "report", "trial": 0, "step": 2, "metrics": {"steps": 2, "dev_accuracy": "x"}},
        {"event": "outcome", "trial": 0, "status": "LOST", "value": None, "error": ""},
        {"event": "outcome", "trial": True, "status": "COMPLETE", "value": 1.0, "error": ""},
        {"event": "compared", "step": 2, "exploits": [{"trial": 0}]},
        {"event": "compared", "step": 2, "exploits": [3]},
        {**SETTINGS, "settings": {"searched": {"x": [3]}}},
        {**SETTINGS, "settings": {"searched": {"x": ["uniform", "a", 1]}}},
        {**SETTINGS, "settings": {"objectives": ["fame"]}},
        {**SETTINGS, "settings": {"reduction_factor": 1.0}},
    ],
)
def test_a_foreign_event_is_refused_in_a_sentence(tmp_path, event):
    with pytest.raises(StageError, match=r"no sound .*\.$") as caught:
        fold(tmp_path, event)
    assert str(caught.value).startswith(f"{tmp_path / 's' / 'journal.jsonl'} is damaged: ")


def test_the_pause_before_changed_settings_is_no_work(tmp_path):
    first = [{"event": "session", "time": 100.0}, {**report(0, 2, 0.5), "time": 130.0}]
    later = [{**SETTINGS, "time": 1000.0}, {"event": "session", "time": 1001.0}]
    study = fold(tmp_path, *first, *later, {**report(0, 4, 0.5), "time": 1011.0})
    assert study.seconds == 30.0 + 10.0


def test_values_follow_the_objectives_whenever_they_become_known(tmp_path):
    several = {**SETTINGS, "settings": {"objectives": ["accuracy", "parameters"]}}
    study = fold(tmp_path, started(0, x=1), report(0, 2, 0.5), several)
    assert list(study.by_number[0].values) == ["accuracy", "parameters"]
    assert study.best_trials == (), "no trial is whole"


def test_what_is_unknown_is_kept_or_skipped(tmp_path):
    study = fold(
        tmp_path,
        {"event": "weather", "trial": "rain"},
        {"event": 3},
        {**started(0, x=1), "mood": "good"},
        {**report(0, 2, 0.5), "more": None},
    )
    assert study.by_number[0].best == 0.5
    assert len(study.trials) == 1


def test_null_is_legal_where_a_field_says_so():
    tested = {"event": "tested", "stage": "a", "on": "b", "accuracy": None}
    assert events.check(tested, events.CURRICULUM) == "tested"
    with pytest.raises(StageError, match="no sound accuracy"):
        events.check({**tested, "accuracy": "high"}, events.CURRICULUM)
