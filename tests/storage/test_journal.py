"""The journal: torn tails, damage, a second process, kill -9 in the middle, a full disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from dmx.errors import StageError, StorageError
from dmx.storage.journal import Journal, decode, encode, read_journal
from tests.tiny import one_sentence

ROOT = Path(__file__).resolve().parents[2]
EVENTS = [{"event": "a", "n": i, "text": 'ü "\n\r\\', "x": [1.5, None]} for i in range(4)]


def write(path: Path, events=EVENTS) -> bytes:
    with Journal(path) as journal:
        for event in events:
            journal.append(**event)
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "journal.jsonl"
    content = write(path)
    assert read_journal(path) == (EVENTS, len(content))
    with Journal(path) as journal:
        assert journal.events == EVENTS
        journal.append(event="b")
    assert read_journal(path)[0] == [*EVENTS, {"event": "b"}]
    assert read_journal(tmp_path / "none.jsonl") == ([], 0)


def test_lines_are_json_with_a_checksum_of_what_stands_before_it(tmp_path):
    line = write(tmp_path / "j").splitlines()[0].decode()
    whole = json.loads(line)
    body = line[: line.index(', "crc"')]
    assert whole.pop("crc") == f"{zlib.crc32(body.encode()):08x}"
    assert whole == EVENTS[0]


def test_every_cut_of_the_last_line_loses_that_line_only(tmp_path):
    content = write(tmp_path / "whole")
    start = content.rindex(b"\n", 0, -1) + 1
    path = tmp_path / "journal.jsonl"
    for cut in range(start, len(content)):
        path.write_bytes(content[:cut])
        with Journal(path) as journal:
            assert journal.events == EVENTS[:-1], cut
            journal.append(event="next")
        assert read_journal(path)[0] == [*EVENTS[:-1], {"event": "next"}]
        assert path.read_bytes()[:start] == content[:start]


@pytest.mark.parametrize("tail", [b"\0" * 40, b"\0" * 40 + b"\n", b"{}\n", b"\xff\n", b"[" * 9000])
def test_a_last_line_of_rubbish_is_dropped(tmp_path, tail):
    path = tmp_path / "journal.jsonl"
    content = write(path)
    path.write_bytes(content + tail)
    with Journal(path) as journal:
        assert journal.events == EVENTS
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [1, 3])
def test_a_damaged_line_before_the_last_is_refused_and_left_alone(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    content = bytearray(write(path))
    place = [i for i, byte in enumerate(content) if byte == ord("\n")][line - 1] - 30
    content[place] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(StageError) as caught:
        Journal(path)
    assert f"{path} line {line} is damaged" in one_sentence(caught.value)
    assert path.read_bytes() == bytes(content)
    with pytest.raises(StageError, match="damaged"):  # and it is not locked for ever
        Journal(path)


def test_every_flipped_bit_is_noticed():
    line = encode(EVENTS[0])
    assert decode(line) == EVENTS[0]
    for place in range(len(line) - 1):
        damaged = bytearray(line)
        damaged[place] ^= 4
        found = decode(bytes(damaged))
        assert found is None, (place, found)


def test_a_second_journal_is_refused_until_the_first_is_closed(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = Journal(path)
    with pytest.raises(StageError) as caught:
        Journal(path)
    assert f"{tmp_path} is in use by another dmx process" in one_sentence(caught.value)
    first.append(event="still mine")
    first.close()
    with Journal(path) as second:
        assert second.events == [{"event": "still mine"}]


WRITER = """
import sys
from pathlib import Path
from dmx.storage.journal import Journal
with Journal(Path(sys.argv[1])) as journal:
    number = len(journal.events)
    while True:
        journal.append(event="report", number=number, text="x" * 5000)
        print(number, flush=True)
        number += 1
"""


def test_kill_9_while_appending_loses_nothing_that_was_acknowledged(tmp_path):
    """Three real processes, killed after 1, 7 and 20 acknowledged events of their own."""
    path = tmp_path / "journal.jsonl"
    acknowledged = -1
    for count in (1, 7, 20):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
        )
        assert process.stdout is not None
        for _ in range(count):
            acknowledged = int(process.stdout.readline())
        with pytest.raises(StageError, match="in use by another dmx process"):
            Journal(path)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        assert process.returncode == -signal.SIGKILL
        acknowledged = max([acknowledged, *map(int, rest[: len(rest)])])
        events, _ = read_journal(path)
        assert [event["number"] for event in events] == list(range(len(events)))
        assert len(events) > acknowledged


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path):
    """A size limit of this process stands for the full disk; the write fails half-way."""
    path = tmp_path / "journal.jsonl"
    content = write(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + 50, hard))
        try:
            with pytest.raises(StorageError) as caught:
                journal.append(event="big", text="x" * 4000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "cannot be written" in one_sentence(caught.value)
        assert journal.events == EVENTS and path.read_bytes() == content
        journal.append(event="room again")
    assert read_journal(path)[0] == [*EVENTS, {"event": "room again"}]
