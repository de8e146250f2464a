"""`python -m dmx.train`: one run from the command to its files, interrupted and continued."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dmx import terminal, train
from dmx.config import InitConfig, parse_run_config
from dmx.data.store import Manifest, Store, open_store
from dmx.data.store_writer import StoreWriter, write_store
from dmx.errors import CheckpointError, ConfigError, DataError, RunFailedError
from dmx.reporting.report import train_command
from dmx.reporting.tables import provenance
from dmx.runs.folders import load
from dmx.study import single_run
from dmx.training.checkpoint import open_checkpoint
from dmx.training.evaluation import evaluate
from dmx.training.runner import Runner
from dmx.training.trainer import Trainer, resolve
from dmx.training.transfer import POSITION_KEY, tile_positions
from tests import tiny
from tests.tiny import SETTINGS, TASK


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    yield
    logger = logging.getLogger("dmx")
    logger.handlers.clear()
    logger.propagate = True


def main(argv: list[str]) -> int:
    terminal.setup_logging()  # on this test's stderr
    return train.main(argv)


def words(root: Path, *more: str) -> list[str]:
    base = ["--attention", "butterfly", "--task", TASK, "--data-root", str(root), "--threads", "1"]
    return [*base, *more, *(f"{k}={v}" for k, v in SETTINGS.items()), "model.dropout=0.1"]


def same_run(a: Path, b: Path) -> None:
    for name in ("best", "last"):
        first, second = (open_checkpoint(run / name) for run in (a, b))
        assert first.config == second.config
        weights, others = first.model_state(), second.model_state()
        assert all(torch.equal(value, others[key]) for key, value in weights.items())
    results = [json.loads((run / "result.json").read_text()) for run in (a, b)]
    for key in ("test_accuracy", "test_loss", "best_dev_accuracy", "steps", "data"):
        assert results[0][key] == results[1][key]


def test_a_run_and_its_evaluation(tiny_root, tmp_path, capsys):
    assert main(words(tiny_root, "--name", "a")) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "runs" / "a" / "result.json").read_text())
    assert f"test accuracy {result['test_accuracy']:.4f} over 29 examples" in out
    assert result["data"] == f"{TASK} (tiny)" and f"data: {TASK} (tiny)" in out
    again = ["--evaluate", "runs/a/best", "--data-root", str(tiny_root)]
    assert main(again) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["accuracy"] == result["test_accuracy"] and shown["split"] == "test"
    assert main([*again, "--split", "dev"]) == 0
    dev = yaml.safe_load(capsys.readouterr().out)
    assert dev["accuracy"] == result["best_dev_accuracy"] and dev["num_examples"] == 37

    assert main(["--config", "runs/a/best/config.yaml", "--name", "b", *words(tiny_root)[4:]]) == 0
    same_run(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    before = (tmp_path / "runs" / "a" / "last" / "model.safetensors").read_bytes()
    assert main(words(tiny_root, "--name", "a", "--resume")) == 0, "a finished run"
    assert (tmp_path / "runs" / "a" / "last" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("sent", "background", "slice_seconds"),
    [
        *((signal.SIGINT, False, 60), (signal.SIGTERM, False, 60), (signal.SIGTERM, True, 60)),
        *((signal.SIGINT, False, 0), (signal.SIGTERM, True, 0), (signal.SIGHUP, False, 0)),
    ],
)
def test_interrupted_and_continued_by_the_last_line(
    tiny_root, tmp_path, capsys, monkeypatch, sent, background, slice_seconds
):
    """A job in the background ignores Ctrl-C, but not SIGTERM. The step under way is kept."""
    monkeypatch.setattr(single_run, "_SLICE_SECONDS", slice_seconds)

    class Interrupted(Runner):
        calls = 0

        def step(self):
            report = super().step()
            Interrupted.calls += 1
            if Interrupted.calls == (3 if slice_seconds else 9):
                os.kill(os.getpid(), sent)
            return report

    with monkeypatch.context() as patch:
        patch.setattr(single_run, "Runner", Interrupted)
        ctrl_c = signal.SIG_IGN if background else signal.default_int_handler
        before = signal.signal(signal.SIGINT, ctrl_c)
        assert main(words(tiny_root, "--name", "part")) == 130
        assert signal.signal(signal.SIGINT, before) is ctrl_c
    last = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert last[:3] == ["python", "-m", "dmx.train"] and last[-1] == "--resume"
    last_one = open_checkpoint(tmp_path / "runs" / "part" / "last")
    # Two calls to an evaluation's step, two of it, and the third evaluation's first step.
    reached = (6, 6) if slice_seconds else (4, 5)
    assert (last_one.metrics["steps"], last_one.training_state()["step"]) == reached
    assert main(last[3:]) == 0
    assert main(words(tiny_root, "--name", "whole")) == 0
    same_run(tmp_path / "runs" / "part", tmp_path / "runs" / "whole")


def test_the_same_from_python(tiny_root, tmp_path):
    """A run is started, looked at, evaluated and continued by functions, and is the command's."""
    assert main(words(tiny_root, "--name", "a")) == 0
    where = {"data_root": str(tiny_root), "threads": 1, "storage": str(tmp_path / "runs")}
    settings = {**SETTINGS, "model.dropout": 0.1}
    run = single_run.run_training("butterfly", TASK, settings, **where)
    assert run.name == f"butterfly-{TASK}" and run.complete
    same_run(tmp_path / "runs" / "a", run.folder)
    found = evaluate(run.folder, data_root=str(tiny_root), threads=1)
    assert found["accuracy"] == run.test_accuracy and found["split"] == "test"
    with pytest.raises(ConfigError, match="already exists"):
        single_run.run_training("butterfly", TASK, settings, **where)
    again = single_run.run_training("butterfly", TASK, settings, resume=True, **where)
    assert again.test_accuracy == run.test_accuracy


