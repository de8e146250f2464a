"""Fixtures that several folders of tests use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from dmx.data.store import Store
from tests.tiny import write_tiny

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
# A shell's job in the background ignores Ctrl-C, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny tensors; two threads would only wait for each other


SLOW_SECONDS = 900.0  # a study and its fixtures; each wait within has a shorter deadline


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the tiny data set."""
    root = tmp_path_factory.mktemp("data")
    write_tiny(root)
    return root


@pytest.fixture(scope="session")
def tiny_store(tiny_root: Path) -> Store:
    """The tiny data set, open."""
    from dmx.data.store import open_store
    from tests.tiny import TASK

    return open_store(tiny_root / TASK)
