"""Another search than TPE with ASHA: killed, continued, and the same as if it had not been."""

from __future__ import annotations

import shutil

import pytest

from tests.study.helpers import command, facts, journal, rows, run
from tests.study.processes import started
from tests.study.test_interruptions import timeless

pytestmark = pytest.mark.slow


def test_warm_cmaes_with_hyperband_killed_and_continued(whole, tiny_root, tmp_path):
    """The study that it learnt from is gone when it is continued; it ends as if nothing were."""
    options = ["--sampler", "cmaes", "--scheduler", "hyperband", "--warm-start", "older"]
    for name in ("a", "b"):
        older = tmp_path / name / "runs" / "older"
        older.parent.mkdir(parents=True)
        shutil.copytree(whole.folder, older)
    done = run(command(tmp_path / "a", tiny_root, *options), tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "warm start from 6 trials of older" in done.stderr
    assert "sampler cmaes draws at random, each by itself: attention.block_size," in done.stderr
    first, second = tmp_path / "a" / "runs" / "study", tmp_path / "b" / "runs" / "study"
    with started(command(tmp_path / "b", tiny_root, *options), tmp_path / "b") as running:
        running.until_events(second, len(journal(first)) // 2)
        running.kill()
        shutil.rmtree(tmp_path / "b" / "runs" / "older")
        again = run(command(tmp_path / "b", tiny_root, *options, "--resume"), tmp_path / "b")
    assert again.returncode == 0, again.stderr
    assert facts(second) == facts(first) and timeless(second) == timeless(first)
    assert [int(r["trial"]) for r in rows(second)] == list(range(6))
    # The same trials without the warm start are others: it did inform them.
    assert facts(second) != facts(whole.folder)
    options[-1] = str(first)
    other = run(command(tmp_path / "b", tiny_root, *options, "--resume"), tmp_path / "b")
    assert other.returncode == 2 and "--warm-start" in other.stderr, other.stderr
