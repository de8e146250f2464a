"""Warm start: what is taken, what it changes, and that it is never counted."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest

from dmx.errors import ConfigError, StageError
from dmx.runs.layout import WARM_START_FILE
from dmx.search.space import SearchSpace, load_space
from dmx.search.warm_start import (
    PriorTrial,
    as_quantiles,
    collect,
    prepare,
    read_prior,
    rescaled,
)
from dmx.storage.journal import encode
from dmx.study.folder import open_folder, settings_event
from dmx.study.study import StudyConfig
from tests.search.test_sampling import finish
from tests.study.helpers import FIXED, next_trial, open_log, remaining, space
from tests.tiny import TASK, one_sentence

COUNT = 16


def settings(**changes: object) -> dict[str, object]:
    return {
        "task": TASK,
        "attention": "butterfly",
        "overrides": dict(FIXED),
        "max_steps": 12,
        "data": "tiny",
        "data_checksum": "abc",
    } | changes


def earlier(folder: Path, count: int = COUNT, **changes: object) -> Path:
    """A finished study."""
    ledger = open_log(folder, space=space(folder.parent), num_trials=count, seed=9)
    while (asked := next_trial(ledger)) is not None:
        finish(ledger, *asked)
    ledger.close()
    note(folder, **settings(**changes))
    return folder


def note(folder: Path, **found: object) -> None:
    """The settings of a session, in the study's journal."""
    open_folder(folder, settings_event("study", found), resume=True)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return earlier(tmp_path_factory.mktemp("old") / "butterfly-old")


def here(chosen: SearchSpace, **changes: Any) -> StudyConfig:
    values = {"overrides": FIXED, "num_trials": 4, "max_steps": 12, "grace_steps": 2, **changes}
    return StudyConfig(name="new", task=TASK, space=chosen, **values)


def taken(runs: list[Path], config: StudyConfig) -> dict[str, Any]:
    """What is kept of earlier studies on the same data."""
    found: dict[str, Any] = json.loads(collect(runs, config, "abc"))
    return found


def optuna_trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name=None, storage=storage).trials


def test_what_is_taken(old, tmp_path):
    """Every trial that ended with a value, with its best one; those that died are left out."""
    warm = taken([old], here(space(tmp_path)))
    expected = {
        t.number: (t.params, max(t.intermediate_values.values()))
        for t in optuna_trials(old)
        if t.state.name in ("COMPLETE", "PRUNED")
    }
    assert 0 < len(expected) < COUNT
    found = {t["number"]: (t["params"], t["values"][0]) for t in warm["trials"]}
    assert found == expected
    assert warm["notes"] == [f"warm start from {len(expected)} trials of butterfly-old"]


def test_points_outside_are_skipped_and_counted(old, tmp_path):
    """A fixed block size: points with another one lie outside, the others fit without it."""
    narrow = space(tmp_path).without({"attention.block_size": 16})
    overrides = {**FIXED, "attention.block_size": 16}
    warm = taken([old], here(narrow, overrides=overrides))
    ended = [t for t in optuna_trials(old) if t.state.name in ("COMPLETE", "PRUNED")]
    inside = [t.number for t in ended if t.params["attention.block_size"] == 16]
    assert 0 < len(inside) < len(ended)
    assert [t["number"] for t in warm["trials"]] == inside
    assert all("attention.block_size" not in t["params"] for t in warm["trials"])
    assert f"; {len(ended) - len(inside)} lie outside this search space" in warm["notes"][0]


def test_a_value_that_was_fixed_then_and_is_searched_now(tmp_path):
    path = tmp_path / "old"
    chosen = space(tmp_path)
    narrow = chosen.without({"attention.block_size": 16})
    ledger = open_log(path, space=narrow, num_trials=4, seed=9)
    for number in range(4):
        asked = next_trial(ledger)
        assert asked is not None
        ledger.report(number, 2, {"steps": 2, "best_dev_accuracy": 0.5})
        ledger.finish(number, "COMPLETE")
    ledger.close()
    fixed = {**FIXED, "attention.block_size": 16}
    note(path, **settings(overrides=fixed))
    trials = taken([path], here(chosen))["trials"]
    assert [t["params"]["attention.block_size"] for t in trials] == [16] * 4


