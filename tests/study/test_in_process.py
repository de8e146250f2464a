"""train_trials on a real local Ray, in this process: one cluster for all of these tests."""

from __future__ import annotations

import csv
import io
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from dmx.cluster import capacity, connection, gang
from dmx.cluster.gang import start, wait_any
from dmx.reporting.report import to_csv
from dmx.runs.folders import load
from dmx.runs.layout import DEV_ACCURACY, STEPS, trial_folder
from dmx.runs.study import Study
from dmx.runs.trial import pareto_front
from dmx.search.space import SearchSpace, load_space
from dmx.storage.journal import read_claim
from dmx.study import ray_tune, study
from dmx.study.folder import open_folder, settings_event
from dmx.study.ray_tune import TrialRoom, give_back_rooms
from dmx.study.study import StudyConfig, train_trials
from dmx.training.checkpoint import open_checkpoint
from dmx.training.evaluation import EvaluationJob
from dmx.training.job import Job, Workers
from dmx.training.runner import Runner
from tests.study import test_pbt
from tests.study.helpers import FIXED, MAX_STEPS, SEARCHED, journal, space
from tests.tiny import TASK

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[capacity.Resources]:
    """Two slots of one CPU each, whatever the machine has."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    with connection.connect(None) as resources:
        assert (resources.num_cpus, resources.num_gpus) == (2, 0), (
            "the cluster that is there is used"
        )
        yield resources
    assert ray.is_initialized(), "and left running"
    ray.shutdown()


def study_config(folder: Path, **changes: Any) -> StudyConfig:
    chosen: SearchSpace = changes.pop("space", None) or space(folder)
    overrides = {**FIXED, "train.num_steps": MAX_STEPS, **changes.pop("overrides", {})}
    settings = {
        "name": "study",
        "task": TASK,
        "space": chosen,
        "overrides": overrides,
        "num_trials": 4,
        "max_steps": MAX_STEPS,
        "grace_steps": 2,
        "seed": 4,
    }
    return StudyConfig(**{**settings, **changes})


class Watcher:
    """Notes what an observer hears, and may do something at a report."""

    def __init__(self, act: Any = None) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.act = act

    def continues(self, trials):
        self.known = list(trials)

    def started(self, number, point, config):
        self.heard.append(("started", number))
        assert config["task"] == TASK and all(k in (*SEARCHED, "optim.weight_decay") for k in point)

    def reported(self, number, metrics):
        self.heard.append(("reported", number, metrics[STEPS]))
        if self.act is not None:
            self.act(number, metrics)

    def ended(self, result):
        self.heard.append(("ended", result.number, result.status))


def facts(result: Study) -> list[tuple[Any, ...]]:
    return [(t.number, t.status, dict(t.params), t.best, t.steps, t.error) for t in result.trials]


def same_weights(a: Path, b: Path) -> bool:
    first, second = open_checkpoint(a).model_state(), open_checkpoint(b).model_state()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_reused_process_trains_as_a_fresh_one(tiny_store, tmp_path):
    """Every trial of one reused actor, bit for bit what a new Runner makes of its config."""
    folder, watcher = tmp_path / "study", Watcher()
    config = study_config(tmp_path, scheduler="none")
    result = train_trials(config, tiny_store, folder, slots=1, observers=(watcher,))
    assert result.complete and [t.status for t in result.trials] == ["COMPLETE"] * 4
    pids = {read_claim(trial_folder(folder, n))["pid"] for n in range(4)}
    assert len(pids) == 1, "one process ran them all"
    for trial in result.trials:
        job = Job(
            run_config=config.trial_config(trial.params),
            data_folder=str(tiny_store.folder),
            folder=str(tmp_path / "fresh" / str(trial.number)),
        )
        runner = Runner(job)
        while not runner.step()["done"]:
            pass
        runner.close()
        for name in ("best", "last"):
            assert same_weights(trial_folder(folder, trial.number) / name, Path(job.folder) / name)
    assert watcher.heard[:2] == [("started", 0), ("reported", 0, 2)]
    for number in range(4):
        heard = [h for h in watcher.heard if h[1] == number]
        assert heard == [
            ("started", number),
            *(("reported", number, s) for s in range(2, MAX_STEPS + 1, 2)),
            ("ended", number, "COMPLETE"),
        ]
    assert not (folder / "ray").exists()


def test_sessions_shorter_than_an_evaluation_get_on(tiny_store, tmp_path, monkeypatch):
    """Five steps or batches a session, six to an evaluation: it ends as if never stopped."""
    config = study_config(tmp_path, overrides={"train.eval_every_steps": 4}, num_trials=2)
    undisturbed = train_trials(config, tiny_store, tmp_path / "a", slots=1)
    sessions = []

    class AfterFive(ray_tune.Decisions):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.left = 5
            sessions.append(self)

        def __call__(self, trial_id, result):
            self.left -= 1
            return super().__call__(trial_id, result)

        def stop_all(self):
            return self.left <= 0

    monkeypatch.setattr(study, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(ray_tune, "Decisions", AfterFive)
    result = None
    while result is None or not result.complete:
        assert len(sessions) < 30, "it gets no further"
        result = train_trials(config, tiny_store, tmp_path / "b", slots=1)
    assert len(sessions) > 4
    assert facts(result) == facts(undisturbed)
    kept = ("event", "trial", "step", "status", "value")
    first, second = (
        [
            {k: e[k] for k in kept if k in e}
            for e in journal(tmp_path / name)
            if e["event"] != "session"
        ]
        for name in "ab"
    )
    assert first == second
    for number in range(2):
        for name in ("best", "last"):
            a, b = (trial_folder(tmp_path / x, number) / name for x in "ab")
            assert same_weights(a, b)


def test_a_single_run_that_is_stopped_keeps_its_steps(tiny_store, tmp_path, monkeypatch):
    monkeypatch.setattr(gang, "_SLICE_SECONDS", 0.0)
    changes = {"train.num_steps": 500, "train.eval_every_steps": 500}
    plain = study_config(tmp_path, overrides=changes).trial_config({})
    job = Job(run_config=plain, data_folder=str(tiny_store.folder), folder=str(tmp_path / "run"))
    running = start(job)
    deadline = time.monotonic() + 120
    while running.steps < 3:
        assert wait_any([running], timeout_seconds=0.1) == [], "no evaluation yet"
        assert time.monotonic() < deadline, "no step in 120 s"
    gang.stop(running)
    step = open_checkpoint(tmp_path / "run" / "last").training_state()["step"]
    assert 3 <= step < 500 and not (tmp_path / "run" / "best").exists()


def test_kill_9_of_a_worker_loses_nothing(tiny_store, tmp_path):
    """Killed in the second trial, at its second report; it goes on from its last checkpoint."""
    config = study_config(tmp_path)
    undisturbed = train_trials(config, tiny_store, tmp_path / "a", slots=1)
    killed: list[int] = []

    def act(number, metrics):
        if number == 1 and metrics[STEPS] == 4 and not killed:
            killed.append(read_claim(trial_folder(tmp_path / "b", 1))["pid"])
            os.kill(killed[0], signal.SIGKILL)

    watcher = Watcher(act)
    result = train_trials(config, tiny_store, tmp_path / "b", slots=1, observers=(watcher,))
    assert killed and read_claim(trial_folder(tmp_path / "b", 1))["pid"] != killed[0]
    assert facts(result) == facts(undisturbed)
    reports = [h for h in watcher.heard if h[0] == "reported"]
    assert len(set(reports)) == len(reports), "each step is shown once"
    for number in range(4):
        for name in ("best", "last"):
            a, b = (trial_folder(tmp_path / s, number) / name for s in ("a", "b"))
            assert same_weights(a, b)


def test_deaths_count_only_where_a_trial_gets_no_further(tiny_store, tmp_path):
    """With one death allowed, two processes are killed, each after a new report."""
    folder, killed = tmp_path / "study", []

    def act(number, metrics):
        if number == 1 and metrics[STEPS] in (2, 4):
            killed.append(read_claim(trial_folder(folder, 1))["pid"])
            os.kill(killed[-1], signal.SIGKILL)

    config = study_config(tmp_path, num_trials=2, max_failures=1, scheduler="none")
    result = train_trials(config, tiny_store, folder, slots=1, observers=(Watcher(act),))
    assert len(set(killed)) == 2
    assert [t.status for t in result.trials] == ["COMPLETE", "COMPLETE"] and result.complete


NARROW = """
attention: butterfly
space:
  attention.block_size: {int: [16, 17]}
  optim.learning_rate: {choice: [5.0e-3, 1.0e+30]}
