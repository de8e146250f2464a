"""Commands that are hurt while they run, at moments that the study itself reaches."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.study.helpers import environment, journal

MARK = "DMX_TEST_MARK"
DEADLINE_SECONDS = 240.0
_POLL_SECONDS = 0.02


def wait_until(condition, what: str, process: subprocess.Popen[str] | None = None) -> None:
    """Poll until something is so; it fails when the process ends first, or after minutes."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if process is not None and process.poll() is not None:
            out, err = process.communicate()
            raise AssertionError(f"the command ended before {what}: {out[-2000:]}\n{err[-4000:]}")
        assert time.monotonic() < deadline, f"no {what} within {DEADLINE_SECONDS:.0f} s"
        time.sleep(_POLL_SECONDS)


def runs(pid: int) -> bool:
    """Whether a process is there and not merely unburied."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


class Command:
    """A command in a process group of its own, as a shell starts it, and all it starts itself."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            words,
            cwd=folder,
            env={**environment(), MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def until_events(self, study: Path, count: int) -> None:
        """Wait until the journal holds so many events."""
        wait_until(lambda: len(journal(study)) >= count, f"event {count}", self.process)

    def kill(self) -> None:
        """Kill -9 of the driver, and of nothing else."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL

    def ctrl_c(self) -> None:
        """SIGINT to the whole group, as a terminal sends it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def terminate(self) -> None:
        """SIGTERM to the driver, as a batch system sends it."""
        os.kill(self.process.pid, signal.SIGTERM)

    def end(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) when it has ended by itself."""
        out, err = self.process.communicate(timeout=DEADLINE_SECONDS)
        return self.process.returncode, out, err

    def left(self) -> list[int]:
        """Processes of ours that still run: whoever has our mark in its environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    marked = self.mark.encode() in (entry / "environ").read_bytes()
                    if marked and runs(int(entry.name)):
                        found.append(int(entry.name))
        return found


@contextlib.contextmanager
def started(words: list[str], folder: Path) -> Iterator[Command]:
    """A command; whatever of it is left at the end of the block is killed."""
    command = Command(words, folder)
    try:
        yield command
    finally:
        for pid in command.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if command.process.poll() is None:
            command.process.wait()
