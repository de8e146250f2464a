"""Faults of workers, storage and clock in a study on a real Ray: the study ends as it should."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from dmx.cluster import connection
from dmx.errors import StorageError
from dmx.runs.layout import STEPS, trial_folder
from dmx.study.study import train_trials
from dmx.training.checkpoint import open_checkpoint
from tests.study.faults import FOLDER
from tests.study.helpers import ROOT, journal
from tests.study.test_in_process import Watcher, facts, study_config
from tests.tiny import one_sentence

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that says what happens in workers; and a cluster whose workers look there."""
    import ray

    folder = tmp_path_factory.mktemp("faults")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={
            "env_vars": {FOLDER: str(folder), "PYTHONPATH": str(ROOT)},
            "worker_process_setup_hook": "tests.study.faults.install",
        },
    )
    with connection.connect(None):
        yield folder
    ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tiny_store, tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    return facts(train_trials(study_config(place), tiny_store, place / "study", slots=1))


def test_segfaults_hangs_and_nan_cost_one_trial_at_most(tiny_store, tmp_path, faults):
    """1 dies in every attempt, 2 sleeps once, 3 is stopped once, 4 reports NaN; 0 and 5 do well."""
    for number, words in {1: "segv", 2: "once sleep", 3: "once stop", 4: "nan"}.items():
        (faults / f"{number:04d}").write_text(words)
    config = study_config(
        tmp_path, num_trials=6, max_failures=2, scheduler="none", trial_timeout_seconds=15.0
    )
    folder = tmp_path / "study"
    try:
        result = train_trials(config, tiny_store, folder, slots=2)
    finally:
        left = sorted(p.name for p in faults.iterdir())
        for file in faults.iterdir():
            file.unlink()
    assert left == ["0001", "0004"], "the hangs were met"
    assert result.complete
    states = [t.status for t in result.trials]
    assert states == ["COMPLETE", "FAILED", "COMPLETE", "COMPLETE", "FAILED", "COMPLETE"]
    assert "died" in result.trials[1].error or "exit" in result.trials[1].error
    assert result.trials[4].error == "it reported no dev accuracy"
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
    study = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(backend))
    told = [t.state.name for t in study.trials]
    assert told == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]


def test_a_clock_that_jumps_changes_nothing(tiny_store, tmp_path, monkeypatch, undisturbed):
    """Back by a day at one report, forward by two at another; the budget is an hour of its own."""
    real, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])

    def act(number, metrics):
        if metrics[STEPS] == 4:
            shift[0] = {1: -86400.0, 2: 172800.0}.get(number, shift[0])

    config = study_config(tmp_path, time_budget_seconds=3600.0, trial_timeout_seconds=600.0)
    result = train_trials(
        config, tiny_store, tmp_path / "study", slots=1, observers=(Watcher(act),)
    )
    assert shift[0] != 0.0 and result.complete
    assert facts(result) == undisturbed
    times = [e["time"] for e in journal(tmp_path / "study")]
    assert times != sorted(times), "the journal's own times did jump"


def test_storage_that_vanishes_and_returns(tiny_store, tmp_path, undisturbed):
    study, away = tmp_path / "study", tmp_path / "away"
    timers = []

    def act(number, metrics):
        if number == 1 and metrics[STEPS] == 4 and not timers:
            study.rename(away)
            timers.append(threading.Timer(2.0, away.rename, [study]))
            timers[0].start()

    config = study_config(tmp_path, storage_timeout=120.0)
    result = train_trials(config, tiny_store, study, slots=1, observers=(Watcher(act),))
    assert timers and not away.exists()
    assert result.complete and facts(result) == undisturbed


def test_storage_that_stays_away_is_one_sentence_and_can_be_continued(
    tiny_store, tmp_path, undisturbed
):
    study, away = tmp_path / "study", tmp_path / "away"

    def act(number, metrics):
        if number == 1 and metrics[STEPS] == 4 and not away.exists():
            study.rename(away)

    config = study_config(tmp_path, storage_timeout=1.0)
    with pytest.raises(StorageError) as caught:
        train_trials(config, tiny_store, study, slots=1, observers=(Watcher(act),))
    assert "cannot be written for 1 s (No such file or directory)" in one_sentence(caught.value)
    assert not (study / "trials").exists(), "nothing that would be in the way"
    if study.exists():
        assert not any(study.iterdir())
        study.rmdir()
    away.rename(study)
    for number in (0, 1):
        open_checkpoint(trial_folder(study, number) / "last").training_state()
    result = train_trials(config, tiny_store, study, slots=1)
    assert result.complete and facts(result) == undisturbed
