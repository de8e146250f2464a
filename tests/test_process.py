"""Signals and standard streams of every command: real processes, with no more than they need."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmx import process
from dmx.cli.completion import PARSERS

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60.0
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
IMPORTED = """
import sys, time
print("importing", flush=True)
time.sleep(60)
"""
"""Instead of a package that every command imports: its import takes as long as the test wants."""
WORKS = """
import sys, time
from dmx import process
from dmx.cli import options as cli
def main(argv):
    if "files" in argv:
        process.files_decide()
    print("\\u00b1 0.1", flush=True)
    if "wait" in argv:
        time.sleep(60)
    return 0
cli.run("dmx.works", main)
"""


def environment(*path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ":".join(map(str, (*path, ROOT)))}


@contextlib.contextmanager
def started(words: list[str], *path: Path, **how: object) -> Iterator[subprocess.Popen[str]]:
    """A command that has said one line; it is gone after the block."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *words]
    with subprocess.Popen(command, env=environment(*path), **pipes, **how) as running:  # type: ignore[call-overload]
        try:
            assert running.stdout is not None
            assert running.stdout.readline(), running.stderr.read()
            yield running
        finally:
            running.kill()


def end(running: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, stderr)."""
    _, err = running.communicate(timeout=SECONDS)
    return running.returncode, err


@pytest.fixture
def slow_import(tmp_path: Path) -> Path:
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text(IMPORTED)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("dmx.tune", name) for name in SIGNALS),
        *((c, "SIGINT") for c in PARSERS),
        ("dmx", "SIGINT"),
    ],
)
def test_a_signal_during_the_imports_is_no_traceback(command, name, slow_import):
    with started(["-m", command], slow_import) as running:
        running.send_signal(signal.Signals[name])
        assert end(running) == (130, "\ninterrupted; nothing was started.\n")


@pytest.mark.parametrize("name", SIGNALS)
def test_every_signal_ends_a_command_with_130(name):
    with started(["-c", WORKS, "wait"]) as running:
        running.send_signal(signal.Signals[name])
        assert end(running) == (130, "\ndmx.works: interrupted.\n")


def ignore_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.parametrize("moment", ["imports", "work"])
def test_nohup_is_kept(moment, slow_import):
    words = ["-m", "dmx.tune"] if moment == "imports" else ["-c", WORKS, "wait"]
    path = (slow_import,) if moment == "imports" else ()
    with started(words, *path, preexec_fn=ignore_hangup) as running:
        running.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert running.poll() is None
        running.send_signal(signal.SIGTERM)
        assert end(running)[0] == 130


def sh(line: str, *path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A line of a shell; $PYTHON is this one, $WORKS the command above."""
    return subprocess.run(
        ["sh", "-c", line],
        env={**environment(*path), "PYTHON": sys.executable, "WORKS": WORKS, **env},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


FULL = "standard output cannot be written (No space left on device)"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ('"$PYTHON" -c "$WORKS" > /dev/full', 1, f"dmx.works: {FULL}.\n"),
        ('"$PYTHON" -c "$WORKS" files > /dev/full', 0, f"dmx.works: {FULL}; the files hold "),
        ('"$PYTHON" -c "$WORKS" files > /dev/full 2> /dev/full', 0, ""),
        ('"$PYTHON" -c "$WORKS" files 2>&-', 0, ""),
        ('"$PYTHON" -m dmx > /dev/full', 1, f"dmx: {FULL}.\n"),
        ('"$PYTHON" -m dmx --help > /dev/full', 1, f"dmx: {FULL}.\n"),
        ('"$PYTHON" -m dmx <&- >&-', 0, ""),
        ('"$PYTHON" -m dmx <&- >&- 2>&-', 0, ""),
        ('"$PYTHON" -m dmx nothing 2>&-', 2, ""),
        ('"$PYTHON" -m dmx | true', 0, ""),
    ],
)
def test_streams_that_fail_are_no_traceback(line, code, said):
    done = sh(line)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said), done.stderr


def test_a_file_is_never_standard_output(tmp_path):
    """With 1 closed the next file would get that number, and hold whatever a library prints."""
    words = "listops --num-train 8 --num-dev 3 --num-test 2 --workers 1"
    line = f'cd {tmp_path} && "$PYTHON" -m dmx.data {words} --data-root d <&- >&- 2>&-'
    assert sh(line).returncode == 0
    listed = sh(
        f'cd {tmp_path} && "$PYTHON" -m dmx.data list --verify --data-root d', COLUMNS="140"
    )
    assert listed.returncode == 0 and "listops" in listed.stdout, listed.stdout


def test_a_terminal_without_a_sign_shows_its_number():
    done = sh('"$PYTHON" -c "$WORKS"', PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "\\xb1 0.1\n")


def test_handlers_of_foreign_code_are_gone_afterwards():
    before = {number: signal.getsignal(number) for number in process.SIGNALS}
    with pytest.raises(ValueError, match="its own"), process.own_signals():
        for number in process.SIGNALS:
            signal.signal(number, lambda *_: None)
        raise ValueError("its own")
    assert {number: signal.getsignal(number) for number in process.SIGNALS} == before
