"""A built wheel alone is enough: search spaces and curricula come with it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CHECK = """
import sys
from pathlib import Path
import dmx
assert Path(dmx.__file__).is_relative_to(sys.argv[1]), dmx.__file__
from dmx.resources import find_yaml, shipped_names
from dmx.search.space_file import load_space
from dmx.tasks import task_for, task_names
from dmx.attention import ATTENTIONS
for name in shipped_names("search_spaces"):
    assert find_yaml(name, "search_spaces").is_relative_to(sys.argv[1])
    load_space(name, "text", "text").check("text", {})
assert find_yaml("search_spaces/butterfly.yaml", "search_spaces").is_relative_to(sys.argv[1])
print(" ".join(shipped_names("search_spaces")))
print(" ".join(shipped_names("curricula")))
print(len(task_names()), len(ATTENTIONS.names()))
"""


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*.py")}


@pytest.mark.slow
def test_search_spaces_come_with_a_wheel(tmp_path):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed in this environment")
    source = tmp_path / "source"  # setuptools leaves build/ and an egg-info behind
    source.mkdir()
    for name in ("dmx", "search_spaces", "curricula"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", str(tmp_path)], cwd=source, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("dmx-*.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    assert files(unpacked / "dmx") == files(ROOT / "dmx"), "every module is in the wheel"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(unpacked)],
        cwd=elsewhere,
        env={**env, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    spaces, curricula, _ = done.stdout.splitlines()
    assert spaces.split() == sorted(p.stem for p in (ROOT / "search_spaces").glob("*.yaml"))
    assert curricula.split() == sorted(p.stem for p in (ROOT / "curricula").glob("*.yaml"))
