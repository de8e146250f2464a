"""Freed memory stays with a process that trains on a CPU, and is given back between runs."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest
import torch

from dmx.nn import device
from dmx.nn.device import peak_memory_mb, reset_peak_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")

PROGRAM = """
import resource
from pathlib import Path
import torch
from dmx.nn.device import give_back_memory, keep_freed_memory

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


PEAKS = """
import torch
from dmx.nn.device import give_back_memory, keep_freed_memory
from dmx.nn.device import peak_memory_mb, reset_peak_memory

cpu = torch.device("cpu")
keep_freed_memory()

def trial(megabytes):
    give_back_memory()  # as between two runs of a process
    reset_peak_memory(cpu)
    torch.ones(megabytes * 2**18)
    return peak_memory_mb(cpu)

print(trial(10), trial(500), trial(10))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux forgets a peak")
def test_a_trial_does_not_count_the_peak_of_the_one_before():
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True)
    first, large, again = map(float, done.stdout.split())
    assert 480 < large - first < 500, "490 MiB more"
    assert abs(again - first) < 20


def test_without_a_way_to_forget_the_peak_is_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_PROCESS", tmp_path / "none")
    reset_peak_memory(torch.device("cpu"))
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    assert peak_memory_mb(torch.device("cpu")) == pytest.approx(whole, rel=0.05)
