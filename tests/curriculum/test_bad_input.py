"""Bad input ends before Ray starts: one sentence, exit code 2, nothing lost, nothing created."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from dmx.cli import options as cli
from dmx.curriculum.__main__ import main
from dmx.runs import layout
from dmx.storage.journal import Journal
from tests.curriculum.fakes import LATE_TASK, OTHER_TASK, FakeBackend, chain, chain_file, run
from tests.tiny import TASK, write_tiny

ROOT = Path(__file__).resolve().parents[2]
GOOD = [0.5, 0.7, 0.8, 0.75]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in (TASK, OTHER_TASK, LATE_TASK):
        write_tiny(folder, task)
    return folder


stages = chain_file


Result = tuple[int, str]
Call = Callable[..., Result]


def arguments(tmp_path: Path, root: Path, content: Any) -> list[str]:
    path = tmp_path / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    words = [str(path), "--name", "run", "--storage", str(tmp_path / "runs")]
    return [*words, "--data-root", str(root)]


@pytest.fixture
def call(tmp_path: Path, root: Path, capfd: pytest.CaptureFixture[str]) -> Call:
    """(exit code, stderr) of the command on a file, in this process; Ray must not start."""

    def command(content: Any, *more: str) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.run("dmx.curriculum", main, [*arguments(tmp_path, root, content), *more])
        assert not ray.is_initialized()
        return int(end.value.code or 0), capfd.readouterr().err

    return command


def in_a_process(tmp_path: Path, root: Path, content: Any, *more: str) -> Result:
    """The same, as a user's shell sees it."""
    command = [sys.executable, "-m", "dmx.curriculum", *arguments(tmp_path, root, content), *more]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stderr


def refused(result: Result, *words: str) -> None:
    code, text = result
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
            stages(b={"reinit": ["haed."]}),
            (),
            ("stage b from a", "'haed.'", "no parameter", "mean 'head.'"),
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
        (
            stages(),
            ("--attention", "nystrm"),
            ("dmx.curriculum: attention 'nystrm' is unknown", "nystrom"),
        ),
        (
            stages(),
            ("--attention", "butterfly-0"),
            ("dmx.curriculum: attention.block_size is 0",),
        ),
        (stages(), ("--set", "attention={}"), ("'attention={}' is an empty mapping",)),
        (stages(), ("--cpus-per-trial", "0"), ("--cpus-per-trial is 0",)),
        (stages(), ("--fresh", "--from-stage", "a"), ("--fresh",)),
        ("stages: [", (), ("mine.yaml", "not valid YAML")),
    ],
)
def test_refused_before_anything_is_created(
    tmp_path: Path, call: Call, content: Any, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(call(content, *more), *words)
    assert not (tmp_path / "runs").exists()


def half_done(tmp_path: Path, root: Path) -> Path:
    """A run whose stages a and b are finished, as the scripted backend leaves it."""
    folder = tmp_path / "runs" / "run"
    backend = FakeBackend({n: [GOOD] for n in "abc"}, root)
    run(chain(), folder, backend, selected=["a", "b"])
    return folder


def damage_line(folder: Path) -> None:
    path = folder / layout.JOURNAL_FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0].replace("0", "1"), *lines[1:]]))


def cut_weights(folder: Path) -> None:
    path = folder / "stages" / "b" / "attempt-0" / layout.BEST_DIR / layout.MODEL_FILE
    path.write_bytes(path.read_bytes()[:10])


def remove_config(folder: Path) -> None:
    (folder / "stages" / "b" / "attempt-0" / layout.BEST_DIR / layout.CONFIG_FILE).unlink()


def contents(folder: Path) -> dict[Path, bytes]:
    """All of a run but its lock, which names whoever looked last."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")
    return {p: p.read_bytes() for p in files}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_line, ("journal.jsonl line 1 is damaged",)),
        (cut_weights, ("attempt-0/best/model.safetensors is damaged", "--from-stage b")),
        (remove_config, ("config.yaml is missing", "--from-stage b")),
    ],
)
def test_a_damaged_run_is_refused(
    tmp_path: Path,
    root: Path,
    call: Call,
    damage: Callable[[Path], None],
    words: tuple[str, ...],
) -> None:
    folder = half_done(tmp_path, root)
    damage(folder)
    before = contents(folder)
    refused(call(stages()), *words)
    assert contents(folder) == before


def test_an_edited_finished_stage_is_refused_with_the_difference(
    tmp_path: Path, root: Path, call: Call
) -> None:
    half_done(tmp_path, root)
    edited = stages(a={"optim.learning_rate": 0.1})
    words = ("stage a was edited", "optim.learning_rate: 0.005 -> 0.1", "--from-stage a")
    refused(call(edited), *words)
    refused(call(stages(), "--set", "optim.learning_rate=0.1"), *words)
    refused(call(edited, "--dry-run"), *words)


def test_a_second_controller_is_refused(tmp_path: Path, root: Path, call: Call) -> None:
    folder = half_done(tmp_path, root)
    with Journal(folder / layout.JOURNAL_FILE):
        refused(call(stages()), "in use by another dmx process")
        code, text = call(stages(), "--status")  # reading disturbs nobody
        assert code == 0, text


def test_a_shell_sees_one_sentence_and_exit_code_2(tmp_path: Path, root: Path) -> None:
    cycle = stages(a={"init_from": "c"})
    refused(in_a_process(tmp_path, root, cycle), "dmx.curriculum: ", "start from each other")
    folder = half_done(tmp_path, root)
    cut_weights(folder)
    refused(
        in_a_process(tmp_path, root, stages()), "model.safetensors is damaged", "--from-stage b"
    )


def test_help_shows_a_command_for_each_need(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.count("python -m dmx.curriculum") >= 5
