"""The studies that several tests look at, run once."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.study.helpers import command, run


@dataclass(frozen=True)
class Finished:
    """A study that ran without a break, and what its command said."""

    folder: Path
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Finished:
    """The tiny study, uninterrupted, with two final seeds."""
    place = tmp_path_factory.mktemp("whole")
    done = run(command(place, tiny_root, "--final-seeds", "2"), place)
    assert done.returncode == 0, done.stderr
    return Finished(place / "runs" / "study", done)