def test_a_setting_with_several_distributions_is_taken_by_its_name(tmp_path):
    """0.05 lies in a range of the old study, and is a choice under 16 in the new one."""
    shared = "attention: butterfly\nspace:\n  attention.block_size: {choice: [16, 32]}\nwhen:\n"
    branch = "  - if: {attention.block_size: %d}\n    then: {model.dropout: %s}\n"
    old_file, new_file = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old_file.write_text(shared + branch % (16, "{uniform: [0.0, 0.1]}"))
    new_file.write_text(
        shared + branch % (16, "{choice: [0.0, 0.05]}") + branch % (32, "{uniform: [0.0, 0.5]}")
    )
    ledger = open_log(
        tmp_path / "old",
        space=dataclasses.replace(
            load_space(str(old_file), TASK),
            initial_points=({"attention.block_size": 16, "model.dropout": 0.05},),
        ),
        num_trials=1,
        seed=9,
    )
    assert next_trial(ledger) == (0, {"attention.block_size": 16, "model.dropout": 0.05})
    ledger.report(0, 2, {"steps": 2, "best_dev_accuracy": 0.5})
    ledger.finish(0, "COMPLETE")
    ledger.close()
    note(tmp_path / "old", **settings())
    new = load_space(str(new_file), TASK)
    text = collect([tmp_path / "old"], here(new), "abc")
    assert json.loads(text)["trials"][0]["params"] == {
        "attention.block_size": 16,
        "model.dropout": 0.05,
    }
    (tmp_path / WARM_START_FILE).write_text(text)
    (prior,) = read_prior(tmp_path, new)
    assert prior.params == {
        "attention.block_size": 16,
        "model.dropout if attention.block_size=16": 0.05,
    }
    assert set(prior.distributions) == set(prior.params)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "listops"}, "another task, listops: compared by rank"),
        ({"data_checksum": "xyz"}, "other data, tiny: compared by rank"),
        ({"max_steps": 99}, "another budget, 99 steps: compared by rank"),
    ],
)
def test_another_task_or_budget_is_told(tmp_path, changes, words):
    path = earlier(tmp_path / "old", 4, **changes)
    warm = taken([path], here(space(tmp_path)))
    assert words in warm["notes"][0]
    assert {t["group"] for t in warm["trials"]} == {"old"}
    with pytest.raises(ConfigError, match="nsga2 compares") as caught:
        taken([path], here(space(tmp_path), sampler="nsga2"))
    one_sentence(caught.value)


def past(value: float, group: str = "") -> PriorTrial:
    return PriorTrial(params={}, distributions={}, values=(value,), group=group)


def test_values_of_another_study_take_this_ones_quantiles():
    own = [(0.2,), (0.3,), (0.4,)]
    prior = [past(v, "easy") for v in (0.9, 0.5, 0.7, 0.8, 0.6)] + [past(0.35)]
    found = [p.values[0] for p in rescaled(prior, own)]
    assert found == pytest.approx([0.4, 0.2, 0.3, 0.35, 0.25, 0.35])
    assert [p.values for p in rescaled(prior, own[:2])] == [p.values for p in prior]
    assert [p.values[0] for p in as_quantiles(prior)][:5] == [1.0, 0.0, 0.5, 0.75, 0.25]
    tied = [p.values[0] for p in as_quantiles([past(v, "g") for v in (1.0, 1.0, 2.0)])]
    assert tied == [0.25, 0.25, 1.0]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "nsga2", "gp"])
