"""A curriculum's folder, as reports and leaderboards take it."""

from __future__ import annotations

import pytest

from dmx.errors import DmxError
from dmx.reporting.leaderboard import gather, leaderboard_rows
from dmx.reporting.report import to_html
from dmx.runs.folders import load, load_all
from dmx.storage.journal import encode
from tests.reporting.makers import curriculum_events, make_run, write_curriculum
from tests.tiny import one_sentence


def measured(stage: str, on: str, accuracy: object) -> dict:
    return {"event": "tested", "stage": stage, "on": on, "accuracy": accuracy, "time": 200.0}


def test_weights_that_do_not_fit_are_no_damage(tmp_path):
    """`accuracy: null` is what dmx writes where a stage's weights do not fit the last task."""
    events = curriculum_events(("a", None, [0.6]), ("b", "a", [0.8]), last="b")
    events += [measured("a", "a", 0.5), measured("a", "b", None), measured("b", "b", 0.75)]
    folder = write_curriculum(tmp_path / "c", events)
    assert "75.00" in to_html(load(folder))
    unread: list[str] = []
    (row,) = leaderboard_rows(gather([folder], unread))
    assert not unread and row["test"] == (0.75,)


@pytest.mark.parametrize(
    "event",
    [
        measured("a", "b", "high"),
        {"event": "tested", "stage": "a"},
        {"event": "decided", "stage": "a", "attempt": 0, "next": "promote", "checkpoint": None},
        {"event": "report", "stage": "a", "attempt": 0, "step": "x", "metrics": {"steps": 1}},
        {"event": "session", "time": 1.0, "host": "h", "pid": 1, "stages": [{"name": "a"}]},
        {"event": "reset", "stages": [1]},
    ],
)
def test_a_foreign_event_is_a_sentence_and_hides_no_other_run(tmp_path, event):
    events = curriculum_events(("a", None, [0.6]), last="a")
    folder = write_curriculum(tmp_path / "c", events)
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(encode(event))
    with pytest.raises(DmxError, match="has no sound") as caught:
        load(folder)
    one_sentence(caught.value)
    found, errors = load_all([folder, make_run(tmp_path / "r")])
    assert [run.name for run in found] == ["r"] and len(errors) == 1


def test_unknown_events_and_fields_are_kept(tmp_path):
    events = curriculum_events(("a", None, [0.6]), last="a")
    events += [{"event": "weather", "stage": 3}, {**measured("a", "a", 0.7), "mood": "good"}]
    assert load(write_curriculum(tmp_path / "c", events)).test_accuracy == 0.7
