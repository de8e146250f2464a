"""Three processes, whose shares of a batch of 8 differ, compute what one computes alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmx.errors import ConfigError
from dmx.runs.layout import (
    BEST_STEP,
    DEV_ACCURACY,
    DEV_LOSS,
    GRADIENT_NORM,
    MICRO_BATCH_SIZE,
    NUM_WORKERS,
    SAMPLES,
    SAMPLES_PER_SECOND,
    SAMPLES_PER_SECOND_PER_WORKER,
    STEPS,
    TRAIN_ACCURACY,
    TRAIN_LOSS,
)
from dmx.schema import to_dict
from dmx.training.checkpoint import open_checkpoint
from dmx.training.job import Job, Workers, check_batch, check_device, share_out
from dmx.training.runner import Runner
from tests.rank_process import CASES, PLAIN
from tests.tiny import TASK, config, one_sentence, trainer, write_tiny
from tests.training.test_trainer import facts, same_state

SIZE = 3
ROOT = Path(__file__).resolve().parents[2]
NUMBERS = (TRAIN_LOSS, DEV_LOSS, GRADIENT_NORM)
EXACT = (STEPS, SAMPLES, TRAIN_ACCURACY, DEV_ACCURACY, BEST_STEP)


def job(folder: Path, name: str) -> Job:
    data = str(folder / "data" / TASK)
    return Job(run_config=to_dict(config(**PLAIN)), data_folder=data, folder=str(folder / name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What each process found, beside a run that one process began before."""
    place = tmp_path_factory.mktemp("ranks")
    write_tiny(place / "data")
    first = Runner(job(place, "continued"))
    for _ in range(2):
        first.step()
    first.close()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.rank_process", str(place), str(rank), str(SIZE)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(SIZE)
    ]
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert [p.returncode for p in started] == [0, 0, 9], errors
    return place


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


def check_close(reports, expected):
    assert len(reports) == len(expected)
    for mine, alone in zip(reports, expected, strict=True):
        assert {k: mine[k] for k in EXACT} == {k: alone[k] for k in EXACT}
        assert {k: mine[k] for k in NUMBERS} == pytest.approx(
            {k: alone[k] for k in NUMBERS}, rel=1e-5
        )


@pytest.mark.parametrize("name", CASES)
def test_the_same_result_as_one_process(found, tiny_store, name):
    with trainer(tiny_store, **CASES[name]) as alone:
        reports = []
        while not alone.finished:
            reports.append(alone.advance())
        weights = alone.model.state_dict()
    for rank in found:
        check_close(rank[name][0], reports)
        assert all(
            torch.allclose(v, weights[k], atol=1e-5) for k, v in rank[name][1][-1][0].items()
        )
    ends = [rank[name][1][-1][0] for rank in found]
    assert same_state(ends[0], ends[1]) and same_state(ends[0], ends[2]), "equal, bit for bit"


def test_what_is_reported(found):
    for report in found[0]["plain"][0]:
        assert (report[NUM_WORKERS], report[MICRO_BATCH_SIZE]) == (3, 3)
        each = report[SAMPLES_PER_SECOND_PER_WORKER]
        assert each == pytest.approx(report[SAMPLES_PER_SECOND] / 3)
    assert found[0]["bucketed"][0][0][MICRO_BATCH_SIZE] == 2


def test_with_dropout_a_resumed_group_is_bit_equal(found):
    for rank in found:
        whole, again = rank["dropout"], rank["dropout again"]
        assert list(map(facts, again[0])) == list(map(facts, whole[0]))[2:]
        assert same_state(again[1][-1][0], whole[1][-1][0])


def test_a_group_cut_off_after_every_step_is_bit_equal(found):
    for rank in found:
        reports, weights = rank["cut"]
        assert [facts(r) for r in reports] == [
            {**facts(r), "done": r[STEPS] == 8} for r in rank["dropout"][0]
        ]
        assert same_state(weights, rank["dropout"][1][-1][0])


def test_gradients_are_summed_and_unused_weights_have_none(found):
    for rank in found:
        used_once, unused, used_by_all, frozen = rank["gradients"]
        assert torch.equal(used_once, torch.full((2, 2), 5.0))
        assert unused is None and frozen is None
        assert torch.equal(used_by_all, torch.full((2, 2), 111.0))


def test_one_process_out_of_memory_changes_nothing_for_the_rest(found):
    check_close(found[0]["out of memory"], found[0]["plain"][0][:2])
    assert [r[MICRO_BATCH_SIZE] for r in found[0]["out of memory"]] == [1, 1]


def test_one_process_continues_what_three_began(found, folder):
    """Same names of weights, same state: the checkpoints know nothing of the number."""
    one = Runner(job(folder, "begun"))
    repeated = one.step()
    assert facts(repeated) == facts({k: v for k, v in found[0]["begun"][1].items()})
    rest = [one.step() for _ in range(2)]
    one.close()
    assert rest[-1]["done"] and rest[-1][NUM_WORKERS] == 1
    check_close(rest, found[0]["plain"][0][2:])
    assert not any(
        "module." in name for name in open_checkpoint(folder / "begun/last").model_state()
    )


def test_three_continue_what_one_began(found, folder):
    for rank in found:
        repeated, *rest = rank["continued"]
        assert (repeated[STEPS], repeated[NUM_WORKERS]) == (4, 1)
        check_close(rest, rank["plain"][0][2:])
    last = open_checkpoint(folder / "continued" / "last")
    assert last.metrics[STEPS] == 8 and last.metrics[NUM_WORKERS] == 3


def test_ends_that_all_see(found):
    assert [rank["diverged"] for rank in found] == ["the loss is not finite at step 2"] * 3
    for rank in found:
        assert "3 workers cannot share a batch of 2" in one_sentence(ConfigError(rank["too many"]))
    assert [rank["lost"] for rank in found[:2]] == ["noticed"] * 2


def test_sharing_out():
    assert share_out(cpus=8, gpus=0) == Workers(count=1, cpus=8, gpus=0)
    assert share_out(cpus=8, gpus=0.5) == Workers(count=1, cpus=8, gpus=0.5)
    assert share_out(cpus=8, gpus=4) == Workers(count=4, cpus=2, gpus=1)
    assert share_out(cpus=8, gpus=0, workers=2) == Workers(count=2, cpus=4, gpus=0)
    thirds = share_out(cpus=2, gpus=0, workers=3)
    assert 3 * thirds.cpus <= 2 and thirds.cpus == pytest.approx(2 / 3, abs=1e-4)
    check_batch(3, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpus": 1.5}, "--gpus-per-trial is 1.5"),
        ({"gpus": 2, "workers": 3}, "--workers-per-trial is 3, but a trial has 2 GPUs"),
        ({"gpus": 0.5, "workers": 2}, "--workers-per-trial is 2"),
        ({"gpus": 0, "workers": 0}, "--workers-per-trial is 0"),
    ],
)
def test_sharing_out_the_impossible(given, message):
    with pytest.raises(ConfigError, match=message) as error:
        share_out(cpus=4, **given)
    one_sentence(error.value)


def test_device_and_workers_go_together():
    two = Workers(count=2, cpus=1, gpus=0)
    two_gpus = Workers(count=2, cpus=1, gpus=1)
    for device, workers in (("auto", two), ("cpu", two), ("auto", two_gpus), ("cuda", two_gpus)):
        check_device(device, workers)
    with pytest.raises(ConfigError, match="is cuda, but the run has no GPU"):
        check_device("cuda", two)
    with pytest.raises(ConfigError, match="is cpu, but every worker has a GPU"):
        check_device("cpu", two_gpus)
