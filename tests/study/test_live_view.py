"""What a study says on a terminal, in a log, as JSON lines, and quietly; colour and none."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmx.runs.study import Study
from dmx.runs.trial import Trial
from dmx.study import results
from dmx.study.views import JsonView, LiveView, LogView, QuietView, choose_view
from tests.study.helpers import ROOT, command, environment, run

REPORT = {
    "steps": 4,
    "dev_accuracy": 0.5,
    "best_dev_accuracy": 0.625,
    "train_loss": math.nan,
    "samples_per_second": 100.0,
}


def result(number: int, status: Any = "COMPLETE", best: float = 0.625) -> Trial:
    report = {"steps": 4, "best_dev_accuracy": best}
    return Trial(number=number, status=status, curve={4: report})


def speak(view: Any) -> None:
    with view:
        view.started(0, {"optim.learning_rate": 1e-3}, {})
        view.reported(0, REPORT)
        view.ended(result(0))


def choose(output: Any) -> Any:
    return choose_view(output, num_trials=2, max_steps=8, title="t")


def test_a_study_of_failures_says_what_failed_most(capsys: pytest.CaptureFixture[str]) -> None:
    errors = ("the loss is not finite at step 3", "x", "the loss is not finite at step 14")
    found = Study(Path("s"))
    for n, error in enumerate(errors):
        found.by_number[n] = dataclasses.replace(result(n, "FAILED", math.nan), error=error)
    results.show(found, None)  # type: ignore[arg-type]
    told = " ".join(capsys.readouterr().out.split())
    assert told.endswith(
        "All trials failed, 2 of them as trial 0: the loss is not finite at step 3; search smaller "
        "learning rates, or set train.clip_gradient_norm=1.0."
    )


def test_json_lines_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    """NaN is none of JSON: it becomes null."""
    speak(choose("json"))
    out, err = capsys.readouterr()
    events = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert [e["event"] for e in events] == ["started", "reported", "ended"]
    assert events[0]["params"] == {"optim.learning_rate": 1e-3}
    assert events[1]["train_loss"] is None and events[1]["dev_accuracy"] == 0.5
    assert events[2]["status"] == "COMPLETE" and err == ""
    logging.getLogger("dmx").setLevel(logging.INFO)


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    speak(choose("quiet"))
    assert capsys.readouterr() == ("", "")
    logging.getLogger("dmx").setLevel(logging.INFO)


def test_auto_is_plain_where_there_is_no_terminal() -> None:
    assert type(choose("auto")) is LogView
    assert type(choose("live")) is LiveView
    assert type(choose("json")) is JsonView and type(choose("quiet")) is QuietView


def test_the_live_line_by_hand() -> None:
    view = LiveView(4, 8, "t")
    begun = view._started_at
    assert "0/4 ended (none); best none; about ? left" in view.summary(begun)
    view.started(0, {"a.b": 1}, {})
    view.reported(0, REPORT)
    view.ended(result(0))
    view.ended(result(1, "PRUNED"))
    # Two of four in 60 s: as long again.
    text = "2/4 ended (1 complete, 1 pruned); best 0.6250 (trial 0); about 60 s left"
    assert view.summary(begun + 60) == text


def test_the_best_so_far_is_the_studys_and_early_stops_say_why(caplog) -> None:
    """An earlier session found 0.9; it is no new best that this one finds 0.5."""
    earlier = [result(0, best=0.9), result(1, "PRUNED", 0.3), result(2, "RUNNING", math.nan)]
    plain = LogView(4)
    with caplog.at_level(logging.INFO, logger="dmx.study"):
        plain.continues(earlier)
        plain.started(2, {}, {})
        plain.reported(2, REPORT)
        why = "rung 4: 0.5000, and 0.6000 was needed"
        plain.ended(replace(result(2, "PRUNED"), reason=why))
        plain.reported(3, {**REPORT, "dev_accuracy": 0.95})
    said = caplog.messages
    assert said[0] == "2 of 4 trials have ended; best dev accuracy so far: 0.9000 (trial 0)"
    assert said[1].startswith("trial 2 goes on") and "best so far" not in said[2]
    assert said[3].startswith(f"trial 2 was stopped early at {why} (best dev accuracy")
    assert said[4].endswith("<- best so far")

    live = LiveView(4, 8, "t")
    live.continues(earlier)
    assert "2/4 ended (1 complete, 1 pruned); best 0.9000 (trial 0); about ? left" in live.summary(
        live._started_at + 60
    )
    live.started(2, {}, {})
    live.reported(2, REPORT)
    live.ended(result(2))
    # One of this session's in 60 s, and one is left.
    assert live.summary(live._started_at + 60).endswith("best 0.9000 (trial 0); about 60 s left")


SCRIPT = """
from dmx import terminal
from dmx.study.views import choose_view
from tests.study.test_live_view import speak
terminal.setup_logging()
view = choose_view("auto", num_trials=2, max_steps=8, title="a title")
print(type(view).__name__)
speak(view)
import logging; logging.getLogger("dmx").warning("a warning")
"""


def in_a_terminal(**more: str) -> bytes:
    """Everything a real pseudo-terminal gets."""
    main, sub = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=sub,
        stdout=sub,
        stderr=sub,
        env={**environment(), "TERM": "xterm-256color", **more},
        cwd=ROOT,
    )
    os.close(sub)
    parts = []
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux says so at the end
            break
        if not part:
            break
        parts.append(part)
    os.close(main)
    assert process.wait(60) == 0, b"".join(parts)
    return b"".join(parts)


def test_a_terminal_shows_the_live_table_and_obeys_no_color() -> None:
    coloured = in_a_terminal()
    assert b"LiveView" in coloured and b"a title" in coloured
    hues = re.compile(rb"\x1b\[(?:[0-9;]*;)?(?:3[0-7]|38;[0-9;]+|9[0-7])m")
    assert hues.search(coloured), "a warning has a colour"
    plain = in_a_terminal(NO_COLOR="1")
    assert b"LiveView" in plain and b"a warning" in plain
    assert not hues.search(plain)


def test_a_pipe_gets_plain_lines() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, env=environment(), cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"LogView" in done.stdout and b"dev accuracy 0.5000" in done.stderr


@pytest.mark.slow
def test_a_real_study_speaks_json(tmp_path: Path, tiny_root: Path) -> None:
    """Standard output is JSON lines and nothing else."""
    words = command(tmp_path, tiny_root, "--output", "json")
    words[words.index("--num-trials") + 1] = "2"
    words[words.index("--max-steps") + 1] = "4"
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = [e["event"] for e in events]
    assert kinds[0] == "started" and kinds[-1] == "finished"
    assert kinds.count("started") == kinds.count("ended") == 2
    assert events[-1]["best"]["trial"] in (0, 1)
