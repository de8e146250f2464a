"""Freed memory stays with a process that trains on a CPU, and is given back between runs."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")

PROGRAM = """
import resource
from pathlib import Path
import torch
from dmx.nn.allocator import give_back_memory, keep_freed_memory

PAGE = resource.getpagesize()
torch.set_num_threads(1)

def pages():  # that the system filled for twenty times 128 MB, as tensors of 16 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [torch.ones(2**22) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

empty = resident()
first = pages()
keep_freed_memory()
second = pages()
kept = resident() - empty
give_back_memory()
print(first, second, kept, resident() - empty)
"""


def test_pages_are_fetched_once_and_given_back():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    first, second, kept, left = map(int, done.stdout.split())
    # The system may hand out its pages in larger pieces, so that only the proportion is certain.
    assert second < first / 10, "twenty times the same memory, or once"
    assert kept > 120 * 2**20, "it stays"
    assert left < 10 * 2**20, "and goes"
