"""Folders in object storage: whole versions, found by whoever comes later, on any node."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmx.errors import CheckpointError, ConfigError, StorageError
from dmx.storage import object_storage
from dmx.storage.object_storage import ObjectStorage, join


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
    assert storage.names() == [
        "last.version.json",
        f"last@{version}/metrics.json",
        f"last@{version}/model.pt",
    ]
    storage.pull("last", tmp_path / "there")
    assert contents(tmp_path / "there")["model.pt"] == b"better"


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_push_that_was_cut_short_leaves_the_version_before(
    url, folder, tmp_path, monkeypatch, survivors
):
    """The process is killed after so many of the three writes."""
    storage = ObjectStorage(url)
    storage.push(folder, "last")
    (folder / "model.pt").write_bytes(b"better")
    (folder / "metrics.json").write_text('{"steps": 2}')
    real, written = ObjectStorage.write, []

    def write(self, name, content):
        if len(written) == survivors:
            raise KeyboardInterrupt
        written.append(name)
        real(self, name, content)

    monkeypatch.setattr(ObjectStorage, "write", write)
    with pytest.raises(KeyboardInterrupt):
        storage.push(folder, "last")
    monkeypatch.undo()
    storage.pull("last", tmp_path / "there")
    assert contents(tmp_path / "there") == {"model.pt": b"weights", "metrics.json": b"{}"}


def test_what_rotted_is_refused(url, folder, tmp_path):
    storage = ObjectStorage(url)
    version = storage.push(folder, "last")
    (tmp_path / "bucket" / f"last@{version}" / "model.pt").write_bytes(b"WEIGHTS")
    with pytest.raises(
        CheckpointError, match=r"last@\w+/model.pt is damaged; remove last\.version"
    ):
        storage.pull("last", tmp_path / "there")


@pytest.mark.parametrize(
    "pointer",
    ["", "[]", "{}", '{"version": "../up", "files": {}}', '{"version": "a", "files": []}']
    + [json.dumps({"version": "a", "files": {n: {"sha256": "b"}}}) for n in ("../x", ".x", "a/b")],
)
def test_a_damaged_pointer_writes_nothing(url, folder, tmp_path, pointer):
    storage = ObjectStorage(url)
    storage.push(folder, "last")
    (tmp_path / "bucket" / "last.version.json").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"last\.version\.json is damaged"):
        storage.pull("last", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_store_that_is_away_for_a_while_is_waited_for(url, folder, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(object_storage.time, "sleep", waits.append)
    real, failures = object_storage._write_file, [OSError("away"), OSError("away")]

    def write(path, content):
        if failures:
            raise failures.pop()
        real(path, content)

    monkeypatch.setattr(object_storage, "_write_file", write)
    ObjectStorage(url).write("a", b"1")
    assert waits == [1.0, 4.0]
    assert ObjectStorage(url).read("a") == b"1"


def test_a_store_that_stays_away_is_one_sentence(url, monkeypatch):
    monkeypatch.setattr(object_storage.time, "sleep", lambda _: None)

    def write(path, content):
        raise OSError("no route to host")

    monkeypatch.setattr(object_storage, "_write_file", write)
    with pytest.raises(StorageError, match=r"cannot write a: no route to host\.$"):
        ObjectStorage(url).write("a", b"1")


def test_a_url_that_is_none():
    with pytest.raises(ConfigError, match="nfs://x/y is no storage URL that pyarrow can open"):
        ObjectStorage("nfs://x/y")


def test_join_keeps_the_options():
    assert join("s3://b/runs/?scheme=http", "a/b") == "s3://b/runs/a/b?scheme=http"
    assert join("s3://b", "a") == "s3://b/a"


def test_a_small_object_on_s3_is_one_request():
    one = object_storage._in_one_request
    assert one("s3://b/runs") == "s3://b/runs?allow_delayed_open=true"
    assert one("s3://b?region=x") == "s3://b?region=x&allow_delayed_open=true"
    for kept in ("s3://b?allow_delayed_open=false", "gs://b", "file:///tmp"):
        assert one(kept) == kept
