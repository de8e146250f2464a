"""A study over two hosts: the cable of one is cut, its trial goes on on the other, none is lost."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import soak_net
from soak_hosts import hurt
from soak_hosts_ray import RAY, HostStudy, RayHosts, ray_hosts
from soak_net import why_not
from soak_rounds import LIMIT_SECONDS, Round, judge
from soak_study import FIXED, TASK, command, journal, write_data

from dmx.runs.layout import DEV_ACCURACY, DEV_LOSS, NUM_WORKERS, TRAIN_LOSS
from dmx.training.checkpoint import open_checkpoint
from tests.study.helpers import environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=f"no hosts can be made here: {why_not()}"),
]
TRIALS = 6


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[RayHosts]:
    """Two workers and a head; the folder that they share has no locks."""
    folder = tmp_path_factory.mktemp("hosts")
    write_data(folder / "data")
    (folder / "runs").mkdir()
    with ray_hosts(folder, workers=2, quick=True, locks=False) as made:
        yield made


def test_a_host_sees_an_environment_below_tmp(tmp_path, monkeypatch):
    """Its /tmp is its own, but a checkout may lie there; and no program is looked for in PATH."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        program = Path(folder) / "bin" / "program"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\necho seen\n")
        program.chmod(0o755)
        monkeypatch.setattr(soak_net, "SEEN", (*soak_net.SEEN, Path(folder)))
        network = soak_net.Network(tmp_path / "network")
        try:
            host = network.add("alone")
            env = {"PATH": "/usr/bin:/bin"}
            assert host.run([str(program)], env, 60) == "seen\n"
            assert "ray, version" in host.run([RAY, "--version"], env, 60)
        finally:
            network.close()


def test_a_cut_cable_loses_no_trial(hosts):
    """The trial's process comes back when its trial is elsewhere, and may write."""
    folder = hosts.folder
    words = command(folder, "cut", trials=TRIALS, slots=2, address=hosts.address)
    words += ["--node-data", "/mnt/data"]
    study = HostStudy(words, folder / "runs" / "cut", folder / "log", hosts, hosts.head)
    done = Round(0, "head", 2)
    study.start()
    assert study.until(6)
    hurt(study, done, hosts, hosts.head, "zombie", random.Random(0))
    study.until(10**9)
    judge(done, study, TRIALS, folder, folder)
    assert done.sound and done.kills, done
    assert {e["trial"] for e in journal(study.study)} == set(range(TRIALS))


def test_a_run_by_workers_of_two_hosts_is_the_run_of_one(hosts):
    """The hosts' names lead to 127.0.1.1, so gloo must be told where to listen."""
    run = [sys.executable, "-m", "dmx.train", "--attention", "butterfly", "--task", TASK]
    run += ["--data-root", str(hosts.folder / "data"), "--storage", str(hosts.folder / "runs")]
    settings = {**FIXED, "train.num_steps": 8, "attention.dropout": 0.0, "model.dropout": 0.0}
    run += [f"{k}={v}" for k, v in settings.items()]
    two = ["--workers-per-trial", "2", "--threads", "2", "--address", hosts.address]
    hosts.head.run([*run, "--name", "two", *two], hosts.env, LIMIT_SECONDS)
    subprocess.run([*run, "--name", "one"], check=True, capture_output=True, env=environment())
    runs = hosts.folder / "runs"
    one, both = (open_checkpoint(runs / name / "last").metrics for name in ("one", "two"))
    assert both[NUM_WORKERS] == 2
    for name in (TRAIN_LOSS, DEV_LOSS, DEV_ACCURACY):
        assert both[name] == pytest.approx(one[name], rel=1e-5), name