initial_points:
  - {attention.block_size: 16, optim.learning_rate: 5.0e-3}
  - {attention.block_size: 17, optim.learning_rate: 5.0e-3}
  - {attention.block_size: 16, optim.learning_rate: 1.0e+30}
  - {attention.block_size: 16, optim.learning_rate: 5.0e-3}
"""


def test_points_that_cannot_be_built_or_trained_fail_alone(tiny_store, tmp_path):
    (tmp_path / "narrow.yaml").write_text(NARROW)
    narrow = load_space(str(tmp_path / "narrow.yaml"), TASK)
    folder, watcher = tmp_path / "study", Watcher()
    config = study_config(tmp_path, space=narrow)
    result = train_trials(config, tiny_store, folder, slots=2, observers=(watcher,))
    assert result.complete
    assert [t.status for t in result.trials] == ["COMPLETE", "FAILED", "FAILED", "COMPLETE"]
    assert "block_size is 17" in result.trials[1].error
    assert result.trials[2].error == "the loss is not finite at step 2"
    assert math.isnan(result.trials[2].best)
    assert result.best == 0, "the earlier one on a tie"
    assert facts(result)[0][2:5] == facts(result)[3][2:5], "two slots do not disturb each other"
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
    study = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(backend))
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]


def test_single_runs_survive_their_process(tiny_store, tmp_path):
    config = study_config(tmp_path)
    plain = config.trial_config(config.space.initial_points[0])

    def to_end(name: str, kill_at: int | None) -> dict[str, Any]:
        job = Job(run_config=plain, data_folder=str(tiny_store.folder), folder=str(tmp_path / name))
        running, reports, killed = start(job), [], []
        while not reports or not reports[-1]["done"]:
            for _, report in wait_any([running], timeout_seconds=60):
                reports.append(report)
                if report[STEPS] == kill_at and not killed:
                    killed.append(read_claim(tmp_path / name)["pid"])
                    os.kill(killed[0], signal.SIGKILL)
        assert len(killed) == (kill_at is not None)
        # A killed process repeats its last report, and a process that gets on counts from zero.
        repeated = [r[STEPS] for r in reports].count(kill_at) - 1
        assert repeated == (1 if killed else -1)
        assert running.restarts == 0
        return {r[STEPS]: r[DEV_ACCURACY] for r in reports}

    assert to_end("a", None) == to_end("b", 4)
    assert same_weights(tmp_path / "a" / "last", tmp_path / "b" / "last")
    data = str(tiny_store.folder)
    wanted = [EvaluationJob(checkpoint=str(tmp_path / n / "best"), data_folder=data) for n in "ab"]
    first, second = (gang.evaluate(job, Workers()) for job in wanted)
    assert first == second


def test_several_objectives_on_two_workers(tiny_store, tmp_path):
    """The front that is kept is the one of the journal's numbers, for us and for Optuna."""
    objectives = ("accuracy", "memory", "parameters")
    config = study_config(
        tmp_path, scheduler="none", sampler="nsga2", objectives=objectives, num_trials=5
    )
    folder = tmp_path / "study"
    folder.mkdir()
    found = {"objectives": list(objectives), "task": "x", "num_trials": 5}
    open_folder(folder, settings_event("study", found), resume=True)
    result = train_trials(config, tiny_store, folder, slots=2)
    assert result.complete and [t.status for t in result.trials] == ["COMPLETE"] * 5
    measured: dict[int, list[float]] = {}
    for n in range(5):
        reports = [e["metrics"] for e in journal(folder) if e.get("trial") == n and "step" in e]
        measured[n] = [
            max(r["dev_accuracy"] for r in reports),
            max(r["peak_memory_mb"] for r in reports),
            reports[0]["parameters"],
        ]
    assert {t.number: list(t.values.values()) for t in result.trials} == measured
    front = tuple(t.number for t in result.best_trials)
    assert front == pareto_front(objectives, measured) != ()
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    assert sorted(t.number for t in study.best_trials) == list(front)
    assert result.best in front
    pids = {read_claim(trial_folder(folder, n))["pid"] for n in range(5)}
    assert len(pids) == 5, "a process whose memory was another trial's would not do"
    table = csv.DictReader(io.StringIO(to_csv(load(folder))))
    assert {int(r["trial"]) for r in table if r["front"] == "yes"} == set(front)