def test_it_informs_and_is_not_counted(old, tmp_path, monkeypatch, sampler):
    """From its first proposal the study draws near the old one's best; numbers begin at 0."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    chosen = dataclasses.replace(space(tmp_path), initial_points=())
    text = collect([old], here(chosen, sampler=sampler), "abc")
    count = 5

    def points(name: str, *, warmed: bool, restart: bool = False) -> list[dict]:
        folder = tmp_path / name
        folder.mkdir()
        if warmed:
            (folder / WARM_START_FILE).write_text(text)
        found = []
        make = {"space": chosen, "num_trials": count, "seed": 1, "sampler": sampler}
        ledger = open_log(folder, **make)
        while (asked := next_trial(ledger)) is not None:
            assert asked[0] == len(found)
            assert remaining(ledger) == count - len(found)
            found.append(asked[1])
            finish(ledger, *asked)
            if restart:
                ledger.close()
                ledger = open_log(folder, **make)
        assert len(ledger.trials) == count
        ledger.close()
        assert len(optuna_trials(folder)) == count, "Optuna's file holds this study alone"
        return found

    warmed = points("warm", warmed=True)
    assert warmed != points("cold", warmed=False)
    assert points("again", warmed=True, restart=True) == warmed
    if sampler == "cmaes":  # it begins where the old ones were best
        rates = [p["optim.learning_rate"] for p in warmed]
        assert all(1e-3 < r <= 3e-2 for r in rates), rates


def test_what_is_kept_is_what_counts(old, tmp_path):
    """A resumed study reads its own copy; neither a changed nor a lost one goes unnoticed."""
    chosen = space(tmp_path)
    given = ["butterfly-old"]
    where = here(chosen)
    folder = tmp_path / "new"
    first, files, notes = prepare(given, old.parent, where, "abc", folder, known=None, resume=False)
    assert first is not None and set(files) == {WARM_START_FILE} and len(notes) == 1
    folder.mkdir()
    (folder / WARM_START_FILE).write_text(files[WARM_START_FILE])
    nowhere = tmp_path / "nowhere"
    again = prepare(given, nowhere, where, "abc", folder, known=first, resume=True)
    assert again == (first, {}, notes), "the old study is not needed any more"
    assert len(read_prior(folder, chosen)) == len(json.loads(files[WARM_START_FILE])["trials"])
    assert prepare([], nowhere, where, "abc", folder, known=first, resume=True)[0] is None
    other = prepare(["x"], nowhere, where, "abc", folder, known=first, resume=True)[0]
    assert other != first, "and so the settings differ"
    (folder / WARM_START_FILE).write_text(files[WARM_START_FILE].replace("0.", "1.", 1))
    with pytest.raises(StageError, match="was changed") as caught:
        prepare(given, nowhere, where, "abc", folder, known=first, resume=True)
    one_sentence(caught.value)
    (folder / WARM_START_FILE).unlink()
    with pytest.raises(StageError, match="cannot be read") as caught:
        prepare(given, nowhere, where, "abc", folder, known=first, resume=True)
    one_sentence(caught.value)
    assert read_prior(folder, chosen) == ()


@pytest.mark.parametrize(
    "event",
    [
        {"event": "report"},
        {"event": "report", "trial": 0, "step": 2},
        {"event": "report", "trial": "0", "step": 2, "metrics": {}},
        {"event": "report", "trial": [0], "step": 2, "metrics": {}},
        {"event": "report", "trial": 0, "step": 2, "metrics": [1]},
    ],
)
def test_foreign_reports_are_one_sentence_and_foreign_fields_no_matter(old, tmp_path, event):
    copy = tmp_path / "copy"
    shutil.copytree(old, copy)
    first = {"event": "note", "trial": "any"}
    lines = [encode(first), *(copy / "journal.jsonl").read_bytes().splitlines(keepends=True)]
    (copy / "journal.jsonl").write_bytes(b"".join(lines))
    chosen = space(tmp_path)
    assert taken([copy], here(chosen))["trials"], "an event of another kind"
    (copy / "journal.jsonl").write_bytes(b"".join([encode(first), encode(event), *lines[1:]]))
    with pytest.raises(StageError, match="event 'report' has no sound") as caught:
        taken([copy], here(chosen))
    one_sentence(caught.value)


def test_bad_runs(old, tmp_path):
    chosen = space(tmp_path)
    with pytest.raises(ConfigError, match="no study in that folder") as caught:
        taken([tmp_path / "none"], here(chosen))
    one_sentence(caught.value)
    with pytest.raises(ConfigError, match="no use to --sampler random") as caught:
        taken([old], here(chosen, sampler="random"))
    one_sentence(caught.value)
    copy = tmp_path / "copy"
    shutil.copytree(old, copy)
    note(copy, **settings(attention="softmax"))
    with pytest.raises(ConfigError, match="searched 'softmax'") as caught:
        taken([copy], here(chosen))
    one_sentence(caught.value)
    bad = {**settings_event("study", settings()), "settings": settings(overrides=[1])}
    with (copy / "journal.jsonl").open("ab") as file:
        file.write(encode(bad))
    with pytest.raises(StageError, match="no sound overrides; leave this") as caught:
        taken([copy], here(chosen))
    one_sentence(caught.value)
    lines = (copy / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "journal.jsonl").write_bytes(b"".join([lines[0], b"rubbish\n", *lines[1:]]))
    with pytest.raises(StageError, match="line 2 is damaged; leave this --warm-start") as caught:
        taken([copy], here(chosen))
    one_sentence(caught.value)
    empty = earlier(tmp_path / "empty", 0)
    with pytest.raises(ConfigError, match="no finished trial of empty") as caught:
        taken([empty], here(chosen))
    one_sentence(caught.value)
