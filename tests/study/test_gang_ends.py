"""Runs by two workers: interrupted, and on a cluster that loses a node."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path

import pytest

from dmx.cluster.gang import Gang
from dmx.runs.layout import NUM_WORKERS, STEPS
from dmx.training.checkpoint import open_checkpoint
from dmx.training.job import Workers
from tests.study.processes import runs, started, wait_until
from tests.study.test_gang import check_close, job, reports_alone, to_end
from tests.tiny import SETTINGS, TASK

pytestmark = pytest.mark.slow


def words(data_root: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "dmx.train", "--attention", "butterfly", "--task", TASK]
    command += ["--data-root", str(data_root), "--name", "run", "--workers-per-trial", "2"]
    settings = {**SETTINGS, "train.num_steps": 2000, "train.eval_every_steps": 100}
    return [*command, *more, *(f"{k}={v}" for k, v in settings.items())]


def test_ctrl_c_leaves_no_process(tiny_root, tmp_path):
    """In the middle of a step; the last line continues."""
    with started(words(tiny_root), tmp_path) as running:
        last = tmp_path / "runs" / "run" / "last" / "metrics.json"
        wait_until(last.exists, "the first checkpoint", running.process)
        running.ctrl_c()
        code, out, err = running.end()
        assert code == 130, err
        assert "Traceback" not in out + err
        assert shlex.split(err.rstrip().splitlines()[-1])[-1] == "--resume"
        wait_until(lambda: not running.left(), "end of all processes")
    assert open_checkpoint(last.parent).metrics[NUM_WORKERS] == 2


def test_a_lost_node_leaves_fewer_workers_and_the_same_result(tiny_store, tmp_path):
    """Two nodes of one CPU; the second dies. What is left does the whole batch."""
    import ray
    from ray.cluster_utils import Cluster
    from soak_cluster import children, kill

    assert not ray.is_initialized()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    other = nodes.add_node(num_cpus=1)
    try:
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        runner = Gang(job(tmp_path / "run", tiny_store, workers=Workers(count=2)), form_seconds=60)

        def lose(report):
            if report[STEPS] == 4:
                # All of it at once, as a machine dies: a worker that outlives its raylet for a
                # moment would finish the next step, or all that are left.
                gone = children(other.all_processes["raylet"][0].process.pid)
                for pid in gone:
                    kill(pid)
                wait_until(lambda: not any(map(runs, gone)), "end of the node")
                nodes.remove_node(other, allow_graceful=False)

        with contextlib.closing(runner):
            reports = to_end(runner, lose)
        check_close(reports, reports_alone(tiny_store, tmp_path / "alone"))
        assert [r[NUM_WORKERS] for r in reports] == [2, 2, 1, 1]
    finally:
        ray.shutdown()
        nodes.shutdown()