def test_a_population_on_two_workers_and_a_dead_one(tiny_store, tmp_path):
    """Ray's segments, one worker killed, give what the same segments give one by one."""
    killed: list[int] = []
    folder = tmp_path / "ray"

    def act(number, metrics):
        if number == 1 and metrics[STEPS] == 6 and not killed:
            killed.append(read_claim(trial_folder(folder, 1))["pid"])
            os.kill(killed[0], signal.SIGKILL)

    config = study_config(
        tmp_path,
        name="s",
        space=test_pbt.rates(tmp_path),
        num_trials=test_pbt.MEMBERS,
        grace_steps=4,
        seed=5,
        sampler="random",
        scheduler="pbt",
    )
    result = train_trials(config, tiny_store, folder, slots=2, observers=(Watcher(act),))
    assert killed and result.complete
    test_pbt.train(tmp_path / "plain", tiny_store)
    assert test_pbt.picture(folder) == test_pbt.picture(tmp_path / "plain")
    assert sum(len(t.changes) for t in result.trials) == 2


def test_the_room_of_a_study_whose_process_died_is_given_back(tmp_path: Path) -> None:
    import ray
    from ray.exceptions import WorkerCrashedError
    from ray.util.placement_group import remove_placement_group

    def free() -> float:
        return ray.available_resources().get("CPU", 0.0)

    def wait_for(cpus: float) -> None:
        deadline = time.monotonic() + 30
        while free() != cpus:
            assert time.monotonic() < deadline, f"{free():g} CPUs are free, not {cpus:g}"
            time.sleep(0.1)

    @ray.remote(num_cpus=0, max_retries=0)
    def dies(folder: Path) -> None:
        ray.get(TrialRoom({"CPU": 1}, folder).to_placement_group().ready())
        os._exit(1)

    wait_for(2)
    with pytest.raises(WorkerCrashedError):
        ray.get(dies.remote(tmp_path / "study"), timeout=60)
    other = TrialRoom({"CPU": 1}, tmp_path / "other").to_placement_group()
    ray.get(other.ready(), timeout=30)
    wait_for(0)  # Ray keeps the group: its job lives
    give_back_rooms(tmp_path / "study")
    wait_for(1)
    remove_placement_group(other)
    wait_for(2)
