"""Storage that fails: given up in a sentence, never half-written."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from safetensors.torch import load_file

from dmx.errors import RunFailedError, StorageError
from dmx.storage import files
from dmx.storage.files import persist
from dmx.storage.journal import Claim, Journal, read_journal
from dmx.training.checkpoint import save_checkpoint
from tests.tiny import config, one_sentence


class Clock:
    """Seconds that pass only while someone sleeps."""

    def __init__(self, monkeypatch):
        self.now, self.pauses = 100.0, []
        monkeypatch.setattr(files.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(files.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


def failing(times, number=errno.ENOSPC):
    left = [times]

    def action():
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number))
        return "done"

    return action


@pytest.mark.parametrize("number", sorted(files.STORAGE_ERRNOS))
def test_it_waits_longer_and_longer(monkeypatch, number):
    clock = Clock(monkeypatch)
    assert persist(failing(9, number), "x", seconds=100) == "done"
    assert clock.pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10])


def test_it_gives_up_in_one_sentence_and_exactly_then(monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(StorageError) as caught:
        persist(failing(10**9), "/runs/a", seconds=5)
    assert clock.now == 105.0
    assert isinstance(caught.value, RunFailedError), "exit code 1: not the input's fault"
    said = one_sentence(caught.value)
    assert "/runs/a cannot be written for 5 s (No space left on device)" in said


def test_other_errors_are_not_waited_for(monkeypatch):
    clock = Clock(monkeypatch)
    for error in (OSError(errno.EBADF, "bad"), OSError("without a number"), ValueError("other")):

        def action(error=error):
            raise error

        with pytest.raises(type(error)):
            persist(action, "x", seconds=100)
    assert clock.pauses == []


def test_a_journal_whose_folder_is_away_for_a_while(tmp_path):
    """The open file is gone for good (it is closed here); the folder comes back a moment later."""
    folder, away = tmp_path / "run", tmp_path / "away"
    with Journal(folder / "journal.jsonl", storage_timeout=60) as journal:
        journal.append(event="one")
        journal._file.close()  # as after an unmount
        folder.rename(away)
        timer = threading.Timer(0.3, away.rename, [folder])
        timer.start()
        journal.append(event="two", text="x" * 3000)
        timer.join()
        journal.append(event="three")
    names = [e["event"] for e in read_journal(folder / "journal.jsonl")[0]]
    assert names == ["one", "two", "three"] and not away.exists()


def test_a_journal_does_not_begin_anew_in_an_empty_mount_point(tmp_path):
    folder, away = tmp_path / "run", tmp_path / "away"
    with Journal(folder / "journal.jsonl") as journal:
        journal.append(event="one")
        journal._file.close()
        folder.rename(away)
        folder.mkdir()
        with pytest.raises(StorageError):
            journal.append(event="two")
        assert list(folder.iterdir()) == [], "nothing is hidden below the mount point"
        (folder / "journal.jsonl").touch()
        with pytest.raises(StorageError):
            journal.append(event="two")
        assert journal.events == [{"event": "one"}]
    assert [e["event"] for e in read_journal(away / "journal.jsonl")[0]] == ["one"]


def test_a_claim_knows_its_own_folder(tmp_path):
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    claim = Claim(folder)
    claim.check()
    folder.rename(away)
    with pytest.raises(FileNotFoundError):
        claim.check()
    folder.mkdir()
    other = Claim(folder)
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        claim.check()
    other.release()
    claim.release()


def test_a_full_disk_is_told_from_torchs_riddles(tmp_path):
    """A size limit of the process stands for the disk; the old checkpoint stays whole."""
    import resource

    import torch

    parts = {"training_state": {}, "config": config(), "metrics": {"steps": 1}}
    save_checkpoint(tmp_path / "last", model_state={"w": torch.ones(3)}, **parts)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            save_checkpoint(tmp_path / "last", model_state={"w": torch.zeros(99_999)}, **parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert [p.name for p in tmp_path.iterdir()] == ["last"], "nothing half-written is left"
    assert load_file(tmp_path / "last" / "model.safetensors")["w"].tolist() == [1, 1, 1]
