"""A trial's process is used for the next one: nothing of the old one is left. No Ray is needed."""

from __future__ import annotations

import gc
import os
import random
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmx.schema import to_dict
from dmx.study.ray_tune import JOB_KEY, TrialTrainable
from dmx.training.job import Job
from dmx.training.runner import ProcessState, Runner
from tests.tiny import config
from tests.training.test_trainer import RANDOM, facts, same_state


def trial(store: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    job = {
        "run_config": to_dict(config(**{**RANDOM, **changes})),
        "data_folder": str(store.folder),
        "folder": str(folder),
    }
    return {JOB_KEY: job}


def test_switches_and_random_state_of_a_trial_end_with_it(tiny_store, tmp_path):
    """A trial that turns every knob of its process; the next is bit for bit a fresh one."""
    before = ProcessState.now()
    made = TrialTrainable(trial(tiny_store, tmp_path / "a"))
    made.step()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.autograd.set_detect_anomaly(True)
    torch.set_num_threads(2)
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    different = ProcessState.now()
    turned = zip(different.values, before.values, strict=True)
    assert all(now != then for now, then in turned), "each was turned"
    assert made.reset_config(trial(tiny_store, tmp_path / "b"))
    assert ProcessState.now() == before
    assert made.runner and torch.get_num_threads() == 1  # its own, from the first step on
    drawn = random.random(), np.random.random()
    reports = [made.step() for _ in range(4)]
    made.cleanup()

    fresh = Runner(Job(**trial(tiny_store, tmp_path / "c")[JOB_KEY]))
    expected = [fresh.step() for _ in range(4)]
    fresh.close()
    assert list(map(facts, reports)) == list(map(facts, expected))
    b, c = (torch.load(tmp_path / n / "last" / "training_state.pt") for n in "bc")
    assert same_state(b, c), "moments and random state"
    random.seed(0)
    np.random.seed(0)
    assert drawn == (random.random(), np.random.random())


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_memory_threads_and_files_do_not_grow(tiny_store, tmp_path):
    """Twenty trials in one process. Each one's weights and moments take 5 MB: a leak would show."""
    wide = {"model__vocab_size": 25_000, "train__num_steps": 4, "train__eval_every_steps": 4}
    made = TrialTrainable(trial(tiny_store, tmp_path / "0", **wide))
    counts, sizes = [], []
    for number in range(1, 21):
        report = made.step()
        assert report["done"] and report["parameters"] * 12 > 4 * 2**20
        trainer = weakref.ref(made._runner.trainer)
        made.reset_config(trial(tiny_store, tmp_path / str(number), **wide))
        gc.collect()
        assert trainer() is None, "somebody still holds the old trial"
        counts.append((threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))))
        sizes.append(resident_mb())
    made.cleanup()
    assert len(set(counts[2:])) == 1, counts
    assert max(sizes[15:]) - sizes[4] < 25, sizes
