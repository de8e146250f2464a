"""README's commands: what they run, in which environment, and that no test hangs for ever."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HANGS = """
import threading
import pytest

@pytest.mark.timeout(0.5)
def test_hangs():
    threading.Event().wait()

def test_after():
    pass
"""


def recipe(target: str) -> str:
    """The commands of a target."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert found, target
    return found[1].strip()


def test_all_tests_are_the_quick_ones_and_the_slow_ones():
    assert recipe("test") == recipe("test-all") + ' -m "not slow"'


def test_ci_types_readmes_commands_and_brings_nothing_along(tmp_path):
    """An activated environment, a PYTHONPATH or Ray's own variables would hide what is missing."""
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$@"\nenv\n')
    make.chmod(0o755)
    active = tmp_path / "active"
    env = {"HOME": "/h", "PIP_CERT": "c", "VIRTUAL_ENV": str(active), "PYTHONPATH": "p"}
    env |= {"RAY_ADDRESS": "auto", "PATH": f"{active}/bin:{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([ROOT / ".ci" / "run"], env=env, capture_output=True, text=True)
    command, *lines = done.stdout.splitlines()
    assert command == "lint test-all"
    for word in command.split():
        assert f"make {word}" in (ROOT / "README.md").read_text(encoding="utf-8"), word
    seen = dict(line.split("=", 1) for line in lines)
    seen = {k: v for k, v in seen.items() if k not in ("PWD", "SHLVL", "_")}  # the shell's own
    assert seen == {"HOME": "/h", "PATH": f"{tmp_path}:/usr/bin:/bin", "PIP_CERT": "c"}


def test_a_test_that_hangs_ends_and_says_where(tmp_path):
    (tmp_path / "test_hangs.py").write_text(HANGS)
    words = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), str(tmp_path)]
    done = subprocess.run(
        [*words, "--rootdir", str(tmp_path), "-p", "no:cacheprovider"],
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "Timeout (>0.5s)" in done.stdout and "threading.Event().wait()" in done.stdout


def test_every_test_has_a_deadline(request, pytestconfig):
    assert float(pytestconfig.getini("timeout")) == 300
    assert float(pytestconfig.getini("faulthandler_timeout")) > 900, "the last resort comes last"


def scripts() -> set[str]:
    """Programs that the environment's packages bring."""
    found = importlib.metadata.entry_points(group="console_scripts")
    return {entry.name for entry in found} - {"dmx"}


@pytest.mark.parametrize("folder", ["dmx", "scripts", "tests"])
def test_programs_of_the_environment_are_not_looked_for_in_path(folder):
    """README's commands do not activate it."""
    named = scripts()
    assert {"ray", "tensorboard"} <= named
    for path in sorted((ROOT / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            first = call.args[0] if isinstance(call, ast.Call) and call.args else None
            if isinstance(first, ast.List) and first.elts:
                program = first.elts[0]
                bare = isinstance(program, ast.Constant) and program.value in named
                assert not bare, f"{path}:{first.lineno} starts {ast.unparse(program)} by its name"
