"""Other searches than TPE with ASHA, whole: killed and continued, and on Ray's own workers."""

from __future__ import annotations

import csv
import io
import json
import shutil

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from dmx.claim import read_claim
from dmx.data.store import Store
from dmx.ledger import trial_folder
from dmx.objectives import pareto_front
from dmx.reporting.collect import collect
from dmx.reporting.plain import to_csv
from dmx.study import run_study
from tests.study.helpers import command, facts, journal, rows, run
from tests.study.processes import started, wait_until
from tests.study.test_in_process import ray_cluster, study_config  # noqa: F401
from tests.study.test_interruptions import timeless

pytestmark = pytest.mark.slow


def test_warm_cmaes_with_hyperband_killed_and_continued(whole, tiny_root, tmp_path):
    """The study that it learnt from is gone when it is continued; it ends as if nothing were."""
    options = ["--sampler", "cmaes", "--scheduler", "hyperband", "--warm-start", "older"]
    for name in ("a", "b"):
        older = tmp_path / name / "runs" / "older"
        older.parent.mkdir(parents=True)
        shutil.copytree(whole.folder, older)
    done = run(command(tmp_path / "a", tiny_root, *options), tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "warm start from 6 trials of older" in done.stderr
    assert "sampler cmaes draws at random, each by itself: attention.block_size," in done.stderr
    first, second = tmp_path / "a" / "runs" / "study", tmp_path / "b" / "runs" / "study"
    with started(command(tmp_path / "b", tiny_root, *options), tmp_path / "b") as running:
        running.until_events(second, len(journal(first)) // 2)
        running.kill()
        wait_until(lambda: not running.left(), "end of the killed cluster")
    shutil.rmtree(tmp_path / "b" / "runs" / "older")
    again = run(command(tmp_path / "b", tiny_root, *options, "--resume"), tmp_path / "b")
    assert again.returncode == 0, again.stderr
    assert facts(second) == facts(first) and timeless(second) == timeless(first)
    assert [int(r["trial"]) for r in rows(second)] == list(range(6))
    # The same trials without the warm start are others: it did inform them.
    assert facts(second) != facts(whole.folder)
    other = run(command(tmp_path / "b", tiny_root, *options[:-2], "--resume"), tmp_path / "b")
    assert other.returncode == 2 and "(warm_start was " in other.stderr


def test_several_objectives_on_two_workers(tiny_store: Store, tmp_path, ray_cluster):  # noqa: F811
    """The front that is kept is the one of the journal's numbers, for us and for Optuna."""
    objectives = ("accuracy", "memory", "parameters")
    config = study_config(
        tmp_path, scheduler="none", sampler="nsga2", objectives=objectives, num_trials=5
    )
    folder = tmp_path / "study"
    result = run_study(config, tiny_store, folder, slots=2)
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
    assert result.front == pareto_front(objectives, measured) != ()
    backend = JournalFileBackend(str(folder / "optuna.journal"))
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    assert sorted(t.number for t in study.best_trials) == list(result.front)
    assert result.best is not None and result.best.number in result.front
    pids = {read_claim(trial_folder(folder, n))["pid"] for n in range(5)}
    assert len(pids) == 5, "a process whose memory was another trial's would not do"
    (folder / "settings.json").write_text(json.dumps({"objectives": objectives, "task": "x"}))
    table = csv.DictReader(io.StringIO(to_csv(collect(folder))))
    assert {int(r["trial"]) for r in table if r["front"] == "yes"} == set(result.front)
