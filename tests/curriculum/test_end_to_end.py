"""The command on a real Ray: SIGTERM and kill -9 cost nothing, and the result is the plain one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dmx.runs import layout
from dmx.runs.curriculum import Curriculum
from dmx.runs.folders import load
from dmx.runs.layout import DEV_ACCURACY, FAILURE, TRAIN_SECONDS
from dmx.schema import to_dict
from dmx.storage.journal import read_journal
from dmx.training.job import Job
from dmx.training.runner import Runner
from tests.curriculum.fakes import OTHER_TASK, curriculum
from tests.tiny import SETTINGS, TASK, write_tiny

ROOT = Path(__file__).resolve().parents[2]
# Dropout, so that the random generators have to be continued as well.
CHANGED = {
    "attention.dropout": 0.1,
    "model.mlp_dropout": 0.1,
    "train.num_steps": 60,
    "train.eval_every_steps": 4,
}
STAGES: list[dict[str, Any]] = [{"name": "a"}, {"name": "b", "task": OTHER_TASK}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in (TASK, OTHER_TASK):
        write_tiny(folder, task)
    return folder


class Command:
    """The command on one file; every call is the same."""

    def __init__(self, tmp_path: Path, root: Path, content: dict[str, Any]) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(content))
        self.folder = tmp_path / "runs" / "run"
        self.argv = [str(file), "--name", "run", "--storage", str(tmp_path / "runs")]
        self.argv += ["--data-root", str(root)]
        self._cwd = tmp_path

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "dmx.curriculum", *self.argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self._cwd,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "COLUMNS": "80",
            },
        )

    def finish(self) -> tuple[str, str]:
        process = self.start()
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        return out, err

    def events(self, kind: str) -> list[dict[str, Any]]:
        found = read_journal(self.folder / layout.JOURNAL_FILE)[0]
        return [e for e in found if e["event"] == kind]

    def wait_for(self, process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not ready():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)


def plain_run(root: Path, folder: Path) -> None:
    """Both stages with the Ray-free Runner, one after the other, never interrupted."""
    init = None
    for stage in curriculum(*STAGES, **CHANGED).stages:
        job = Job(
            run_config={**to_dict(stage.config), "init": init and {"path": init}},
            data_folder=str(root / stage.task),
            folder=str(folder / stage.name),
        )
        runner = Runner(job)
        while not (report := runner.step())["done"]:
            pass
        assert FAILURE not in report
        runner.close()
        init = str(folder / stage.name / layout.BEST_DIR)


def content(folder: Path) -> dict[str, Any]:
    """Everything in a checkpoint except the time it took."""
    state = torch.load(folder / layout.TRAINING_STATE_FILE, weights_only=True)
    return {
        "weights": load_file(folder / layout.MODEL_FILE),
        "state": {k: state[k] for k in state if not k.endswith("_seconds")},
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(torch.equal(a, b)) if isinstance(a, torch.Tensor) else bool(a == b)


@pytest.mark.slow
def test_killed_anywhere_it_ends_as_if_never_disturbed(tmp_path: Path, root: Path) -> None:
    shared = {"task": TASK, "cpus": 1, **SETTINGS, **CHANGED}
    command = Command(tmp_path, root, {"defaults": shared, "stages": STAGES})

    process = command.start()  # session 1: a polite end in stage a
    command.wait_for(process, lambda: len(command.events("report")) >= 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("python -m dmx.curriculum ") and "--name run" in last

    process = command.start()  # session 2: kill -9 of the worker, then of the controller in b
    claims = command.folder / "stages"
    command.wait_for(process, lambda: len(command.events("report")) >= 4)
    worker = json.loads((claims / "a" / "attempt-0" / "claim.json").read_text())["pid"]
    os.kill(worker, signal.SIGKILL)
    command.wait_for(process, lambda: any(e["stage"] == "b" for e in command.events("report")))
    process.kill()
    process.communicate()

    out, _ = command.finish()  # session 3: the same command, to the end
    assert out.count("passed") == 2
    assert f"tensorboard --logdir {command.folder}\n" in out, "in one piece, to be copied"
    events = read_journal(command.folder / layout.JOURNAL_FILE)[0]
    started = [(e["stage"], e["attempt"]) for e in events if e["event"] == "started"]
    assert started == [("a", 0), ("b", 0)]
    plain_run(root, tmp_path / "plain")
    history = Curriculum.read(command.folder)
    for name in "ab":
        state = history.stage(name)
        assert state.promoted is not None and state.current is not None
        assert len(state.current.reports) == 15  # 60 steps, every 4
        mine, plain = command.folder / state.promoted["path"], tmp_path / "plain" / name
        assert same(content(mine), content(plain / layout.BEST_DIR)), name
        assert same(content(mine.parent / layout.LAST_DIR), content(plain / layout.LAST_DIR)), name

    before = time.monotonic()  # session 4: nothing is left to do, and Ray is not even started
    out, err = command.finish()
    assert "nothing is left to do" in err and time.monotonic() - before < 60
    lineage = json.loads((command.folder / layout.LINEAGE_FILE).read_text())
    assert [s["name"] for s in lineage["stages"]] == ["a", "b"]
    assert all(0.0 <= s["test_accuracy"] <= 1.0 for s in lineage["stages"])
    assert Path(lineage["stages"][1]["checkpoint"]).is_dir()


@pytest.mark.slow
def test_a_stage_may_be_a_search_and_its_best_trial_goes_on(tmp_path: Path, root: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(
        "attention: butterfly\nspace:\n  optim.learning_rate: {choice: [1.0e-9, 1.0e-2]}\n"
        "initial_points: [{optim.learning_rate: 1.0e-9}, {optim.learning_rate: 1.0e-2}]\n"
    )
    search = {"space": str(space), "num_trials": 2, "scheduler": "none"}
    shared = {"task": TASK, "cpus": 1, **SETTINGS, "train.num_steps": 24}
    stages = [{"name": "a", "search": search}, {"name": "b"}]
    command = Command(tmp_path, root, {"defaults": shared, "stages": stages})
    _, err = command.finish()
    assert "trial 1 step 24: dev accuracy" in err and "trial 1 ran its full budget" in err
    a = Curriculum.read(command.folder).stage("a")
    assert a.promoted is not None and a.current is not None
    trials = command.folder / "stages" / "a" / "attempt-0" / "trials"
    accuracies = [
        json.loads((trials / f"000{n}" / layout.BEST_DIR / layout.METRICS_FILE).read_text())
        for n in range(2)
    ]
    best = max(range(2), key=lambda n: accuracies[n][DEV_ACCURACY])
    promoted = command.folder / a.promoted["path"]
    assert same(content(promoted), content(trials / f"000{best}" / layout.BEST_DIR))
    assert len(a.current.reports) == 12
    b = json.loads((command.folder / layout.LINEAGE_FILE).read_text())["stages"][1]
    assert b["init_from"]["path"] == str(promoted) and b["status"] == "passed"
    # The lineage and the report tell of the trial that was promoted, and of what all of them cost.
    rate = (1e-9, 1e-2)[best]
    run = load(command.folder)
    stage = run.stages[0]
    assert stage.config is not None and stage.config["optim"]["learning_rate"] == rate
    lineage = json.loads((command.folder / layout.LINEAGE_FILE).read_text())["stages"][0]
    told = {"trial": best, "num_trials": 2, "params": {"optim.learning_rate": rate}}
    assert lineage["search"] == told and lineage["all_attempts"]["steps"] == 48 == stage.all_steps
    seconds = [
        max(e["metrics"][TRAIN_SECONDS] for e in reports)
        for reports in _reports_by_trial(command.folder / "stages" / "a" / "attempt-0")
    ]
    assert stage.seconds == pytest.approx(sum(seconds)) and len(seconds) == 2
    study = load(command.folder / "stages" / "a" / "attempt-0")
    assert (study.task, study.attention, study.best) == (TASK, "butterfly-16", best)
    assert study.complete and study.search is not None and study.search.num_trials == 2


@pytest.mark.slow
def test_a_search_that_is_interrupted_ends_as_the_undisturbed_one(
    tmp_path: Path, root: Path
) -> None:
    """Ctrl-C while its trials train; the same command trains none of their steps again."""
    rates = [1.0e-9, 1.0e-3, 1.0e-2]
    space = tmp_path / "space.yaml"
    points = [{"optim.learning_rate": rate} for rate in rates]
    searched = {"optim.learning_rate": {"choice": rates}}
    written = {"attention": "butterfly", "space": searched, "initial_points": points}
    space.write_text(yaml.safe_dump(written))
    search = {"space": str(space), "num_trials": 3, "scheduler": "none"}
    shared = {"task": TASK, "cpus": 1, **SETTINGS, **CHANGED}
    stages = [{"name": "a", "search": search}, {"name": "b", "train.num_steps": 8}]
    commands = []
    for name in ("cut", "whole"):
        (tmp_path / name).mkdir()
        commands.append(Command(tmp_path / name, root, {"defaults": shared, "stages": stages}))
    cut, whole = commands
    journal = cut.folder / "stages" / "a" / "attempt-0" / layout.JOURNAL_FILE

    def reports() -> list[tuple[int, int]]:
        found = [e for e in read_journal(journal)[0] if e["event"] == "report"]
        return [(e["trial"], e["step"]) for e in found]

    process = cut.start()
    cut.wait_for(process, lambda: len(reports()) >= 4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    before = reports()
    assert 4 <= len(before) < 45, "in the middle: 3 trials of 15 evaluations"
    assert not cut.events("decided")
    cut.finish()
    whole.finish()
    assert len(reports()) == len(set(reports())) == 45
    assert reports()[: len(before)] == before
    ended = []
    for command in commands:
        history = Curriculum.read(command.folder)
        a, b = history.stage("a"), history.stage("b")
        assert a.current is not None and a.current.search is not None
        found = {k: a.current.search[k] for k in ("trial", "num_trials", "params", "steps")}
        ended.append((found, a.current.dev_accuracies, a.tests, b.tests, a.promoted, b.promoted))
    assert ended[0] == ended[1]
    for stage in "ab":
        promoted = [c.folder / "stages" / stage / "attempt-0" / layout.BEST_DIR for c in commands]
        assert same(*map(content, promoted)), stage


def _reports_by_trial(folder: Path) -> list[list[dict[str, Any]]]:
    events = read_journal(folder / layout.JOURNAL_FILE)[0]
    reports = [e for e in events if e["event"] == "report"]
    return [[e for e in reports if e["trial"] == n] for n in sorted({e["trial"] for e in reports})]
