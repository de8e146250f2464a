"""The version of the sources: a commit, and a digest wherever that does not name them all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dmx import __version__
from dmx.registry import code_version, source_version


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit of a package and a search space."""
    (tmp_path / "dmx").mkdir()
    (tmp_path / "search_spaces").mkdir()
    (tmp_path / "dmx" / "a.py").write_text("one = 1\n")
    (tmp_path / "search_spaces" / "a.yaml").write_text("a: 1\n")
    (tmp_path / ".gitignore").write_text("ignored.py\n__pycache__/\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    return tmp_path


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=True)
    return done.stdout.decode().strip()


def test_a_commit_names_all_of_a_clean_checkout(checkout: Path) -> None:
    (checkout / "dmx" / "__pycache__").mkdir()
    (checkout / "dmx" / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"")
    (checkout / "notes.py").write_text("outside of the package\n")
    assert source_version(checkout) == git(checkout, "rev-parse", "--short", "HEAD")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dmx/new.py", "untracked = 1\n"),
        ("dmx/ignored.py", "untracked, and told to git to be ignored\n"),
        ("dmx/a.py", "one = 2\n"),
        ("search_spaces/a.yaml", "a: 2\n"),
        ("search_spaces/b.yaml", "b: 1\n"),
        ("dmx/a.py", None),
    ],
)
def test_what_the_commit_does_not_name_changes_the_version(
    checkout: Path, name: str, content: str | None
) -> None:
    clean, path = source_version(checkout), checkout / name
    before = path.read_text() if path.exists() else None
    path.unlink() if content is None else path.write_text(content)
    found = source_version(checkout)
    commit, plus, digest = found.partition("+")
    assert (commit, plus, len(digest)) == (clean, "+", 8)
    if content is not None:
        path.write_text(content + "# more\n")
        assert source_version(checkout) not in (found, clean)
    path.unlink() if before is None else path.write_text(before)
    assert source_version(checkout) == clean


def test_an_installed_package_has_its_version_and_a_digest(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "dmx").mkdir(parents=True)
        (tmp_path / name / "dmx" / "a.py").write_text("one = 1\n")
    one, two = (source_version(tmp_path / name) for name in ("one", "two"))
    assert one == two and one.startswith(f"{__version__} (") and len(one) == len(__version__) + 11
    (tmp_path / "two" / "dmx" / "a.py").write_text("one = 2\n")
    assert source_version(tmp_path / "two") != one


def test_the_running_code_is_asked_once() -> None:
    assert code_version() is code_version()
