"""Out of memory: the same step again in smaller pieces, with nothing else changed."""

from __future__ import annotations

import pytest
import torch

from dmx.errors import RunFailedError
from dmx.runs.layout import (
    DEV_ACCURACY,
    DEV_LOSS,
    FAILURE,
    GRADIENT_NORM,
    MICRO_BATCH_SIZE,
    TRAIN_LOSS,
)
from dmx.schema import to_dict
from dmx.training.checkpoint import open_checkpoint
from dmx.training.job import Job
from dmx.training.passes import AdaptiveMicroBatch, is_out_of_memory, smaller
from dmx.training.runner import Runner
from dmx.training.trainer import Trainer
from tests.tiny import config, one_sentence, trainer
from tests.training.test_trainer import RANDOM, facts, same_state

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ERRORS = [CUDA, MemoryError()]


@pytest.mark.parametrize(
    ("size", "batch_size", "expected"),
    [(32, 32, 16), (16, 32, 8), (6, 6, 3), (3, 6, 1), (1, 6, None), (3, 8, 1), (5, 25, 1)],
)
def test_smaller_pieces_divide_the_batch(size, batch_size, expected):
    assert smaller(size, batch_size) == expected


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**58)  # torch's own words on a CPU
    assert is_out_of_memory(real.value)
    assert all(map(is_out_of_memory, ERRORS))
    outside = (
        "CUDA error: out of memory\nCUDA kernel errors might be ...",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    )
    assert all(is_out_of_memory(RuntimeError(text)) for text in outside)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_another_error_is_not_tried_again():
    calls = []

    def attempt(size):
        calls.append(size)
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        AdaptiveMicroBatch(8, 8, "training", torch.device("cpu")).run(attempt)
    assert calls == [8]


DIRECTIONS = "encoder.layers.0.attention.mixer.projection"


class Memory:
    """A device that holds so many sequences: the forward pass, or the backward, fails above."""

    def __init__(self, made: Trainer, training: int, evaluation: int, error=CUDA, backward=False):
        self.failures: list[tuple[str, int]] = []
        forward = made.passes._run

        def run(ids, other):
            kind = "training" if made.model.training else "evaluation"
            count = ids.shape[0]
            if count > (training if kind == "training" else evaluation):
                self.failures.append((kind, count))
                if not (backward and kind == "training"):
                    torch.rand(3)  # the generator has moved when memory runs out
                    raise error
                logits = forward(ids, other)
                logits.register_hook(self._fail(error))
                return logits
            return forward(ids, other)

        made.passes._run = run

    @staticmethod
    def _fail(error):
        def hook(_):
            raise error

        return hook


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python"])
def test_equals_a_run_with_small_pieces_from_the_start(tiny_store, backward, error):
    """Bit for bit: weights, moments, random state and every metric; dropout is on."""
    with trainer(tiny_store, **RANDOM, train__micro_batch_size=2) as small:
        expected = [facts(small.advance()) for _ in range(2)]
    with trainer(tiny_store, **RANDOM) as made:
        memory = Memory(made, training=3, evaluation=99, error=error, backward=backward)
        found = [facts(made.advance()) for _ in range(2)]
    assert memory.failures == [("training", 8), ("training", 4)], "once, in the first step"
    assert found == expected
    assert [r[MICRO_BATCH_SIZE] for r in found] == [2, 2]
    assert same_state(made.model.state_dict(), small.model.state_dict())
    states = made.state(), small.state()
    assert [s.pop("micro_batch_limit") for s in states] == [2, None]
    assert same_state(*states)


def test_a_step_that_is_done_again_redraws_once(tiny_store):
    """Performer's directions belong to the step, not to its passes, of which two are in vain."""
    performer = {"name": "performer", "num_features": 8, "redraw_every_steps": 3}
    with trainer(tiny_store, attention=performer, train__micro_batch_size=2) as small:
        expected = [facts(small.advance()) for _ in range(3)]
    with trainer(tiny_store, attention=performer) as made:
        fresh = made.model.state_dict()[DIRECTIONS].clone()
        memory = Memory(made, training=3, evaluation=99)
        found = [facts(made.advance()) for _ in range(3)]
    assert memory.failures == [("training", 8), ("training", 4)]
    assert found == expected
    assert same_state(made.model.state_dict(), small.model.state_dict())
    assert not torch.equal(made.model.state_dict()[DIRECTIONS], fresh)


def test_in_the_middle_of_a_run(tiny_store):
    """Steps that fitted keep their bits; from the step that did not, the small ones' sums."""
    with trainer(tiny_store, attention__dropout=0.0) as whole:
        first, second = (facts(whole.advance()) for _ in range(2))
    with trainer(tiny_store, attention__dropout=0.0) as made:
        assert facts(made.advance()) == first
        Memory(made, training=4, evaluation=99)
        again = made.advance()
    assert again[MICRO_BATCH_SIZE] == 4
    for key in (TRAIN_LOSS, DEV_LOSS, GRADIENT_NORM):
        assert again[key] == pytest.approx(second[key], rel=1e-5)
    assert again[DEV_ACCURACY] == second[DEV_ACCURACY]


def test_evaluation_shrinks_too(tiny_store):
    with trainer(tiny_store) as made:
        expected = made.evaluate("dev")
        memory = Memory(made, training=99, evaluation=5)
        found = made.evaluate("dev")
        assert memory.failures == [("evaluation", n) for n in (32, 16, 8)]
        assert made.evaluate("dev") == found and len(memory.failures) == 3, "it is remembered"
    assert (found.accuracy, found.num_examples) == (expected.accuracy, 37)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_a_resumed_run_starts_with_what_fitted(tiny_store, tmp_path):
    with trainer(tiny_store, **RANDOM) as made:
        Memory(made, training=2, evaluation=4)
        made.advance()
        made.save(tmp_path / "last")
        expected = facts(made.advance())
    with trainer(tiny_store, **RANDOM) as again:
        again.load(open_checkpoint(tmp_path / "last"))
        memory = Memory(again, training=2, evaluation=4)
        assert facts(again.advance()) == expected
        assert memory.failures == []
        assert again.config.train.micro_batch_size is None, "the settings stay as they were given"


def test_when_not_one_sequence_fits_the_run_fails_with_one_sentence(tiny_store, tmp_path):
    job = Job(
        run_config=to_dict(config()), data_folder=str(tiny_store.folder), folder=str(tmp_path / "r")
    )
    runner = Runner(job)
    Memory(runner.trainer, training=0, evaluation=0)
    report = runner.step()
    assert report["done"] and "one sequence at a time (training)" in report[FAILURE]
    one_sentence(RunFailedError(report[FAILURE]))
    assert runner.step() == report, "and it stays failed"
    assert not (tmp_path / "r" / "last").exists()
    runner.close()
