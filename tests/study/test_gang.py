"""Runs by two workers in a real Ray: the result of one, whatever dies; and nobody left over."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmx.cluster import connection
from dmx.cluster.gang import Gang, start, stop, wait_any
from dmx.runs.layout import (
    BEST_STEP,
    DEV_ACCURACY,
    DEV_LOSS,
    FAILURE,
    GRADIENT_NORM,
    NUM_WORKERS,
    STEPS,
    TRAIN_ACCURACY,
    TRAIN_LOSS,
    UNDER_WAY,
    trial_folder,
)
from dmx.schema import to_dict
from dmx.storage.journal import read_claim
from dmx.study.study import train_trials
from dmx.training.checkpoint import open_checkpoint
from dmx.training.job import Job, Workers
from dmx.training.runner import Runner
from tests.study.processes import wait_until
from tests.study.test_in_process import Watcher, study_config
from tests.tiny import config

pytestmark = pytest.mark.slow
NUMBERS = (TRAIN_LOSS, DEV_LOSS, GRADIENT_NORM)
EXACT = (STEPS, TRAIN_ACCURACY, DEV_ACCURACY, BEST_STEP)


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    import ray

    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, **options)
    with connection.connect(None):
        yield
    ray.shutdown()


def job(folder: Path, store: Any, **changes: Any) -> Job:
    plain = to_dict(config(attention__dropout=0.0))
    return Job(run_config=plain, data_folder=str(store.folder), folder=str(folder), **changes)


def to_end(runner: Any, at: Any = None) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = []
    while not reports or not reports[-1]["done"]:
        reports.append(runner.step())
        assert FAILURE not in reports[-1], reports[-1]
        if at is not None:
            at(reports[-1])
    return reports


def reports_alone(store: Any, folder: Path) -> list[dict[str, Any]]:
    """The reports of the run in one process."""
    with contextlib.closing(Runner(job(folder, store))) as runner:
        return to_end(runner)


@pytest.fixture(scope="module")
def alone(tiny_store, tmp_path_factory) -> list[dict[str, Any]]:
    return reports_alone(tiny_store, tmp_path_factory.mktemp("alone"))


def check_close(reports, expected):
    assert [[r[k] for k in EXACT] for r in reports] == [[r[k] for k in EXACT] for r in expected]
    for mine, theirs in zip(reports, expected, strict=True):
        assert [mine[k] for k in NUMBERS] == pytest.approx([theirs[k] for k in NUMBERS], rel=1e-5)


def test_a_killed_worker_changes_nothing(two_cpus, tiny_store, alone, tmp_path):
    """Kill -9 of the leader; both are started again, from the last checkpoint."""
    runner = Gang(job(tmp_path / "run", tiny_store, workers=Workers(count=2)))
    killed: list[int] = []

    def kill(report):
        leader = read_claim(tmp_path / "run")["pid"]
        if report[STEPS] == 4 and not killed:
            killed.append(leader)
            os.kill(leader, signal.SIGKILL)

    with contextlib.closing(runner):
        reports = to_end(runner, kill)
        assert read_claim(tmp_path / "run")["pid"] not in killed
    check_close(reports, alone)
    assert [r[NUM_WORKERS] for r in reports] == [2] * 4
    last = open_checkpoint(tmp_path / "run" / "last")
    assert last.metrics[STEPS] == 8
    assert not any(name.startswith("module.") for name in last.model_state())


def test_closed_between_two_evaluations_it_goes_on_there(two_cpus, tiny_store, alone, tmp_path):
    """Two steps, an evaluation, two steps; then one process does what is left."""
    wanted = job(tmp_path / "run", tiny_store, workers=Workers(count=2), slice_seconds=0.0)
    with contextlib.closing(Gang(wanted)) as gang:
        reports = [gang.step() for _ in range(5)]
    assert [r[STEPS] for r in reports] == [1, 2, 2, 3, 4]
    assert [UNDER_WAY in r for r in reports] == [True, True, False, True, True]
    last = open_checkpoint(tmp_path / "run" / "last")
    assert (last.metrics[STEPS], last.training_state()["step"]) == (2, 4)
    with contextlib.closing(Runner(job(tmp_path / "run", tiny_store))) as one:
        check_close(to_end(one), alone)


def test_stopped_between_and_in_the_middle_of_steps(two_cpus, tiny_store, alone, tmp_path):
    """`stop` ends all workers and gives the room back; one process then goes on."""
    long = job(tmp_path / "run", tiny_store, workers=Workers(count=2))
    running = start(long)
    [(_, report)] = wait_any([running], timeout_seconds=240)
    check_close([report], alone[:1])
    stop(running)
    wait_until(lambda: room() == 2, "the room of stopped workers")
    with contextlib.closing(Runner(job(tmp_path / "run", tiny_store))) as one:
        repeated, *rest = to_end(one)
    assert repeated[STEPS] in (2, 4, 6, 8), "it had gone on to the next evaluation, or not"
    check_close([repeated, *rest], alone[repeated[STEPS] // 2 - 1 :])


def room() -> float:
    import ray

    return ray.available_resources().get("CPU", 0.0)


def test_a_study_whose_trials_have_two_workers(two_cpus, tiny_store, tmp_path):
    """Same trials, same decisions, same journal as with one worker, to float precision."""
    changes = {"num_trials": 3, "overrides": {"attention.dropout": 0.0, "model.dropout": 0.0}}
    settings = {
        name: study_config(tmp_path, **changes, workers=Workers(count=count))
        for name, count in (("one", 1), ("two", 2))
    }
    watcher = Watcher()
    one = train_trials(settings["one"], tiny_store, tmp_path / "one", slots=1)
    two = train_trials(settings["two"], tiny_store, tmp_path / "two", slots=1, observers=(watcher,))
    assert [(t.status, t.steps, t.params) for t in two.trials] == [
        (t.status, t.steps, t.params) for t in one.trials
    ]
    for mine, theirs in zip(two.trials, one.trials, strict=True):
        assert mine.best == pytest.approx(theirs.best, abs=1e-9)
        assert mine.last_report.keys() == theirs.last_report.keys()
        assert mine.last_report[NUM_WORKERS] == 2
        open_checkpoint(trial_folder(tmp_path / "two", mine.number) / "best").model_state()
    reports = [h for h in watcher.heard if h[0] == "reported"]
    assert len(set(reports)) == len(reports)
    wait_until(lambda: room() == 2, "the room of the study's workers")
