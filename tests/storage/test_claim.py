"""One writer a folder, even where a file server took its lock away while it was cut off."""

from __future__ import annotations

import errno
import fcntl
import os
import socket

import pytest

from dmx.data.store import Store
from dmx.errors import RunFailedError, StageError, TakenOverError
from dmx.runs.layout import FAILURE, RESUMABLE
from dmx.schema import to_dict
from dmx.storage import journal
from dmx.storage.journal import Claim, Journal, read_journal
from dmx.storage.remote import StorageLayout
from dmx.training import checkpoint
from dmx.training.job import Job
from dmx.training.runner import Runner
from tests import tiny
from tests.tiny import one_sentence


@pytest.fixture
def no_locks(monkeypatch):
    """As under Lustre without `-o flock`; and what is left of a lock that a server gave away."""

    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def job(store: Store, folder, **changes) -> Job:
    plain = to_dict(tiny.config())
    return Job(run_config=plain, data_folder=str(store.folder), folder=str(folder), **changes)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_whoever_was_replaced_is_told_by_whom(tmp_path, no_locks):
    first = Claim(tmp_path)
    first.check()
    second = Claim(tmp_path)
    second.check()
    with pytest.raises(TakenOverError) as error:
        first.check()
    assert f"process {os.getpid()} on {socket.gethostname()}" in one_sentence(error.value)
    assert isinstance(error.value, RunFailedError), "exit code 1: nobody's input is at fault"


def test_one_that_is_being_replaced_right_now_stops_as_well(tmp_path, no_locks):
    first = Claim(tmp_path)
    (tmp_path / journal.CLAIM_FILE).write_text("")
    with pytest.raises(TakenOverError, match="another"):
        first.check()


def test_a_failing_storage_is_no_successor(tmp_path):
    held = Claim(tmp_path)
    (tmp_path / journal.CLAIM_FILE).rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        held.check()


def test_a_worker_that_comes_back_writes_nothing(tmp_path, tiny_store, no_locks):
    """Its trial went on elsewhere in the meantime."""
    folder = tmp_path / "run"
    before, after = Runner(job(tiny_store, folder)), Runner(job(tiny_store, folder))
    for _ in range(3):
        assert FAILURE not in after.step()
    whole = files(folder)
    report = before.step()
    assert report[RESUMABLE] and "taken over" in one_sentence(report[FAILURE])
    assert files(folder) == whole, "not even its error"
    assert FAILURE not in after.step()
    before.close()
    after.close()


@pytest.mark.parametrize("written", [1, 2])
def test_a_worker_that_was_cut_off_while_it_wrote(
    tmp_path, tiny_store, no_locks, monkeypatch, written
):
    """In the middle of best/ or of last/: what it was about to replace stays."""
    folder, count, taken = tmp_path / "run", [0], []
    before = Runner(job(tiny_store, folder))
    flush = checkpoint.fsync_path

    def cut_off(path):
        flush(path)
        count[0] += ".new-" in path.name  # a folder that is filled, and not yet in its place
        if count[0] == written and not taken:
            taken.append((Claim(folder), files(folder)))

    monkeypatch.setattr(checkpoint, "fsync_path", cut_off)
    assert "taken over" in before.step()[FAILURE]
    left = {k: v for k, v in files(folder).items() if ".new-" not in str(k)}
    expected = {k: v for k, v in taken[0][1].items() if ".new-" not in str(k)}
    assert left == expected
    before.close()


def test_object_storage_has_one_writer_a_run(tmp_path, tiny_store):
    """Nodes share no disk, so no lock either."""

    def node(name: str) -> Runner:
        places = StorageLayout(run=str(tmp_path / name), run_url=f"file://{tmp_path}/bucket")
        return Runner(job(tiny_store, tmp_path / name / "trials" / "0000", places=places))

    before = node("a")
    assert FAILURE not in before.step()
    after = node("b")
    for _ in range(2):
        assert FAILURE not in after.step()
    whole = files(tmp_path / "bucket")
    report = before.step()
    assert report[RESUMABLE] and "taken over" in one_sentence(report[FAILURE])
    kept = files(tmp_path / "bucket")
    assert {k: kept[k] for k in whole} == whole
    assert FAILURE not in after.step()
    before.close()
    after.close()


def test_a_driver_that_comes_back_leaves_the_journal_alone(tmp_path, no_locks):
    """Its study was continued from another host; it used to cut off what that one had written."""
    path = tmp_path / "journal.jsonl"
    before = Journal(path)
    before.append(event="one")
    with Journal(path) as after:
        after.append(event="two")
        for act in (before.check, lambda: before.append(event="three")):
            with pytest.raises(TakenOverError) as error:
                act()
            one_sentence(error.value)
        after.append(event="four")
    before.close()
    assert [e["event"] for e in read_journal(path)[0]] == ["one", "two", "four"]


def test_a_journal_needs_no_locks_but_heeds_them(tmp_path, monkeypatch):
    with Journal(tmp_path / "journal.jsonl"), pytest.raises(StageError, match="in use"):
        Journal(tmp_path / "journal.jsonl")


def test_whoever_was_given_up_is_not_waited_for(tmp_path, monkeypatch, caplog):
    """It holds the lock: cut off from Ray's network, say, but not from the storage's."""
    monkeypatch.setattr(journal, "TAKE_OVER_SECONDS", 0.2)
    former = Claim(tmp_path)
    with pytest.raises(StageError, match="still written"):
        Claim(tmp_path, wait_seconds=0.0)
    former.check()
    successor = Claim(tmp_path, take_over=True)
    assert f"taken over from process {os.getpid()}" in caplog.text
    successor.check()
    with pytest.raises(TakenOverError):
        former.check()
    former.release()
    successor.check()
    successor.release()
