"""Object storage: folders as one archive each, and nodes that meet there and nowhere else."""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dmx.data.store import open_store
from dmx.errors import CheckpointError, ConfigError, DataError, StorageError, TakenOverError
from dmx.schema import to_dict
from dmx.storage import remote
from dmx.storage.remote import ObjectStorage, StorageLayout, copy_store, join
from dmx.training.job import Job
from dmx.training.runner import Runner
from tests import tiny


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/bucket"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "last"
    path.mkdir()
    (path / "model.pt").write_bytes(b"weights")
    (path / "metrics.json").write_text("{}")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_folder_comes_back_as_it_was(url, folder, tmp_path):
    version = ObjectStorage(url).push(folder, "trials/0001/last")
    assert ObjectStorage(url).pull("trials/0001/last", tmp_path / "there") == version
    assert contents(tmp_path / "there") == contents(folder)


def test_an_unknown_folder_is_none(url, tmp_path):
    assert ObjectStorage(url).pull("trials/0001/last", tmp_path / "there") is None
    assert not (tmp_path / "there").exists()


def test_only_the_newest_version_is_kept(url, folder, tmp_path):
    storage = ObjectStorage(url)
    storage.push(folder, "last")
    (folder / "model.pt").write_bytes(b"better")
    version = storage.push(folder, "last")
    assert storage.names("") == ["last.zip"]
    assert storage.version("last") == version
    storage.pull("last", tmp_path / "there")
    assert contents(tmp_path / "there")["model.pt"] == b"better"


