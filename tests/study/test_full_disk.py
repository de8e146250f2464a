"""A disk that is really full, or read-only, under a running command: a tmpfs of a few megabytes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmx.storage.journal import read_journal
from dmx.training.checkpoint import open_checkpoint
from tests.study.helpers import command, journal, run
from tests.study.processes import started, wait_until
from tests.study.test_interruptions import again_command, check_same
from tests.tiny import one_sentence

pytestmark = pytest.mark.slow


def mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own at `runs`, where the tests may mount one."""
    place = tmp_path / "runs"
    place.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)):
        pytest.skip("mounting a disk needs root; see test_failing_storage.py")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=False)


def fill(disk: Path) -> Path:
    """Write until nothing fits."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError as error:
            assert error.strerror == "No space left on device"
    return filler


def test_full_in_the_middle_and_continued_with_room(whole, tiny_root, tmp_path, disk):
    """Journal, storage of Optuna, events and checkpoints share the disk; whichever comes first."""
    study = disk / "study"
    words = command(tmp_path, tiny_root, "--storage-patience", "1")
    with started(words, tmp_path) as running:
        running.until_events(study, len(journal(whole.folder)) // 2)
        filler = fill(disk)
        code, out, err = running.end()
        wait_until(lambda: not running.left(), "end of the cluster")
    assert code == 1, err
    assert "Traceback" not in out + err, err
    sentence = next(line for line in err.splitlines() if "cannot be written for 1 s" in line)
    assert "(No space left on device)" in one_sentence(sentence)
    again = again_command(err)
    known, sound = read_journal(study / "journal.jsonl")
    assert sound == (study / "journal.jsonl").stat().st_size, "nothing torn, not even a last line"
    for last in study.glob("trials/*/last"):
        open_checkpoint(last).training_state()
    filler.unlink()
    with started(again, tmp_path) as running:
        code, _, err = running.end()
    assert code == 0, err
    assert read_journal(study / "journal.jsonl")[0][: len(known)] == known
    check_same(study, whole.folder)


def test_read_only_is_refused_before_anything_starts(tiny_root, tmp_path, disk):
    assert mount("-o", "remount,ro", str(disk))
    done = run(command(tmp_path, tiny_root), tmp_path, timeout=60)
    assert done.returncode == 2
    assert "cannot be written (Read-only file system)" in one_sentence(done.stderr.strip())
    assert list(disk.iterdir()) == []
