"""`python -m dmx.tune` from the command to its files, each read back by other means."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.storages.journal import JournalFileBackend
from safetensors.torch import load_file

from dmx.training.checkpoint import open_checkpoint
from dmx.training.trainer import build_model
from tests.study import events
from tests.study.helpers import (
    FIXED,
    MAX_STEPS,
    NUM_TRIALS,
    SEARCHED,
    facts,
    journal,
    rows,
    run,
)
from tests.tiny import LENGTH, TASK, examples

pytestmark = pytest.mark.slow


def independent_accuracy(checkpoint: Path, split: str) -> float:
    """One example at a time, dense execution, from the checkpoint's weights and nothing else."""
    found = open_checkpoint(checkpoint)
    assert found.config.model.num_classes == 2
    model = build_model(found.config)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    model.encoder.packs = False
    model.eval()
    hits = 0
    for ids, label in examples(split):
        row = torch.zeros(1, LENGTH, dtype=torch.long)
        row[0, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            hits += int(model(row).argmax()) == label
    return hits / len(examples(split))


def test_rows_of_trials_csv_are_the_journal(whole):
    table = rows(whole.folder)
    assert [int(row["trial"]) for row in table] == list(range(NUM_TRIALS))
    events_ = journal(whole.folder)
    for row in table:
        number = int(row["trial"])
        reports = [e for e in events_ if e["event"] == "report" and e["trial"] == number]
        (outcome,) = [e for e in events_ if e["event"] == "outcome" and e["trial"] == number]
        steps = [e["step"] for e in reports]
        assert steps == list(range(2, max(steps) + 1, 2))
        assert row["status"] == outcome["status"] in ("COMPLETE", "PRUNED")
        assert (row["status"] == "COMPLETE") == (max(steps) == MAX_STEPS)
        best = max(e["metrics"]["dev_accuracy"] for e in reports)
        assert float(row["best_dev_accuracy"]) == best == outcome["value"]
        for key in ("dev_accuracy", "train_loss", "steps", "learning_rate"):
            assert float(row[key]) == reports[-1]["metrics"][key]
        assert row["data"] == f"{TASK} (tiny)" and row["error"] == ""
        assert (row["model.mlp_dropout"] == "") == (row["attention.inner"] == "softmax")
        assert all(row[name] for name in SEARCHED if name != "model.mlp_dropout")


def test_the_study_file(whole):
    summary = json.loads((whole.folder / "study.json").read_text())
    table = rows(whole.folder)
    assert summary["complete"] is True and summary["num_trials"] == NUM_TRIALS
    assert summary["task"] == TASK and summary["attention"] == "butterfly"
    assert summary["data"] == f"{TASK} (tiny)" and summary["is_sample"] is False
    for status, count in summary["trials"].items():
        assert count == sum(row["status"] == status for row in table)
    best = max(table, key=lambda row: (float(row["best_dev_accuracy"]), -int(row["trial"])))
    assert summary["best"]["trial"] == int(best["trial"])
    assert summary["best"]["dev_accuracy"] == float(best["best_dev_accuracy"])
    assert {k: str(v) for k, v in summary["best"]["params"].items()} == {
        name: best[name] for name in SEARCHED if best[name]
    }
    argv = ["python", "-m", "dmx.tune", "--attention", "butterfly"]
    assert summary["environment"]["argv"][:5] == argv


def test_the_best_checkpoint_is_what_it_is_said_to_be(whole):
    summary = json.loads((whole.folder / "study.json").read_text())
    best = whole.folder / "best"
    found = open_checkpoint(best)
    trial = whole.folder / "trials" / f"{summary['best']['trial']:04d}"
    assert found.metrics["steps"] == summary["best"]["step"]
    assert found.metrics["dev_accuracy"] == summary["best"]["dev_accuracy"]
    for name in ("model.safetensors", "config.yaml", "metrics.json"):
        assert (best / name).read_bytes() == (trial / "best" / name).read_bytes()
    assert independent_accuracy(best, "dev") == summary["best"]["dev_accuracy"]
    assert independent_accuracy(best, "test") == summary["best"]["test_accuracy"]
    for key, value in {**FIXED, **summary["best"]["params"]}.items():
        at = found.config
        *parents, last = key.split(".")
        for parent in parents:
            at = getattr(at, parent)
        at = getattr(at, last)
        assert getattr(at, "name", at) == value, key


def test_final_seeds(whole):
    summary = json.loads((whole.folder / "study.json").read_text())
    finals = summary["final_seeds"]
    config = open_checkpoint(whole.folder / "best").config
    assert finals["seeds"] == [config.train.seed + 1, config.train.seed + 2]
    for seed, accuracy in zip(finals["seeds"], finals["test_accuracies"], strict=True):
        folder = whole.folder / "final" / f"seed-{seed}" / "best"
        assert independent_accuracy(folder, "test") == accuracy
        assert open_checkpoint(folder).config.train.seed == seed
    assert finals["mean"] == statistics.fmean(finals["test_accuracies"])
    assert finals["standard_deviation"] == statistics.stdev(finals["test_accuracies"])


def test_optunas_own_file_opens_in_optuna(whole):
    backend = JournalFileBackend(str(whole.folder / "optuna.journal"))
    study = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(backend))
    states = {t.number: t.state.name for t in study.trials}
    assert states == {int(row["trial"]): row["status"] for row in rows(whole.folder)}
    complete = [r for r in rows(whole.folder) if r["status"] == "COMPLETE"]
    assert study.best_value == max(float(r["best_dev_accuracy"]) for r in complete)


def test_tensorboard_has_every_row_and_column(whole):
    events.check(whole.folder)


def test_what_the_terminal_shows(whole):
    out, err = whole.done.stdout, whole.done.stderr
    summary = json.loads((whole.folder / "study.json").read_text())
    accuracy = summary["best"]["test_accuracy"]
    labels = [label for _, label in examples("test")]
    majority = max(labels.count(0), labels.count(1)) / len(labels)
    assert f"data: {TASK} (tiny)" in out and f"data: {TASK} (tiny)" in err
    assert f"test accuracy {accuracy:.4f} (majority class {majority:.4f}" in out
    assert f"best: trial {summary['best']['trial']}, " in out
    assert "test accuracy over 2 seeds: " in out
    for number in range(NUM_TRIALS):
        assert f"trial {number} starts: " in err
    assert "…" not in out, "nothing of the table is cut"
    assert f"tensorboard --logdir {whole.folder.parent}\n" in out, "in one piece, to be copied"
    assert "Traceback" not in out + err


def test_nothing_of_ray_is_left(whole):
    names = {path.name for path in whole.folder.iterdir()}
    assert names <= {
        *("study.json", "trials.csv", "best", "journal.jsonl", ".journal.jsonl.lock"),
        *("optuna.journal", "trials", "report.html", "final"),
        "records.jsonl",
    }


def test_resuming_a_finished_study_changes_nothing(whole, tmp_path):
    copy = tmp_path / "runs" / "study"
    shutil.copytree(whole.folder, copy)
    before, log = facts(copy), (copy / "journal.jsonl").read_bytes()
    done = run([sys.executable, "-m", "dmx.tune", "--resume", str(copy)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert facts(copy) == before and (copy / "journal.jsonl").read_bytes() == log
    first, again = (
        json.loads((study / "study.json").read_text())["best"] for study in (whole.folder, copy)
    )
    assert first == again
