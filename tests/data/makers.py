"""Shard makers for the tests: workers import them by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from dmx.errors import DataError


def squares(start: int, stop: int, *, offset: int = 0) -> dict[str, np.ndarray]:
    return {"values": np.arange(start, stop) ** 2 + offset}


def noisy(start: int, stop: int) -> dict[str, np.ndarray]:
    print("a library that prints to stdout", flush=True)
    os.write(1, b"even behind Python's back\n")
    return squares(start, stop)


def suicide(start: int, stop: int) -> dict[str, np.ndarray]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def refused(start: int, stop: int) -> dict[str, np.ndarray]:
    raise DataError(f"No room for {start}.")


def broken(start: int, stop: int) -> dict[str, np.ndarray]:
    raise ZeroDivisionError("a bug")


def pids(start: int, stop: int, *, folder: str) -> dict[str, np.ndarray]:
    (Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(0.05)
    return squares(start, stop)
