"""Folders of every kind are read into what their files say; damaged ones are refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dmx.errors import ConfigError, DmxError
from dmx.reporting.caveats import caveats
from dmx.reporting.report import to_html as render
from dmx.reporting.report import train_command
from dmx.reporting.tables import filled_rungs
from dmx.runs.folders import kind_of, load, runs_below
from dmx.storage.journal import encode, read_journal
from dmx.study.folder import settings_event
from tests.reporting.makers import (
    change_settings,
    config,
    curriculum_events,
    make_curriculum,
    make_run,
    make_study,
    metrics,
    write_curriculum,
    write_journal,
)
from tests.tiny import one_sentence


def test_study(tmp_path: Path) -> None:
    run = load(make_study(tmp_path / "s"))
    assert (run.kind, run.task, run.attention, run.complete) == ("study", "text", "butterfly", True)
    assert run.is_sample and run.data == "sample-bbc, not LRA"
    assert [t.status for t in run.trials] == ["COMPLETE", "PRUNED", "COMPLETE", "FAILED"]
    assert [t.best for t in run.trials[:3]] == [0.40, 0.20, 0.50]
    assert math.isnan(run.trials[3].best) and run.trials[3].error == "the loss is not finite"
    assert run.best == 2 and run.best_trial is not None and run.best_trial.steps == 8
    assert run.trials[1].params == {"attention.block_size": 64, "optim.learning_rate": 5e-3}
    assert run.test_accuracy == 0.47 and run.memory_of == "process"
    assert run.search is not None and run.search.grace_steps == 2


def test_study_that_still_runs_has_a_best_so_far(tmp_path: Path) -> None:
    run = load(make_study(tmp_path / "s", num_trials=9, tested=False))
    assert run.best == 2 and not run.complete and run.is_sample
    assert math.isnan(run.test_accuracy)


def test_a_killed_study_says_how_many_of_its_trials_have_ended(tmp_path: Path) -> None:
    run = load(make_study(tmp_path / "s", num_trials=14))
    ended = sum(t.status != "RUNNING" for t in run.trials)
    assert any(f"{ended} of 14 trials have" in caveat.text for caveat in caveats(run))


def test_fixed_size_is_part_of_the_name() -> None:
    settings = {"attention": "butterfly", "overrides": {"attention.block_size": 64}}
    assert settings_event("study", settings)["attention"] == "butterfly-64"
    assert settings_event("study", {"attention": "butterfly"})["attention"] == "butterfly"
    assert settings_event("run", {"config": config("softmax")})["attention"] == "softmax"


def test_final_seeds(tmp_path: Path) -> None:
    seeds = {"seeds": [1, 2], "dev_accuracies": [0.5, 0.6], "test_accuracies": [0.4, 0.5]}
    run = load(make_study(tmp_path / "s", final=seeds))
    assert run.finals is not None and run.finals.test_accuracies == (0.4, 0.5)


def test_rungs_of_a_study_lie_where_asha_puts_them(tmp_path: Path) -> None:
    rungs = filled_rungs(load(make_study(tmp_path / "s")))
    assert [r.steps for r in rungs] == [2, 6]
    assert [e.trial for e in rungs[0].entries] == [0, 1, 2]
    assert [e.promoted for e in rungs[0].entries] == [True, False, True]


def test_single_run_reads_tensorboard(tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "r"))
    assert (run.kind, run.attention, run.complete) == ("run", "butterfly-64", True)
    assert [r["dev_accuracy"] for r in run.trials[0].reports] == pytest.approx([0.4, 0.5])
    assert run.test_accuracy == 0.6 and run.best_step == 4


def test_single_run_that_still_runs(tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "r", test=None))
    assert not run.complete and run.trials[0].status == "RUNNING"


def test_curriculum(tmp_path: Path) -> None:
    run = load(make_curriculum(tmp_path / "c"))
    assert run.kind == "curriculum" and not run.complete
    assert [s.name for s in run.stages] == ["easy", "harder", "last"]
    easy, harder, last = run.stages
    assert (easy.status, easy.dev_accuracy, easy.test_accuracy) == ("passed", 0.9, 0.88)
    assert harder.parent == "easy" and [a.passed for a in harder.attempts] == [False, True]
    assert harder.attempts[0].reason.endswith("below 0.8") and harder.attempts[1].best == 0.85
    assert last.status == "waiting" and last.parent == "harder" and not last.attempts
    assert run.attention == "butterfly-32" and run.environment["code"] == "abc123"
    assert run.environment["argv"] == ["python -m dmx.curriculum c.yaml"]


def test_a_curriculum_is_read_from_its_journal_alone(tmp_path: Path) -> None:
    folder = make_curriculum(tmp_path / "c")
    (folder / "lineage.json").unlink()
    (folder / "stages").mkdir()
    run = load(folder)
    stages = [("easy", "passed"), ("harder", "passed"), ("last", "waiting")]
    assert [(s.name, s.status) for s in run.stages] == stages
    (folder / "journal.jsonl").unlink()
    (folder / "lineage.json").write_text('{"stages": [{"name": "a", "dev_accuracy": 0.7}]}')
    with pytest.raises(DmxError, match=r"journal\.jsonl is missing or empty"):
        load(folder)


def _chain(**values: Any) -> list[dict[str, Any]]:
    return curriculum_events(("a", None, [0.6, 0.7]), ("b", "a", [0.8]), last="b", **values)


def _tested(stage: str, on: str, accuracy: float | None) -> dict[str, Any]:
    return {"event": "tested", "stage": stage, "on": on, "accuracy": accuracy, "time": 200.0}


def test_weights_that_do_not_fit_the_last_stage_are_no_damage(tmp_path: Path) -> None:
    events = [*_chain(), _tested("a", "a", 0.65), _tested("a", "b", None), _tested("b", "b", 0.75)]
    run = load(write_curriculum(tmp_path / "c", events))
    a, b = run.stages
    assert a.test_accuracy == 0.65 and math.isnan(a.test_on_last)
    assert b.test_accuracy == b.test_on_last == 0.75 == run.test_accuracy and run.complete


def test_two_attentions_are_both_named(tmp_path: Path) -> None:
    events = _chain()
    for event in events:
        if event.get("stage") == "b" and event["event"] == "started":
            event["config"] = config("linear", "pathfinder32-cl6-d4")
            event["attention"] = "linear"
    run = load(write_curriculum(tmp_path / "c", events))
    assert [s.attention for s in run.stages] == ["butterfly-32", "linear"]
    assert run.attention == "butterfly, then linear"


def test_wall_time_has_no_pauses_and_training_time_is_told_apart(tmp_path: Path) -> None:
    first = _chain()  # 8 events: 105 s
    again = {"event": "session", "host": "h", "pid": 2, "argv": [], "time": 9000.0}
    last = {**_tested("b", "b", 0.7), "time": 9020.0}
    run = load(write_curriculum(tmp_path / "c", [*first, again, last]))
    # The reports' own training seconds: 0.1 s a step, 200 steps and 100.
    assert run.seconds == 105 + 20 and run.train_seconds == pytest.approx(20 + 10)
    page = render(run)
    assert "wall time; training of all attempts 30 s" in page and "2 min 5 s" in page


def test_what_was_trained_again_leaves_no_old_number(tmp_path: Path) -> None:
    tests = [_tested("a", "a", 0.61), _tested("a", "b", 0.62), _tested("b", "b", 0.63)]
    reset = {"event": "reset", "stages": ["b"], "time": 300.0}
    run = load(write_curriculum(tmp_path / "c", [*_chain(), *tests, reset]))
    a, b = run.stages
    assert a.test_accuracy == 0.61 and math.isnan(a.test_on_last), "b may be another task since"
    assert b.status == "waiting" and math.isnan(b.test_accuracy) and not b.attempts
    assert (run.shown, run.test_accuracy) == ("a", 0.61) and not run.complete
    assert run.train_seconds == pytest.approx(30), "what was discarded was trained all the same"


def test_an_appended_branch_does_not_take_the_headline(tmp_path: Path) -> None:
    events = curriculum_events(
        ("a", None, [0.6]), ("b", "a", [0.8]), ("side", "a", [0.9]), last="b"
    )
    tests = [_tested("b", "b", 0.75), _tested("side", "side", 0.95)]
    run = load(write_curriculum(tmp_path / "c", [*events, *tests]))
    assert (run.goal, run.shown, run.test_accuracy) == ("b", "b", 0.75)
    assert run.best_trial is not None and run.best_trial.best == 0.8
    assert "test accuracy, stage b" in render(run)


def test_the_promoted_attempt_is_shown_and_not_the_latest(tmp_path: Path) -> None:
    folder = make_curriculum(tmp_path / "c")
    path = folder / "journal.jsonl"
    events = read_journal(path)[0]
    events[-2]["checkpoint"] = {"attempt": 0, "path": "p", "dev_accuracy": 0.7, "step": 200}
    write_journal(path, events)  # on_fail: continue, and the first try was the better one
    harder = load(folder).stages[1]
    assert harder.promoted_attempt == 0 and harder.dev_accuracy == 0.7
    assert load(folder).best_trial.best == 0.7  # type: ignore[union-attr]
    assert harder.all_steps == 400 and harder.steps == 200
    assert "refused, promoted all the same" in render(load(folder))


def _searched() -> list[dict[str, Any]]:
    events = _chain()
    found = config("butterfly-32", "pathfinder32-cl6-d4", optim__learning_rate=0.0123)
    decided = next(e for e in events if e["event"] == "decided" and e["stage"] == "b")
    decided["search"] = {
        **{"trial": 3, "num_trials": 8, "params": {"optim.learning_rate": 0.0123}},
        **{"config": found, "steps": 550, "train_seconds": 77.0},
    }
    return events


def test_a_searched_stage_tells_its_best_trial_and_the_cost_of_all(tmp_path: Path) -> None:
    run = load(write_curriculum(tmp_path / "c", _searched()))
    b = run.stages[1]
    assert b.steps == 100 and b.all_steps == 550 and b.seconds == 77
    assert run.train_seconds == 20 + 77 and run.total_steps == 200 + 550
    assert "optim.learning_rate=0.0123" in train_command(run)
    assert f"--init-from {run.folder / 'a/best'}" in train_command(run)
    text = render(run)
    assert "3 of 8" in text and "learning_rate=0.0123" in text and "100 of 550" in text


DAMAGES = {
    "metrics.json is cut": lambda f: (f / "best" / "metrics.json").write_text('{"num_dev": 3, '),
    "metrics.json is a list": lambda f: (f / "best" / "metrics.json").write_text("[]"),
    "metrics.json is deep": lambda f: (f / "best" / "metrics.json").write_text("[" * 100_000),
    "metrics.json is not text": lambda f: (f / "best" / "metrics.json").write_bytes(b"\xff\xfe"),
    "a number is a text": lambda f: (f / "best" / "metrics.json").write_text('{"num_dev": "x"}'),
    "a distribution is a number": lambda f: change_settings(f, searched={"x": 3}),
    "a distribution has no values": lambda f: change_settings(f, searched={"x": ["uniform"]}),
    "max_steps is a text": lambda f: change_settings(f, max_steps="many"),
    "journal has a bad line": lambda f: (f / "journal.jsonl").write_bytes(
        (f / "journal.jsonl").read_bytes().replace(b'"event"', b'"oven', 3)
    ),
    "config.yaml is no YAML": lambda f: (f / "best" / "config.yaml").write_text("a: [1"),
}
FOREIGN = {
    "no step": {"event": "report", "trial": 0},
    "trial is a list": {"event": "report", "trial": [], "step": 2, "metrics": {"steps": 2}},
    "accuracy is a text": {
        **{"event": "report", "trial": 0, "step": 2},
        "metrics": {"steps": 2, "dev_accuracy": "high"},
    },
    "a test is a text": {
        **{"event": "final", "trial": 0, "step": 4, "test_accuracy": "high", "test_loss": None},
        **{"seeds": [], "dev_accuracies": [], "test_accuracies": []},
    },
    "seeds are texts": {
        **{"event": "final", "trial": 0, "step": 4, "test_accuracy": 0.5, "test_loss": None},
        **{"seeds": ["a"], "dev_accuracies": [], "test_accuracies": []},
    },
    "no takeover": {"event": "compared", "step": 4, "exploits": [{"trial": 1}]},
    "no exploits": {"event": "compared", "step": 4},
    "an unknown end": {
        **{"event": "outcome", "trial": 0, "status": "LOST", "value": 0.5, "error": ""}
    },
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_study_is_one_sentence(tmp_path: Path, name: str) -> None:
    folder = make_study(tmp_path / "s")
    DAMAGES[name](folder)
    with pytest.raises(DmxError) as caught:
        load(folder)
    text = str(caught.value)
    assert str(tmp_path) in text and "\n" not in text and len(text) < 500


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_event_is_one_sentence(tmp_path: Path, name: str) -> None:
    folder = make_study(tmp_path / "s")
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(encode(FOREIGN[name]))
    with pytest.raises(DmxError, match="has no sound") as caught:
        load(folder)
    one_sentence(caught.value)
    assert str(folder) in str(caught.value)


def test_a_study_of_an_earlier_dmx_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "optuna.journal").write_text("")
    with pytest.raises(DmxError, match="an earlier dmx wrote it") as caught:
        load(tmp_path)
    one_sentence(caught.value)


def test_torn_last_line_of_a_journal_is_no_damage(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "s")
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(b'{"event": "rep')
    assert len(load(folder).trials) == 4


def test_what_is_no_run_is_told_apart(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_study(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"does not exist; runs there: a, b\."):
        load(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"several runs; give one: a, b\. "):
        load(tmp_path)
    with pytest.raises(ConfigError, match="is a checkpoint"):
        load(tmp_path / "a" / "best")
    with pytest.raises(ConfigError, match="holds no run"):
        load(tmp_path / "empty")
    with pytest.raises(ConfigError, match="is a file"):
        load(tmp_path / "a" / "result.json")
    assert kind_of(tmp_path / "empty") is None
    assert [p.name for p in runs_below(tmp_path)] == ["a", "b"]


def test_an_old_test_does_not_stand_for_what_came_after_it(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "s")
    assert load(folder).complete and load(folder).test_accuracy == 0.47
    run = load(change_settings(folder, num_trials=6))
    assert not run.complete, "more trials were asked for"
    with (folder / "journal.jsonl").open("ab") as file:
        for event in (
            {"event": "report", "trial": 4, "step": 8, "metrics": metrics(8, 0.9)},
            {"event": "outcome", "trial": 4, "status": "COMPLETE", "value": 0.9, "error": ""},
        ):
            file.write(encode(event))
    run = load(folder)
    assert run.best == 4 and math.isnan(run.test_accuracy) and run.config is None


def test_a_studys_wall_time_counts_all_its_sessions(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "s")
    events = [e for e in read_journal(folder / "journal.jsonl")[0] if e["event"] != "session"]
    times = [*range(100, 100 + len(events) - 1), 5030]
    timed = [{**e, "time": float(t)} for e, t in zip(events, times, strict=True)]
    sessions = [{"event": "session", "time": 90.0}, {"event": "session", "time": 5000.0}]
    write_journal(folder / "journal.jsonl", [sessions[0], *timed[:-1], sessions[1], timed[-1]])
    first = 100 + len(events) - 2 - 90
    assert load(folder).seconds == first + 30
