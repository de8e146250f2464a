"""Claims, probes and tests of weights: the small parts that the controller stands on."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dmx.cli.curriculum import continue_command
from dmx.curriculum.backend import SearchView, _measure
from dmx.data.store import Store
from dmx.errors import StageError
from dmx.schema import to_dict
from dmx.storage.journal import Claim, encode, read_claim
from dmx.training.checkpoint import open_checkpoint
from dmx.training.evaluation import EvaluationJob
from dmx.training.job import Job
from dmx.training.runner import Runner
from dmx.training.transfer import POSITION_KEY, tile_positions
from tests import tiny
from tests.tiny import one_sentence


def test_a_search_shows_its_trials_and_the_best_of_all_sessions(tmp_path: Path, caplog) -> None:
    """Lines of the journal as it grows; one that is half written waits for its rest."""

    def report(trial: int, step: int, value: float) -> bytes:
        metrics = {"steps": step, "dev_accuracy": value, "best_dev_accuracy": value}
        told = {"event": "report", "trial": trial, "step": step}
        return encode({**told, "metrics": {**metrics, "train_loss": 0.5}})

    end = {"event": "outcome", "trial": 0, "status": "COMPLETE", "value": 0.9, "error": ""}
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(report(0, 2, 0.9) + encode(end))
    new = report(1, 2, 0.5) + report(1, 4, 0.95)
    with caplog.at_level(logging.INFO, logger="dmx.study"):
        view = SearchView(tmp_path, 3)
        last = encode({**end, "trial": 1, "status": "PRUNED"})
        for part in (new[:-9], new[-9:], last[:-1], last[-1:]):
            with journal.open("ab") as file:
                file.write(part)
            view.show()
    assert caplog.messages == [
        "1 of 3 trials have ended; best dev accuracy so far: 0.9000 (trial 0)",
        "trial 1 step 2: dev accuracy 0.5000, train loss 0.5000",
        "trial 1 step 4: dev accuracy 0.9500, train loss 0.5000  <- best so far",
        "trial 1 was stopped early (best dev accuracy 0.9500, 4 steps)",
    ]
    SearchView(tmp_path / "not there yet", 3).show()


HOLD = """
import sys, time
from pathlib import Path
from dmx.storage.journal import Claim
claim = Claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_has_one_writer_until_it_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(StageError) as error:
        Claim(tmp_path, wait_seconds=0.3)
    assert str(holder.pid) in one_sentence(error.value)
    holder.send_signal(signal.SIGKILL)
    started = time.monotonic()
    claim = Claim(tmp_path, wait_seconds=30)
    assert time.monotonic() - started < 10
    assert read_claim(tmp_path)["pid"] != holder.pid
    holder.wait()
    claim.release()
    Claim(tmp_path, wait_seconds=0).release()


def test_a_runner_claims_its_folder(tmp_path: Path, tiny_store: Store) -> None:
    job = Job(
        run_config=to_dict(tiny.config()),
        data_folder=str(tiny_store.folder),
        folder=str(tmp_path / "run"),
    )
    runner = Runner(job)
    with pytest.raises(StageError):
        Claim(tmp_path / "run", wait_seconds=0)
    runner.close()
    Claim(tmp_path / "run", wait_seconds=0).release()


def test_the_command_to_continue_starts_nothing_over() -> None:
    argv = ["x.yaml", "--from-stage", "b c", "--name", "n", "--fresh", "--from-stage=d"]
    assert continue_command(argv) == "python -m dmx.curriculum x.yaml --name n"


def trained(folder: Path, store: Store) -> Path:
    with tiny.trainer(store, train__num_steps=4) as trainer:
        trainer.advance()
        trainer.save(folder)
    return folder


def test_a_checkpoint_is_measured_on_its_own_data(tmp_path: Path, tiny_store: Store) -> None:
    folder = trained(tmp_path / "best", tiny_store)
    state = open_checkpoint(folder).model_state()
    with tiny.trainer(tiny_store) as trainer:
        trainer.model.load_state_dict(state)
        trainer.model.eval()
        split = tiny_store.split("test")
        hits = 0
        with torch.no_grad():
            for i in range(len(split)):
                ids = torch.from_numpy(split.gather([i], tiny.LENGTH)).long()
                hits += int(trainer.model(ids).argmax()) == int(split.labels[i])
    wanted = EvaluationJob(checkpoint=str(folder), data_folder=str(tiny_store.folder))
    assert _measure(wanted, 1) == hits / len(split)


def test_weights_are_measured_in_a_larger_model(tmp_path: Path, tiny_store: Store) -> None:
    """As between stages: the positions of the picture are enlarged, and nothing is trained."""
    folder = trained(tmp_path / "best", tiny_store)
    store = tiny.write_tiny(tmp_path / "data", "pathfinder32-cl3-d1", 1024)
    larger = tiny.config(task=store.manifest.task)
    wanted = EvaluationJob(
        checkpoint=str(folder), data_folder=str(store.folder), config=to_dict(larger)
    )
    found = _measure(wanted, 1)
    state = open_checkpoint(folder).model_state()
    state[POSITION_KEY] = tile_positions(state[POSITION_KEY], 1024)
    with tiny.trainer(store, task=store.manifest.task) as trainer:
        trainer.model.load_state_dict(state)
        assert trainer.evaluate("test").accuracy == found
    other = to_dict(tiny.config(model__num_layers=2))
    wanted = EvaluationJob(checkpoint=str(folder), data_folder=str(tiny_store.folder), config=other)
    assert _measure(wanted, 1) is None
