"""On a GPU with Ray: how many trials fit, and a study whose trials share the GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("ray", reason="Ray is not installed here")
pytest.importorskip("optuna", reason="Optuna is not installed here")
from dmx.cluster import capacity
from dmx.runs.layout import FAILURE
from dmx.schema import to_dict
from dmx.study.ray_tune import TrialTrainable
from tests.study.helpers import command, rows, run
from tests.study.test_reuse import trial
from tests.tiny import config


def test_a_measured_trial(gpu, tiny_store):
    """Between what torch holds and what there is; a larger one takes more."""
    peaks = []
    for width in (16, 512):
        changed = config(model__embedding_dim=width, model__execution="dense")
        usage = capacity.peak_usage(to_dict(changed), str(tiny_store.folder))
        assert torch.cuda.max_memory_allocated() <= usage.peak < usage.total
        assert usage.total == torch.cuda.mem_get_info()[1]
        peaks.append(usage.peak)
        torch.cuda.reset_peak_memory_stats()
    assert peaks[1] > peaks[0]


def test_a_reused_actor_frees_its_gpu(gpu, tiny_store, tmp_path):
    """Without a cluster: trial after trial, no more memory than after the first."""
    held = []
    wide = {"train__device": "cuda", "model__embedding_dim": 256}
    made = TrialTrainable(trial(tiny_store, tmp_path / "0", **wide))
    for number in range(1, 4):
        assert not made.step().get(FAILURE)
        assert made.reset_config(trial(tiny_store, tmp_path / str(number), **wide))
        held.append(torch.cuda.memory_allocated())
    made.cleanup()
    assert held[0] == held[1] == held[2]


def test_a_study_with_as_many_trials_as_fit(gpu, tiny_root, tmp_path):
    """The command itself: measured, then run, each trial on its part of the GPU."""
    words = command(tmp_path, tiny_root, "--trials-per-gpu", "auto", "--cpus-per-trial", "1")
    done = run([*words, "--num-trials", "4", "--max-concurrent-trials", "4"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trials per GPU" in done.stderr + done.stdout
    table = rows(tmp_path / "runs" / "study")
    assert len(table) == 4 and not any(row["status"] == "failed" for row in table)
