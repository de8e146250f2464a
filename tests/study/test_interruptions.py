"""Killed, interrupted, out of time: with --resume the study ends as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys

import pytest

from dmx.training.checkpoint import open_checkpoint
from tests.study import events
from tests.study.helpers import command, environment, facts, journal, rows
from tests.study.processes import started, wait_until

pytestmark = pytest.mark.slow


def timeless(study):
    """The journal's facts in order, without clocks; and each report once."""
    kept = ("event", "trial", "step", "status", "value", "error")
    told = [e for e in journal(study) if e["event"] not in ("settings", "session")]
    found = [{k: e[k] for k in kept if k in e} for e in told]
    reports = [(e["trial"], e["step"]) for e in found if e["event"] == "report"]
    assert len(set(reports)) == len(reports), "a report was recorded twice"
    return found


def check_same(study, whole):
    """Same trials, same values, same decisions, same best weights."""
    assert facts(study) == facts(whole)
    assert timeless(study) == timeless(whole)
    first, second = (json.loads((s / "study.json").read_text())["best"] for s in (whole, study))
    assert first == second
    for name in ("model.safetensors", "config.yaml"):
        assert (study / "best" / name).read_bytes() == (whole / "best" / name).read_bytes()
    open_checkpoint(study / "best").model_state()
    events.check(study)


def again_command(stderr: str) -> list[str]:
    """The last line of a command that was stopped: how to continue."""
    words = shlex.split(stderr.rstrip().splitlines()[-1])
    assert words[:3] == ["python", "-m", "dmx.tune"] and words.count("--resume") == 1, stderr
    return [sys.executable, *words[1:]]


def test_kill_9_of_the_driver_at_three_random_moments(whole, tiny_root, tmp_path):
    study = tmp_path / "runs" / "study"
    total = len(journal(whole.folder))
    moments = sorted(random.Random(20261124).sample(range(1, total - 1), 3))
    words = command(tmp_path, tiny_root)
    with contextlib.ExitStack() as stack:
        killed = []
        for moment in moments:  # each goes on while what was killed before it still falls apart
            running = stack.enter_context(started(words, tmp_path))
            running.until_events(study, moment)
            running.kill()
            assert not (study / "study.json").exists()
            killed.append(running)
            words = command(tmp_path, tiny_root, "--resume")
        code, _, err = stack.enter_context(started(words, tmp_path)).end()
        for running in killed:  # Ray's agents take a minute at times
            wait_until(lambda running=running: not running.left(), "end of the killed cluster")
    assert code == 0, err
    assert "Traceback" not in err
    check_same(study, whole.folder)


def test_terminated_interrupted_out_of_time_and_continued(whole, tiny_root, tmp_path):
    study = tmp_path / "runs" / "study"
    total = len(journal(whole.folder))
    first, second = total // 4, total // 2

    with started(command(tmp_path, tiny_root), tmp_path) as running:
        running.until_events(study, first)
        running.terminate()
        code, out, err = running.end()
        assert code == 130, err
        assert "Traceback" not in out + err
        assert "the study is not complete (" in err
        again = again_command(err)
        wait_until(lambda: not running.left(), "end of the cluster")
    summary = json.loads((study / "study.json").read_text())
    assert summary["complete"] is False
    assert "test_accuracy" not in (summary["best"] or {}), "the best may still change"
    partial = rows(study)
    assert partial == [] or partial[-1]["status"] in ("RUNNING", "COMPLETE", "PRUNED")

    with started(again, tmp_path) as running:  # exactly as it was printed
        running.until_events(study, second)
        running.ctrl_c()
        code, out, err = running.end()
        assert code == 130, err
        assert "Traceback" not in out + err
        assert again_command(err) == again, "--resume is not added twice"

    known = journal(study)
    words = command(tmp_path, tiny_root, "--resume", "--time-budget", "0.5")
    with started(words, tmp_path) as running:
        code, out, err = running.end()
        assert code == 75, err
        assert "Traceback" not in out + err
        assert again_command(err)[3:] == words[3:]
    assert len(known) <= len(journal(study)) < total, "the budget was used up before the end"
    assert journal(study)[: len(known)] == known, "an append-only file"

    with started(words[:-2], tmp_path) as last:
        code, _, err = last.end()
    assert code == 0, err
    check_same(study, whole.folder)


def test_a_closed_terminal_a_stop_while_the_best_is_retrained_and_lost_streams(
    whole, tiny_root, tmp_path
):
    study = tmp_path / "runs" / "study"
    words = command(tmp_path, tiny_root, "--final-seeds", "1")
    with started(words, tmp_path) as running:
        running.until_events(study, len(journal(whole.folder)) // 3)
        os.killpg(running.process.pid, signal.SIGHUP)  # as a terminal that is closed
        code, out, err = running.end()
        assert code == 130, err
        assert "Traceback" not in out + err
        again = again_command(err)
        wait_until(lambda: not running.left(), "end of the cluster")

    with started(again, tmp_path) as running:
        wait_until(lambda: list(study.glob("final/seed-*/*")), "a final run", running.process)
        running.terminate()
        code, out, err = running.end()
        assert code == 130, err
        assert "Traceback" not in out + err
        assert again_command(err) == again
    assert not (study / "study.json").exists() or "final_seeds" not in (
        json.loads((study / "study.json").read_text())
    )

    line = f"{shlex.join(again)} <&- >/dev/full 2>&-"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment(), timeout=240)
    assert done.returncode == 0
    assert len(json.loads((study / "study.json").read_text())["final_seeds"]["seeds"]) == 1
    check_same(study, whole.folder)
