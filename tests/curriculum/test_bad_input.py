"""Bad input ends before Ray starts: one sentence, exit code 2, nothing lost, nothing created."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmx import records as keys
from dmx.journal import Journal
from tests.curriculum.fakes import LATE_TASK, OTHER_TASK, FakeBackend, chain, run
from tests.tiny import SETTINGS, TASK, write_tiny

ROOT = Path(__file__).resolve().parents[2]
GOOD = [0.5, 0.7, 0.8, 0.75]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in (TASK, OTHER_TASK, LATE_TASK):
        write_tiny(folder, task)
    return folder


def stages(**changes: dict[str, Any]) -> dict[str, Any]:
    """The file of tests.curriculum.fakes.chain, as a user would write it."""
    tasks = {"a": TASK, "b": OTHER_TASK, "c": LATE_TASK}
    listed = [{"name": n, "task": t, **changes.get(n, {})} for n, t in tasks.items()]
    return {"defaults": {"task": TASK, "cpus": 1, **SETTINGS}, "stages": listed}


def call(tmp_path: Path, root: Path, content: Any, *more: str) -> tuple[int, str, float]:
    """(exit code, stderr, seconds) of the command on a file."""
    path = tmp_path / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    command = [sys.executable, "-m", "dmx.curriculum", str(path), "--name", "run"]
    command += ["--storage", str(tmp_path / "runs"), "--data-root", str(root), *more]
    started = time.monotonic()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stderr, time.monotonic() - started


def refused(result: tuple[int, str, float], *words: str) -> None:
    code, text, _ = result
    lines = [line for line in text.splitlines() if " INFO " not in line]
    assert code == 2, text
    assert len(lines) == 1 and "Traceback" not in text, text
    assert all(word in lines[0] for word in words), text


@pytest.mark.parametrize(
    ("content", "more", "words"),
    [
        (stages(b={"init_from": "z"}), (), ("mine.yaml", "stages.b.init_from", "'z'")),
        (stages(a={"init_from": "c"}), (), ("init_from", "each other")),
        (
            stages(b={"model.embedding_dim": 32}),
            (),
            ("stage b from a", "encoder.embeddings.token.weight", "(512, 16)", "reinit"),
        ),
        (
            stages(a={"gate": {"name": "threshold", "metric": "accuracy", "at_least": 1}}),
            (),
            ("stages.a.gate", "'accuracy' is unknown", "dev_accuracy"),
        ),
        (stages(c={"task": "text"}), (), ("stage c", "text", "python -m dmx.data text")),
        (stages(a={"cpus": 512}), (), ("stage a", "512 CPUs")),
        (stages(), ("--until", "d"), ("--until", "'d' is unknown")),
        (stages(), ("--status",), ("there is no run",)),
        (stages(), ("--set", "optim.speed=1"), ("optim.speed",)),
        (stages(), ("--attention", "nystrm"), ("'nystrm' is unknown", "nystrom")),
        (stages(), ("--cpus-per-trial", "0"), ("--cpus-per-trial is 0",)),
        (stages(), ("--fresh", "--from-stage", "a"), ("--fresh",)),
        ("stages: [", (), ("mine.yaml", "not valid YAML")),
    ],
)
def test_refused_before_anything_is_created(
    tmp_path: Path, root: Path, content: Any, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(call(tmp_path, root, content, *more), *words)
    assert not (tmp_path / "runs").exists()


def half_done(tmp_path: Path, root: Path) -> Path:
    """A run whose stages a and b are finished, as the scripted backend leaves it."""
    folder = tmp_path / "runs" / "run"
    backend = FakeBackend({n: [GOOD] for n in "abc"}, root)
    run(chain(), folder, backend, selected=["a", "b"])
    return folder


def damage_line(folder: Path) -> None:
    path = folder / keys.JOURNAL_FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0].replace("0", "1"), *lines[1:]]))


def cut_weights(folder: Path) -> None:
    path = folder / "stages" / "b" / "attempt-0" / keys.BEST_DIR / keys.MODEL_FILE
    path.write_bytes(path.read_bytes()[:100])


def remove_config(folder: Path) -> None:
    (folder / "stages" / "b" / "attempt-0" / keys.BEST_DIR / keys.CONFIG_FILE).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_line, ("journal.jsonl line 1 is damaged",)),
        (cut_weights, ("attempt-0/best/model.pt is damaged", "--from-stage b")),
        (remove_config, ("config.yaml is missing", "--from-stage b")),
    ],
)
def test_a_damaged_run_is_refused(
    tmp_path: Path, root: Path, damage: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    folder = half_done(tmp_path, root)
    damage(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    refused(call(tmp_path, root, stages()), *words)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_an_edited_finished_stage_is_refused_with_the_difference(
    tmp_path: Path, root: Path
) -> None:
    half_done(tmp_path, root)
    edited = stages(a={"optim.learning_rate": 0.1})
    words = ("stage a was edited", "optim.learning_rate: 0.005 -> 0.1", "--from-stage a")
    refused(call(tmp_path, root, edited), *words)
    refused(call(tmp_path, root, stages(), "--set", "optim.learning_rate=0.1"), *words)
    refused(call(tmp_path, root, edited, "--dry-run"), *words)


def test_a_second_controller_is_refused(tmp_path: Path, root: Path) -> None:
    folder = half_done(tmp_path, root)
    with Journal(folder / keys.JOURNAL_FILE):
        refused(call(tmp_path, root, stages()), "in use by another dmx process")
        code, text, _ = call(tmp_path, root, stages(), "--status")  # reading disturbs nobody
        assert code == 0, text


def test_help_shows_a_command_for_each_need() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dmx.curriculum", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and done.stdout.count("python -m dmx.curriculum") >= 5
