"""On GPUs: the exchange between the processes of one run, by NCCL; one GPU can do without peers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmx.runs.layout import DEV_LOSS, GRADIENT_NORM, NUM_WORKERS, TRAIN_LOSS
from tests.gpu.nccl_process import CHANGES, STEPS
from tests.tiny import TASK, trainer, write_tiny

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, size: int) -> list:
    """What each of `size` processes found, each with a GPU of its own."""
    write_tiny(folder / "data")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.nccl_process", str(folder), str(rank), str(size)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert not any(p.returncode for p in started), errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2])
def test_the_same_result_as_one_process(gpu, tmp_path, tiny_store, size):
    """Losses and gradient norms of a run, and what each exchange gives."""
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs, here is {torch.cuda.device_count()}")
    assert (tmp_path / "data" / TASK).exists() is False
    found = start(tmp_path, size)
    with trainer(tiny_store, **CHANGES) as alone:
        expected = [alone.advance() for _ in range(STEPS)]
    for rank, result in enumerate(found):
        assert result["total"] == [size * (size - 1) / 2, size], "sums of the ranks, and of ones"
        assert result["largest"] == size - 1 and result["leader"] == "of rank 0"
        assert result["copied"] == [0.0, 0.0], "the leader's weights"
        assert result["gradients"] == [None, float(size)], "a weight of nobody keeps none"
        assert result["device"] == rank
        for mine, theirs in zip(result["reports"], expected, strict=True):
            for key in (TRAIN_LOSS, DEV_LOSS, GRADIENT_NORM):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4)
            assert mine[NUM_WORKERS] == size
