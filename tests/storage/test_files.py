"""Files that survive a crash: all of the old content, or all of the new."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmx.storage.files import copy_folder, is_there, put_back, write_atomic


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What os.fsync was called on, in order; the names of temporary files end in .partial."""
    found: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        found.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


@pytest.mark.parametrize("content", ["text ä\n", b"\x00bytes"])
def test_the_file_is_synced_and_then_its_folder(tmp_path, synced, content):
    path = tmp_path / "settings.json"
    path.write_text("old")
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    file, folder = synced
    assert file.endswith(".partial") and Path(file).parent == tmp_path
    assert folder == str(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]


KILLED = """
import os, signal, sys
from pathlib import Path
from dmx.storage.files import write_atomic
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
write_atomic(Path(sys.argv[1]), "new" * 10000)
"""


def test_a_killed_writer_leaves_the_old_content(tmp_path):
    path = tmp_path / "study.json"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert done.returncode == -9
    assert path.read_text() == "old"
    write_atomic(path, "new")
    assert path.read_text() == "new"


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "folder", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_copied_folder_is_synced_before_it_counts(tmp_path, synced):
    source, target = tmp_path / "last", tmp_path / "best"
    source.mkdir()
    (source / "model.pt").write_bytes(b"weights")
    copy_folder(source, target)
    new = tmp_path / ".best.new"
    assert synced == [str(new / "model.pt"), str(new), str(tmp_path)]
    assert (target / "model.pt").read_bytes() == b"weights"


def test_a_replacement_that_was_cut_short_is_put_back(tmp_path):
    best, old = tmp_path / "best", tmp_path / ".best.old"
    old.mkdir()
    assert is_there(best)
    put_back(best)
    assert best.is_dir() and not old.exists()
