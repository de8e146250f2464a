"""On a GPU: a run learns, goes on exactly, moves between devices, and does not wait in vain."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from dmx.data.batches import make_batch
from dmx.runs.layout import DEV_ACCURACY, DEV_LOSS, LEARNING_RATE, STEPS, TRAIN_LOSS
from dmx.training.checkpoint import open_checkpoint
from tests.tiny import trainer
from tests.training.test_trainer import RANDOM, facts, same_state

LOSSES = (TRAIN_LOSS, DEV_LOSS)
PLAIN = {"attention__dropout": 0.0, "train__precision": "fp32"}
LONG = {"train__num_steps": 60, "train__eval_every_steps": 60}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("execution", ["packed", "dense"])
def test_it_learns(device, tiny_store, execution, precision):
    """As on a CPU, where the same settings pass 90 % in tests/training/test_trainer.py."""
    changes = {"model__execution": execution, "train__precision": precision, **LONG}
    with trainer(tiny_store, train__device=device, **changes) as made:
        before = made.evaluate("dev").loss
        report = made.advance()
        assert made.device.type == device
    assert report[DEV_ACCURACY] > 0.9 and report[TRAIN_LOSS] < 0.693
    assert report[DEV_LOSS] < before


@pytest.mark.parametrize("execution", ["packed", "dense"])
def test_the_losses_are_those_of_a_cpu(device, tiny_store, execution):
    """Eight steps with an evaluation after every second, fp32, no dropout."""
    found = []
    for place in ("cpu", device):
        changes = {**PLAIN, "model__execution": execution, "train__device": place}
        with trainer(tiny_store, **changes) as made:
            reports = [made.advance() for _ in range(4)]
        found.append([r[key] for r in reports for key in LOSSES])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def resumed(store, folder, **changes):
    """(reports, state) of 2N steps, and of N, a checkpoint, another process's noise, and N."""
    with trainer(store, **changes) as whole:
        reports = [whole.advance() for _ in range(4)]
        expected = reports, whole.model.state_dict(), whole.state()
    with trainer(store, **changes) as first:
        before = [first.advance() for _ in range(2)]
        first.save(folder / "last")
        saved = first.model.state_dict(), first.state()
        torch.manual_seed(99)
    with trainer(store, **changes) as second:
        second.load(open_checkpoint(folder / "last"))
        loaded = second.model.state_dict(), second.state()
        assert same_state(loaded[0], saved[0]), "weights come back bit for bit"
        assert same_state(loaded[1], saved[1]), "and moments, schedule and both generators"
        after = [second.advance() for _ in range(2)]
        found = before + after, second.model.state_dict(), second.state()
    return expected, found


@pytest.mark.parametrize("execution", ["packed", "dense"])
def test_n_and_n_is_2n_bit_for_bit_with_deterministic_algorithms(
    device, tiny_store, tmp_path, execution
):
    """Dropout is on. Without the switch sums by atomics differ in their last bits: see below."""
    torch.use_deterministic_algorithms(True)
    try:
        expected, found = resumed(
            tiny_store, tmp_path, train__device=device, model__execution=execution, **RANDOM
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert list(map(facts, found[0])) == list(map(facts, expected[0]))
    assert same_state(found[1], expected[1]) and same_state(found[2], expected[2])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_n_and_n_is_2n_up_to_rounding_by_default(device, tiny_store, tmp_path, precision):
    """The same dropout, order and schedule: other draws would move a loss by percents."""
    changes = {"train__device": device, "train__precision": precision, **RANDOM}
    expected, found = resumed(tiny_store, tmp_path, **changes)
    bound = 1e-4 if precision == "fp32" else 1e-2
    for mine, theirs in zip(found[0], expected[0], strict=True):
        for key in LOSSES:
            assert mine[key] == pytest.approx(theirs[key], rel=bound)
        assert mine[LEARNING_RATE] == theirs[LEARNING_RATE]
    assert torch.equal(found[2]["rng_cpu"], expected[2]["rng_cpu"])
    assert same_state(found[2]["rng_cuda"], expected[2]["rng_cuda"]), "as many draws"


def test_a_checkpoint_moves_between_devices(device, tiny_store, tmp_path):
    """Begun on one, continued on the other: the evaluation of the other, and both learn on."""
    for start, goal in ((device, "cpu"), ("cpu", device)):
        folder = tmp_path / f"from-{start}"
        with trainer(tiny_store, **PLAIN, train__device=start) as first:
            report = first.advance()
            first.save(folder)
        with trainer(tiny_store, **PLAIN, train__device=goal) as second:
            second.load(open_checkpoint(folder))
            assert second.evaluate("dev").loss == pytest.approx(report[DEV_LOSS], rel=1e-5)
            assert second.advance()[STEPS] == 4


@pytest.mark.parametrize("execution", ["dense", "packed"])
def test_the_compile_flag(device, tiny_store, execution):
    """Losses of a compiled run against the plain one's."""
    found = []
    for flag in (False, True):
        changes = {**PLAIN, "model__execution": execution, "train__compile": flag}
        with trainer(tiny_store, train__device=device, **changes) as made:
            found.append([made.advance()[key] for _ in range(2) for key in LOSSES[:1]])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_batches_come_from_pinned_memory_and_are_not_written_over(gpu, tiny_store):
    """Copies stand behind a busy GPU while the next batches are read; what arrives is the data."""
    with trainer(tiny_store, train__device="cuda") as made:
        assert made.batches._read(0).input_ids.is_pinned()
        order, length = made.batches._order, made.length
        torch.cuda._sleep(500_000_000)  # some 0.3 s, in which the host is far ahead
        got = [made.batches(step) for step in range(40)]
        split = tiny_store.split("train")
        for step, batch in enumerate(got):
            expected = make_batch(split, np.asarray(order(step)), length)
            assert torch.equal(batch.input_ids.cpu(), expected.input_ids), step
            assert torch.equal(batch.labels.cpu(), expected.labels), step


def test_a_dense_step_never_waits_for_the_gpu(gpu, tiny_store):
    with trainer(tiny_store, train__device="cuda", model__execution="dense", **RANDOM) as made:
        batch = made.batches(0)
        made.train_step(batch)  # cuBLAS and the optimizer's state are made here
        torch.cuda.set_sync_debug_mode("error")
        try:
            made.train_step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_packed_step_waits_only_where_tokens_are_counted(gpu, tiny_store):
    """Twice the layers, as many waits: tests/nn/test_pretend_cuda.py has counted them."""
    waits = []
    for layers in (2, 4):
        changes = {"train__device": "cuda", "model__execution": "packed", **RANDOM}
        with trainer(tiny_store, model__num_layers=layers, **changes) as made:
            batch = made.batches(0)
            made.train_step(batch)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")  # pytest's own shows a line's first one only
                    made.train_step(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            waits.append(sum("synchroniz" in str(w.message) for w in seen))
    assert 0 < waits[0] == waits[1]
