"""What all commands share: durations, and hints at what was meant."""

from __future__ import annotations

import argparse

import pytest

from dmx.cli import options as cli


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 90), ("0.5", 0.5), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("2d", 172_800)),
        *(("1.5h", 5400), ("1h 30m", 5400), ("-1", -1), (" 7 ", 7)),
    ],
)
def test_durations(text, seconds):
    assert cli.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10x", "m", "1:30:00", "10 minutes", "h1", "1h30"])
def test_no_duration(text):
    with pytest.raises(argparse.ArgumentTypeError, match="no duration; give seconds, or 90s, 10m"):
        cli.duration(text)
