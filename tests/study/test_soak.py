"""soak.py and soak_gang.py, shortly: what is killed or stopped loses and leaves nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.study.helpers import ROOT, environment

SOAK = ROOT / "scripts" / "soak"
pytestmark = pytest.mark.slow


def test_two_rounds_on_a_cluster_and_on_this_machine(tmp_path):
    """Round 5 runs one trial at a time on two nodes, round 6 two at a time in a private Ray, where
    there is no node to kill: the driver is.
    """
    words = [sys.executable, str(SOAK / "soak.py"), "--work", str(tmp_path / "w")]
    words += ["--first", "5", "--rounds", "2", "--trials", "6", "--kills", "1", "--seed", "1"]
    words += ["--kinds", "node", "--out", str(tmp_path / "table.md")]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    text = (tmp_path / "table.md").read_text()
    first, second = (line for line in text.splitlines() if line.startswith(("| 5", "| 6")))
    assert "| cluster | 1 |" in first and "node @" in first and "equal, bit for bit" in first
    assert "| local | 2 |" in second and "driver @" in second and "consistent" in second
    assert "2 of 2 rounds without loss; 6 trials" in text


def test_stops_of_a_gang_at_random_moments(tmp_path):
    """Each moment once; the room is back within 10 s, nothing is reserved."""
    words = [sys.executable, str(SOAK / "soak_gang.py"), "--work", str(tmp_path / "w")]
    words += ["--stops", "5", "--seed", "3"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "5 of 5 stops gave all room back" in done.stdout
