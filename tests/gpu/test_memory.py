"""On a GPU: memory that really runs out, what a closed run leaves, and what a report says of it."""

from __future__ import annotations

import gc

import pytest
import torch

from dmx.errors import RunFailedError
from dmx.runs.layout import (
    DEV_LOSS,
    GRADIENT_NORM,
    MICRO_BATCH_SIZE,
    PARAMETERS,
    PEAK_MEMORY_MB,
    SAMPLES,
    TRAIN_LOSS,
)
from dmx.schema import to_dict
from dmx.training.job import Job
from dmx.training.runner import ProcessState, Runner
from tests.tiny import config, trainer

MB = 2**20
WIDE = {
    "train__device": "cuda",
    "train__precision": "fp32",
    "train__batch_size": 32,
    "train__num_steps": 4,
    "model__execution": "dense",
    "model__num_layers": 4,
    "model__embedding_dim": 256,
    "model__hidden_dim": 1024,
    "attention__dropout": 0.0,
}
"""Dense, so that memory grows with the sequences and nothing else: some 15 MB for each."""


def limit_to(bytes_more: float) -> None:
    """Let torch have so much more than it holds now."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + bytes_more
    torch.cuda.set_per_process_memory_fraction(min(allowed / total, 1.0))


def need(store, size: int) -> float:
    """Bytes that two steps with so many sequences at once take at their peak, model included."""
    with trainer(store, **WIDE, train__micro_batch_size=size) as made:
        made.advance()  # cuBLAS's workspace is there from then on
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    with trainer(store, **WIDE, train__micro_batch_size=size) as made:
        made.advance()
        return torch.cuda.max_memory_reserved() - held


def test_memory_that_runs_out_halves_the_micro_batch_and_nothing_else(gpu, tiny_store):
    """Against a run with as small pieces from the start, which never ran out."""
    whole, quarter = need(tiny_store, 32), need(tiny_store, 8)
    assert whole > 1.5 * quarter, "else the limit would prove nothing"
    limit_to((whole + quarter) / 2)
    with trainer(tiny_store, **WIDE) as made:
        found = [made.advance() for _ in range(2)]
        assert torch.cuda.memory_stats()["num_ooms"] > 0, "it really ran out"
        state = made.state()
    size = found[0][MICRO_BATCH_SIZE]
    assert size < 32 and 32 % size == 0 and state["micro_batch_limit"] == size
    assert found[0][SAMPLES] == 2 * 32, "the batch stays"
    torch.cuda.set_per_process_memory_fraction(1.0)
    with trainer(tiny_store, **WIDE, train__micro_batch_size=size) as small:
        expected = [small.advance() for _ in range(2)]
    for mine, theirs in zip(found, expected, strict=True):
        for key in (TRAIN_LOSS, DEV_LOSS, GRADIENT_NORM):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4)


def test_an_evaluation_shrinks_too(gpu, tiny_store):
    with trainer(tiny_store, **WIDE, train__eval_batch_size=32) as made:
        expected = made.evaluate("dev")
    quarter, held = 0.0, 0.0
    for size in (32, 8):  # the last one is kept
        gc.collect()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        with trainer(tiny_store, **WIDE, train__eval_batch_size=size) as made:
            made.evaluate("dev")
            quarter = torch.cuda.max_memory_reserved() - held
    limit_to(1.2 * quarter)
    with trainer(tiny_store, **WIDE, train__eval_batch_size=32) as made:
        found = made.evaluate("dev")
        assert made.passes.evaluation.limit is not None
    assert (found.accuracy, found.num_examples) == (expected.accuracy, 37)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_not_even_one_sequence_fits(gpu, tiny_store):
    with trainer(tiny_store, **{**WIDE, "model__num_layers": 12}) as made:
        limit_to(1 * MB)
        with pytest.raises(RunFailedError, match="one sequence at a time"):
            made.advance()


def run_once(store, folder) -> dict:
    changes = {**WIDE, "train__eval_every_steps": 4}
    job = Job(
        run_config=to_dict(config(**changes)), data_folder=str(store.folder), folder=str(folder)
    )
    runner = Runner(job)
    try:
        return runner.step()
    finally:
        runner.close()


def test_a_process_that_is_used_again_holds_nothing_of_its_last_run(gpu, tiny_store, tmp_path):
    """As Ray's actors are: close, restore, and the next trial."""
    state = ProcessState.now()
    run_once(tiny_store, tmp_path / "first")  # context, cuBLAS's workspace
    state.restore()
    held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    report = run_once(tiny_store, tmp_path / "second")
    assert report[PEAK_MEMORY_MB] * MB > held[0] + 50 * MB, "there was something to free"
    assert torch.cuda.memory_allocated() <= held[0], "close frees it"
    state.restore()
    assert torch.cuda.memory_reserved() <= held[1], "and restore gives it back to the others"


def test_the_peak_is_that_of_the_steps_since_the_last_report(gpu, tiny_store):
    """What others took between two reports is not the run's; the weights' four copies are."""
    with trainer(tiny_store, **WIDE) as made:
        first = made.advance()
        torch.empty(1024 * MB, dtype=torch.uint8, device=gpu)
        second = made.advance()
        seen = torch.cuda.memory_stats()["allocated_bytes.all.peak"] / MB
    assert second[PEAK_MEMORY_MB] == pytest.approx(seen)
    assert second[PEAK_MEMORY_MB] < first[PEAK_MEMORY_MB] + 100
    assert second[PEAK_MEMORY_MB] * MB > 4 * 4 * second[PARAMETERS]
