"""The journal's settings: what a later session must repeat, and what it may change."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from dmx.errors import ConfigError, StageError
from dmx.registry import code_version
from dmx.runs import layout
from dmx.runs.run import Run
from dmx.storage.journal import Journal, read_journal
from dmx.study.folder import check_same, settings_event
from dmx.study.folder import open_folder as open_run_folder


def open_folder(folder: Path, settings, *, resume: bool, options=None) -> None:
    """As a study's command does."""
    if resume:
        check_same(folder, settings)
    open_run_folder(folder, settings_event("study", settings, options), resume=resume)


SETTINGS = {"task": "text", "seed": 0, "num_trials": 4, "grace_steps": 10}


def test_more_trials_may_be_asked_for_later(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    open_folder(folder, SETTINGS, resume=False)
    assert Run.read(folder).settings == SETTINGS
    open_folder(folder, {**SETTINGS, "num_trials": 9}, resume=True)
    assert Run.read(folder).settings == {**SETTINGS, "num_trials": 9}


def test_no_room_for_the_new_number_of_trials_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    open_folder(folder, SETTINGS, resume=False)

    def full(self: Journal, line: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Journal, "_write", full)
    open_folder(folder, SETTINGS, resume=True)  # nothing to write
    with pytest.raises(ConfigError, match=r"cannot be written .*No space left on device"):
        open_folder(folder, {**SETTINGS, "num_trials": 9}, resume=True)
    assert Run.read(folder).settings == SETTINGS


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("grace_steps", 20, "--grace-steps was 10, now 20"),
        ("seed", 1, "--seed was 0, now 1"),
        ("sampler", "tpe", "--sampler was not given, now 'tpe'"),
        ("max_steps", 200, "--max-steps was 100, now 200); the learning rate's schedule"),
        ("overrides.model.num_layers", 2, "--set model.num_layers was 1, now 2"),
        (
            "defaults.model.dropout",
            0.9,
            "model.dropout in the search space's `defaults` was 0.0, no",
        ),
        ("searched.optim.learning_rate", ["loguniform", 1e-4, 1], "optim.learning_rate in the sea"),
        ("when", [], "`when` of the search space was [{'if'"),
        (
            "initial_points",
            [],
            "`initial_points` of the search space was [{'model.dropout': 0.1}]",
        ),
        ("objectives", ["accuracy", "latency"], "--objective was not given, now ['accuracy', 'l"),
        ("warm_start.sha256", "2", "--warm-start (sha256) was '1', now '2'"),
        ("data_checksum", "cd", "the data's checksum was 'ab', now 'cd'"),
        ("overrides.init.sha256", "9", "--set init.sha256 was not given, now '9'"),
    ],
)
def test_anything_else_is_another_study(tmp_path: Path, key: str, value: object, said: str) -> None:
    """It is said in the words in which a user sets it; nothing is written."""
    folder = tmp_path / "study"
    old = {
        **{**SETTINGS, "max_steps": 100, "data_checksum": "ab"},
        "overrides": {"model.num_layers": 1, "train.num_steps": 100},
        "searched": {"optim.learning_rate": ["loguniform", 1e-4, 1e-2]},
        "defaults": {"model.dropout": 0.0},
        "when": [{"if": {"a": 1}, "then": {"b": ["int", 1, 2]}}],
        "initial_points": [{"model.dropout": 0.1}],
        "warm_start": {"runs": ["a"], "sha256": "1"},
    }
    open_folder(folder, old, resume=False)
    before = (folder / layout.JOURNAL_FILE).read_bytes()
    part, _, rest = key.partition(".")
    new = {**old, part: {**old[part], rest: value} if rest else value, "num_trials": 9}
    if key == "max_steps":  # it brings others along, which nobody typed
        new["overrides"] = {**old["overrides"], "train.num_steps": 200}
    with pytest.raises(ConfigError) as caught:
        open_folder(folder, new, resume=True)
    assert said in str(caught.value)
    assert (folder / layout.JOURNAL_FILE).read_bytes() == before
    assert Run.read(folder).settings == old


def test_a_study_of_an_earlier_dmx_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / layout.SETTINGS_FILE).write_text(json.dumps(SETTINGS))
    with pytest.raises(StageError, match="an earlier dmx wrote it; start the run under"):
        open_folder(folder, SETTINGS, resume=True)


def test_the_command_is_on_record_from_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    options = {"attention": "softmax", "set": ["a=1"]}
    open_folder(folder, SETTINGS, resume=False, options=options)
    first, *rest = read_journal(folder / layout.JOURNAL_FILE)[0]
    assert not rest and (first["event"], first["kind"]) == ("settings", "study")
    assert first["options"] == options and first["environment"]["code"] == code_version()
    open_folder(folder, SETTINGS, resume=True, options=options)
    assert len(read_journal(folder / layout.JOURNAL_FILE)[0]) == 1, "nothing is new"
    open_folder(folder, SETTINGS, resume=True, options={**options, "num_trials": 9})
    assert Run.read(folder).options["num_trials"] == 9


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ((), True),
        (("settings.json",), True),
        (("journal.jsonl", ".journal.jsonl.lock", "warm_start.json"), True),
        (("journal.jsonl", "error.txt", "claim.json", "events.out.tfevents.1.host"), True),
        (("journal.jsonl", "trials"), False),
        (("journal.jsonl", "last"), False),
        (("notes.txt",), False),
    ],
)
def test_what_a_failed_start_left_blocks_nothing(
    tmp_path: Path, files: tuple[str, ...], free: bool
) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("")
    if free:
        open_folder(folder, SETTINGS, resume=False)
        assert Run.read(folder).settings == SETTINGS
        return
    with pytest.raises(ConfigError, match="already exists; add --resume"):
        open_folder(folder, SETTINGS, resume=False)
    assert sorted(p.name for p in folder.iterdir()) == sorted(files)


def test_a_report_is_no_failed_start_and_one_at_work_is_not_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    open_folder(folder, SETTINGS, resume=False)
    with Journal(folder / layout.JOURNAL_FILE) as journal:
        with pytest.raises(StageError, match="in use"):
            open_folder(folder, SETTINGS, resume=False)
        journal.append(event="report", trial=0, step=1, metrics={})
    with pytest.raises(ConfigError, match="already exists"):
        open_folder(folder, SETTINGS, resume=False)