def test_other_settings_do_not_continue_a_run(tiny_root, tmp_path):
    assert main(words(tiny_root, "--name", "a")) == 0
    with pytest.raises(ConfigError, match=r"train\.seed was 2023, now 5"):
        main(words(tiny_root, "--name", "a", "--resume", "train.seed=5"))


def test_a_run_that_diverges(tiny_root):
    changed = [w for w in words(tiny_root) if not w.startswith("optim.learning_rate")]
    with pytest.raises(RunFailedError, match="the run failed: the loss is not finite at step 2"):
        main([*changed, "optim.learning_rate=1e30"])


def test_starting_from_other_weights(tiny_root, tmp_path):
    """With no training to speak of, the weights are those it started from."""
    assert main(words(tiny_root, "--name", "a")) == 0
    rest = [w for w in words(tiny_root) if not w.startswith("optim.learning_rate")]
    start = ["--init-from", "runs/a/last", "--name", "b", "optim.learning_rate=1e-30"]
    assert main([*rest, *start]) == 0
    a, b = (open_checkpoint(tmp_path / "runs" / n / "last").model_state() for n in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_weights_it_started_from_are_on_record(tiny_root, tmp_path, capsys):
    """In each checkpoint, in the report and its command, which gives the same run once more."""
    source = tmp_path / "runs" / "a" / "best"
    assert main(words(tiny_root, "--name", "a")) == 0
    assert main(words(tiny_root, "--name", "b", "--init-from", "runs/a/best")) == 0
    checksum = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    for name in ("best", "last"):
        found = open_checkpoint(tmp_path / "runs" / "b" / name)
        assert found.config.init == InitConfig(path=str(source), sha256=checksum)
        moved = found.metrics["transferred"]
        assert len(moved["moved"]) == len(found.model_state()) and moved["fresh"] == []
    run = load(tmp_path / "runs" / "b")
    assert ("started from", f"{source} (SHA-256 {checksum})") in provenance(run).rows
    command = shlex.split(train_command(run))
    assert command[:3] == ["python", "-m", "dmx.train"]
    assert command[command.index("--init-from") + 1] == str(source)
    assert command[command.index("--threads") + 1] == "1"
    assert main([*command[3:], "--data-root", str(tiny_root)]) == 0
    same_run(tmp_path / "runs" / "b", tmp_path / "runs" / "b-again")
    config = ["--config", "runs/b/best/config.yaml", "--name", "c", "--threads", "1"]
    assert main([*config, "--data-root", str(tiny_root)]) == 0
    same_run(tmp_path / "runs" / "b", tmp_path / "runs" / "c")


def test_a_run_goes_on_from_what_it_started_from(tiny_root, tmp_path):
    """Without --init-from, too; other weights are refused, and moved ones are not missed."""
    assert main(words(tiny_root, "--name", "a")) == 0
    assert main(words(tiny_root, "--name", "other", "train.seed=7")) == 0
    assert main(words(tiny_root, "--name", "b", "--init-from", "runs/a/best")) == 0
    with pytest.raises(ConfigError, match=r"--init-from was .*runs/a/best, now .*other/best"):
        main(words(tiny_root, "--name", "b", "--resume", "--init-from", "runs/other/best"))
    with pytest.raises(ConfigError, match=r"--init-from was none, now .*other/best"):
        main(words(tiny_root, "--name", "a", "--resume", "--init-from", "runs/other/best"))
    before = (tmp_path / "runs" / "b" / "last" / "model.safetensors").read_bytes()
    assert main(words(tiny_root, "--name", "b", "--resume", "--init-from", "runs/a/best")) == 0
    (tmp_path / "runs" / "a").rename(tmp_path / "runs" / "moved")
    assert main(words(tiny_root, "--name", "b", "--resume")) == 0
    assert main(words(tiny_root, "--name", "b", "--resume", "--init-from", "runs/moved/best")) == 0
    assert (tmp_path / "runs" / "b" / "last" / "model.safetensors").read_bytes() == before


def test_weights_that_changed_since_are_refused(tiny_root, tmp_path):
    assert main(words(tiny_root, "--name", "a")) == 0
    assert main(words(tiny_root, "--name", "b", "--init-from", "runs/a/best")) == 0
    weights = "model.safetensors"
    shutil.copy(tmp_path / "runs/b/last" / weights, tmp_path / "runs/a/best" / weights)
    with pytest.raises(CheckpointError, match=r"holds other weights \(SHA-256"):
        main(["--config", "runs/b/best/config.yaml", "--name", "c"])
    assert not (tmp_path / "runs" / "c").exists()


def test_a_run_of_one_process_needs_no_ray(tiny_root, tmp_path):
    """Ray and Optuna cannot be imported, and nothing misses them."""
    import subprocess
    import sys

    code = "import sys; sys.modules['ray'] = sys.modules['optuna'] = None\n"
    code += "from dmx.train import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *words(tiny_root, "--name", "a")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_the_folder_of_a_run_stands_for_its_best_checkpoint(tiny_root, tmp_path, capsys, caplog):
    assert main(words(tiny_root, "--name", "a")) == 0
    capsys.readouterr()
    for given in ("runs/a", "runs/a/", "runs/a/best"):
        assert main(["--evaluate", given, "--data-root", str(tiny_root)]) == 0
        out = capsys.readouterr()
        assert yaml.safe_load(out.out)["checkpoint"] == "runs/a/best"
        assert ("its best checkpoint is meant: runs/a/best" in out.err) == (given != "runs/a/best")
    assert main(["--config", "runs/a", "--show"]) == 0
    assert capsys.readouterr().out == (tmp_path / "runs/a/best/config.yaml").read_text()
    with pytest.raises(
        CheckpointError, match=r"^runs is not a whole checkpoint: model.safetensors is"
    ):
        main(["--evaluate", "runs", "--data-root", str(tiny_root)])


LARGE = "pathfinder32-cl3-d1"


@pytest.fixture(scope="module")
def checkpoint(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a 16 x 16 task."""
    folder = tmp_path_factory.mktemp("checkpoint") / "best"
    with tiny.trainer(tiny_store) as made:
        made.advance()
        made.save(folder)
    return folder


def write_pictures(root: Path, below: int) -> None:
    """A store of 32 x 32 pictures: the first 256 pixels are the same whatever `below` is."""
    manifest = Manifest(
        task=LARGE, data_name=f"below {below}", origin="here", note="", num_classes=2,
        max_length=1024, vocab_size=512, dtype="uint8",
    )  # fmt: skip
    draw = np.random.default_rng(0)

    def fill(writer: StoreWriter) -> None:
        for split in ("train", "dev", "test"):
            rows = np.full((20, 1024), below, np.uint8)
            rows[:, :256] = draw.integers(0, 256, (20, 256))
            writer.add_rows(split, rows, np.arange(20) % 2)

    write_store(root / LARGE, manifest, fill)


def test_a_checkpoint_is_evaluated_on_larger_pictures_as_a_whole(checkpoint, tmp_path, capsys):
    """Its positions are enlarged as between stages; once it read the first 256 of 1,024 pixels."""
    losses = []
    for below in (0, 200):
        root = tmp_path / str(below)
        write_pictures(root, below)
        argv = ["--evaluate", str(checkpoint), "--task", LARGE, "--data-root", str(root)]
        assert main(argv) == 0
        shown = yaml.safe_load(capsys.readouterr().out)
        assert shown["weights"] == f"of {TASK}, positions 16 x 16 to 32 x 32"
        losses.append(shown["loss"])
    assert losses[0] != losses[1], "the pixels below count"
    state = open_checkpoint(checkpoint).model_state()
    state[POSITION_KEY] = tile_positions(state[POSITION_KEY], 1024)
    with tiny.trainer(open_store(root / LARGE), task=LARGE) as made:
        made.model.load_state_dict(state)
        assert made.evaluate("test").loss == losses[1]
    assert main([*argv, "attention.block_size=32"]) == 0, "settings count as well"
    assert yaml.safe_load(capsys.readouterr().out)["loss"] not in losses


@pytest.mark.parametrize("task", ["retrieval", "text", "image"])
def test_a_task_of_another_kind_is_refused(checkpoint, tmp_path, task):
    with pytest.raises(ConfigError) as caught:
        main(["--evaluate", str(checkpoint), "--task", task, "--data-root", str(tmp_path)])
    text = tiny.one_sentence(caught.value)
    assert f"is a checkpoint of task {TASK}; --task {task} is of another kind" in text


def test_larger_weights_on_smaller_pictures_are_refused(tmp_path):
    store = tiny.write_tiny(tmp_path / "data", LARGE, 1024)
    with tiny.trainer(store, task=LARGE) as made:
        made.save(tmp_path / "best")
    with pytest.raises(CheckpointError, match=r"\(1024, 16\) in the source, \(256, 16\) here"):
        main(["--evaluate", "best", "--task", TASK])  # before any data are generated
    assert not (tmp_path / "data" / TASK).exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_weights_that_do_not_fit_leave_no_folder(checkpoint, tiny_root, tmp_path, more):
    rest = [w for w in words(tiny_root) if not w.startswith("model.hidden_dim")]
    argv = [*rest, "--init-from", str(checkpoint), "--name", "b", *more]
    with pytest.raises(CheckpointError) as caught:
        main([*argv, "model.hidden_dim=24"])
    text = tiny.one_sentence(caught.value)
    assert "encoder.layers.0.mlp.0.weight is (16, 16) in the source, (24, 16) here" in text
    assert text.endswith("name what may start afresh in `reinit` (--reinit).")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(CheckpointError, match=r"reinit names 'haed\.', .* mean 'head\.'\?"):
        main([*argv, "--reinit", "haed."])
    with pytest.raises(ConfigError, match="--reinit is given without --init-from"):
        main(words(tiny_root, "--reinit", "head."))
    assert not (tmp_path / "runs").exists()


def test_what_may_start_afresh_is_named_and_told(checkpoint, tiny_root, tmp_path, capsys):
    changed = ("optim.learning_rate", "model.hidden_dim")
    rest = [w for w in words(tiny_root) if not w.startswith(changed)]
    argv = [*rest, "--init-from", str(checkpoint), "model.hidden_dim=24", "--name", "b"]
    names = ["--reinit", "encoder.layers.*.mlp.*", "--reinit", "head."]
    assert main([*argv, *names, "optim.learning_rate=1e-30"]) == 0
    told = capsys.readouterr().out.splitlines()[0]
    fresh = "encoder.layers.0.mlp.0.weight, encoder.layers.0.mlp.0.bias, "
    fresh += "encoder.layers.0.mlp.3.weight, head.0.weight and 2 more"
    assert told == f"from {checkpoint}: moved 18 tensors, afresh: {fresh}"
    state = open_checkpoint(tmp_path / "runs" / "b" / "last").model_state()
    for name, value in open_checkpoint(checkpoint).model_state().items():
        if name.startswith("encoder.layers.0.attention"):
            assert torch.equal(state[name], value), name


def test_data_of_another_size_than_the_task_are_refused(tmp_path):
    """Neither padded nor cut."""
    store = tiny.write_tiny(tmp_path, LARGE, 256)
    with pytest.raises(DataError, match=r"have 256 pixels, but those of task .* have 1,024"):
        Trainer(tiny.config(task=LARGE), store)
    with pytest.raises(DataError, match=r"have 1,024 pixels, but those of task .* have 256"):
        Trainer(tiny.config(), tiny.write_tiny(tmp_path / "large", LARGE, 1024))
    texts = dataclasses.replace(store.manifest, max_length=4097)
    with pytest.raises(DataError, match=r"up to 4,097 tokens.*set model\.max_length=4097"):
        resolve(parse_run_config({"task": "text"}), texts)
    with pytest.raises(DataError, match="are single sequences, but task retrieval reads pairs"):
        resolve(parse_run_config({"task": "retrieval"}), texts)