def test_the_same_contents_are_stored_once(url, folder, tmp_path):
    storage = ObjectStorage(url)
    version = storage.push(folder, "last")
    before = (tmp_path / "bucket" / "last.zip").stat().st_ino
    assert storage.push(folder, "last") == version
    assert (tmp_path / "bucket" / "last.zip").stat().st_ino == before
    assert storage.pull("last", tmp_path / "there", version) == version
    assert not (tmp_path / "there").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from dmx.storage.remote import ObjectStorage
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
ObjectStorage(sys.argv[1]).push(Path(sys.argv[2]), "last")
"""


def test_a_push_that_was_cut_short_leaves_the_version_before(url, folder, tmp_path):
    storage = ObjectStorage(url)
    storage.push(folder, "last")
    (folder / "model.pt").write_bytes(b"better")
    (folder / "metrics.json").write_text('{"steps": 2}')
    assert subprocess.run([sys.executable, "-c", KILLED, url, str(folder)]).returncode == -9
    storage.pull("last", tmp_path / "there")
    assert contents(tmp_path / "there") == {"model.pt": b"weights", "metrics.json": b"{}"}


def test_a_push_may_be_forbidden_at_the_last_moment(url, folder, tmp_path):
    def taken_over():
        raise TakenOverError("taken over")

    storage = ObjectStorage(url)
    version = storage.push(folder, "last")
    (folder / "model.pt").write_bytes(b"better")
    with pytest.raises(TakenOverError):
        storage.push(folder, "last", taken_over)
    assert storage.version("last") == version


def archive(version: str = "", **files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, content in files.items():
            made.writestr(name, content)
        made.comment = (version or remote._version(files)).encode()
    return buffer.getvalue()


def test_what_rotted_is_refused_and_may_be_replaced(url, folder, tmp_path):
    storage = ObjectStorage(url)
    storage.push(folder, "last")
    whole = (tmp_path / "bucket" / "last.zip").read_bytes()
    rotten = [whole.replace(b"weights", b"WEIGHTS"), whole[:-9], whole[:40], b"", b"no archive"]
    rotten += [archive("a"), archive("b", **{"model.pt": b"weights"})]
    rotten += [archive(**{name: b"x"}) for name in ("../x", ".x", "a/b", "/x")]
    for content in rotten:
        (tmp_path / "bucket" / "last.zip").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"last\.zip is damaged; remove it"):
            storage.pull("last", tmp_path / "there")
        assert not (tmp_path / "there").exists()
    storage.push(folder, "last")
    storage.pull("last", tmp_path / "there")
    assert contents(tmp_path / "there") == contents(folder)


def test_a_store_that_is_away_for_a_while_is_waited_for(url, folder, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    real, failures = remote.write_atomic, [OSError("away"), OSError("away")]

    def write(path, content):
        if failures:
            raise failures.pop()
        real(path, content)

    monkeypatch.setattr(remote, "write_atomic", write)
    ObjectStorage(url).write("a", b"1")
    assert waits == [1.0, 4.0]
    assert ObjectStorage(url).read("a") == b"1"


def test_a_store_that_stays_away_is_one_sentence(url, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)

    def write(path, content):
        raise OSError("no route to host")

    monkeypatch.setattr(remote, "write_atomic", write)
    with pytest.raises(StorageError, match=r"cannot write a: no route to host\.$"):
        ObjectStorage(url).write("a", b"1")


def test_a_url_that_is_none():
    with pytest.raises(ConfigError, match="nfs://x/y is no storage URL that pyarrow can open"):
        ObjectStorage("nfs://x/y")


def test_join_keeps_the_options():
    assert join("s3://b/runs/?scheme=http", "a/b") == "s3://b/runs/a/b?scheme=http"
    assert join("s3://b", "a") == "s3://b/a"


def test_a_small_object_on_s3_is_one_request():
    one = remote._in_one_request
    assert one("s3://b/runs") == "s3://b/runs?allow_delayed_open=true"
    assert one("s3://b?region=x") == "s3://b?region=x&allow_delayed_open=true"
    for kept in ("s3://b?allow_delayed_open=false", "gs://b", "file:///tmp"):
        assert one(kept) == kept


def node(tmp_path: Path, name: str) -> StorageLayout:
    """A node's own disk; the run's path is the same on each, so each lies below its own root."""
    return StorageLayout(run=str(tmp_path / name / "run"), run_url=f"file://{tmp_path}/bucket/run")


def reports(job: Job, count: int) -> list[dict[str, object]]:
    runner = Runner(job)
    found = []
    for _ in range(count):
        found.append(runner.step())
        assert "failure" not in found[-1], found[-1]
        if found[-1]["done"]:
            break
    runner.close()
    return found


def timeless(report: dict[str, object]) -> dict[str, object]:
    measured = ("_seconds", "_per_second", "_mb")
    return {k: v for k, v in report.items() if not any(m in k for m in measured)}


def test_a_trial_continues_on_another_node(tmp_path, tiny_store):
    """Nothing but the URL is shared; the reports are those of an uninterrupted run, bit for bit."""

    def job(places: StorageLayout) -> Job:
        return Job(
            run_config=to_dict(tiny.config()),
            data_folder=str(tiny_store.folder),
            folder=f"{places.run}/trials/0000",
            places=places,
        )

    (tmp_path / "c" / "run" / "trials").mkdir(parents=True)
    whole = reports(Job(**{**vars(job(node(tmp_path, "c"))), "places": StorageLayout()}), 99)
    assert len(whole) >= 3
    first = reports(job(node(tmp_path, "a")), 2)
    second = reports(job(node(tmp_path, "b")), 99)
    assert timeless(second[0]) == timeless(first[-1])  # the last report is repeated
    assert [timeless(r) for r in first + second[1:]] == [timeless(r) for r in whole]


def test_an_older_copy_is_replaced_and_a_current_one_is_kept(tmp_path):
    here, there = node(tmp_path, "a"), node(tmp_path, "b")
    ours, theirs = Path(here.run or "") / "best", Path(there.run or "") / "best"
    ours.mkdir(parents=True)
    (ours / "metrics.json").write_text("1")
    here.push(ours)
    there.pull(theirs)
    assert (theirs / "metrics.json").read_text() == "1"
    (theirs / "metrics.json").write_text("2")
    there.push(theirs)
    here.pull(ours)
    assert (ours / "metrics.json").read_text() == "2"
    before = (ours / "metrics.json").stat().st_ino
    here.pull(ours)
    assert (ours / "metrics.json").stat().st_ino == before


def test_what_lies_outside_the_run_is_left_alone(tmp_path):
    places = node(tmp_path, "a")
    places.pull(tmp_path / "elsewhere")
    places.push(tmp_path / "elsewhere")
    assert list(tmp_path.iterdir()) == []


def test_below(tmp_path):
    places = node(tmp_path, "a")
    inner = places.below(Path(places.run or "") / "stages" / "one")
    assert inner.run_url == f"file://{tmp_path}/bucket/run/stages/one"
    assert places.below(tmp_path) == places


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_data_are_copied_to_the_node_once(tmp_path, tiny_store, scheme):
    source, name = tiny_store.folder.parent, tiny_store.folder.name
    places = StorageLayout(data_source=f"{scheme}{source}", node_data=str(tmp_path / "node"))
    folder = places.data(str(tmp_path / "node" / name))
    assert folder == tmp_path / "node" / name
    copied = open_store(folder, verify=True)
    assert copied.manifest == tiny_store.manifest
    before = (folder / "manifest.json").stat().st_ino
    assert places.data(str(folder)) == folder
    assert (folder / "manifest.json").stat().st_ino == before


def test_new_data_under_the_old_name_replace_the_copy(tmp_path, tiny_store):
    source, name = tiny_store.folder.parent, tiny_store.folder.name
    other = tmp_path / "source" / name
    copy_store(str(source), name, tmp_path / "source")
    manifest = other / "manifest.json"
    copy_store(str(tmp_path / "source"), name, tmp_path / "node")
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    copied = copy_store(str(tmp_path / "source"), name, tmp_path / "node")
    assert (copied / "manifest.json").read_bytes() == manifest.read_bytes()


def test_processes_of_one_node_copy_together(tmp_path, tiny_store):
    source, name = str(tiny_store.folder.parent), tiny_store.folder.name
    context = multiprocessing.get_context("fork")
    arguments = (source, name, tmp_path / "node")
    workers = [context.Process(target=copy_store, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0] * 4
    open_store(tmp_path / "node" / name, verify=True)


def test_data_that_are_not_there(tmp_path):
    for source in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(DataError, match=r"has no prepared data for text; prepare them with"):
            copy_store(source, "text", tmp_path / "node")
    assert not (tmp_path / "node").exists()


def test_places_travel_as_plain_values():
    assert all(isinstance(v, str | None) for v in dataclasses.asdict(StorageLayout()).values())
