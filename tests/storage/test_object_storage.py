"""Folders in object storage: one archive each, whole at every moment, read on any node."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dmx.errors import CheckpointError, ConfigError, StorageError, TakenOverError
from dmx.storage import remote
from dmx.storage.remote import ObjectStorage, join


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
