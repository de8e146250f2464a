"""A study over two hosts: the cable of one is cut, its trial goes on on the other, none is lost."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from soak_hosts import hurt
from soak_hosts_ray import HostStudy, ray_hosts
from soak_net import why_not
from soak_rounds import Round, judge
from soak_study import FIXED, TASK, command, journal, write_data

from dmx import records as keys
from dmx.checkpoint import open_checkpoint
from tests.study.helpers import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=f"no hosts can be made here: {why_not()}"),
]
TRIALS = 6


def test_a_cut_cable_and_a_run_across_hosts(tmp_path):
    """The trial's process comes back and may write, where the shared folder has no locks."""
    write_data(tmp_path / "data")
    (tmp_path / "runs").mkdir()
    with ray_hosts(tmp_path, workers=2, quick=True, locks=False) as hosts:
        words = command(tmp_path, "cut", trials=TRIALS, slots=2, address=hosts.address)
        words += ["--node-data", "/mnt/data"]
        study = HostStudy(words, tmp_path / "runs" / "cut", tmp_path / "log", hosts, hosts.head)
        done = Round(0, "head", 2)
        study.start()
        assert study.until(6)
        hurt(study, done, hosts, hosts.head, "zombie", random.Random(0))
        study.until(10**9)
        judge(done, study, TRIALS, tmp_path, tmp_path)
        assert done.sound and done.restarts == 1, done
        assert {e["trial"] for e in journal(study.study)} == set(range(TRIALS))

        # The hosts' names lead to 127.0.1.1, so gloo must be told where to listen.
        run = [sys.executable, "-m", "dmx.train", "--attention", "butterfly", "--task", TASK]
        run += ["--data-root", str(tmp_path / "data"), "--storage", str(tmp_path / "runs")]
        settings = {**FIXED, "train.num_steps": 8, "attention.dropout": 0.0, "model.dropout": 0.0}
        run += [f"{k}={v}" for k, v in settings.items()]
        two = ["--workers-per-trial", "2", "--threads", "2", "--address", hosts.address]
        hosts.head.run([*run, "--name", "two", *two], hosts.env, 120)
        subprocess.run([*run, "--name", "one"], check=True, capture_output=True, cwd=ROOT)
    one, two_ = (open_checkpoint(tmp_path / "runs" / n / "last").metrics for n in ("one", "two"))
    assert two_[keys.NUM_WORKERS] == 2
    for name in (keys.TRAIN_LOSS, keys.DEV_LOSS, keys.DEV_ACCURACY):
        assert two_[name] == pytest.approx(one[name], rel=1e-5), name
