"""Kill -9 a curriculum at random moments, continue it, and compare with an uninterrupted run.

    python scripts/soak/kill_curriculum.py CURRICULUM --out FOLDER [--data-root PATH] [--kills 5]
        [--seed 0]

Every kill comes a random time after a random kind of journal line, and hits the controller, the
training worker, or both at once. The same command then continues. In the end every promoted
checkpoint (weights, optimizer, random generators) and every reported accuracy must be equal, bit
for bit, to those of a run that nobody disturbed. Exit code 0 if they are, 1 if not.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dmx import terminal
from dmx.runs.curriculum import Curriculum
from dmx.storage.journal import read_journal
from dmx.training.checkpoint import open_checkpoint

logger = logging.getLogger("dmx.kill")
_LIMIT_SECONDS = 1800


def measured(key: object) -> bool:
    """Whether a number measures the machine: times, rates and memory differ from run to run."""
    return any(word in str(key) for word in ("_seconds", "_per_second", "_memory_mb"))


def events(folder: Path) -> list[dict[str, Any]]:
    """The journal so far; a line that is being written does not count."""
    return read_journal(folder / "journal.jsonl")[0]


def worker_pid(folder: Path) -> int | None:
    """The process that trains: the one that claimed an attempt's folder last and still lives."""
    claims = sorted(folder.glob("stages/*/*/claim.json"), key=lambda p: p.stat().st_mtime)
    for claim in reversed(claims):
        try:
            pid = int(json.loads(claim.read_text())["pid"])
            os.kill(pid, 0)
        except (OSError, ValueError, KeyError):
            continue
        return pid
    return None


def start(command: list[str], log_file: Path) -> subprocess.Popen[bytes]:
    """Start the command, its output appended to a file."""
    with log_file.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out)


def disturbed(command: list[str], folder: Path, log_file: Path, kills: int, seed: int) -> None:
    """Run to the end, with `kills` kills on the way."""
    draw = random.Random(seed)
    for number in range(kills):
        process = start(command, log_file)
        before = len(events(folder))
        wanted, delay = draw.randint(1, 4), draw.uniform(0.0, 1.0)
        victim = ["controller", "worker", "both"][(number + seed) % 3]
        deadline = time.monotonic() + _LIMIT_SECONDS
        while len(events(folder)) < before + 1 + wanted and process.poll() is None:
            if time.monotonic() > deadline:
                raise SystemExit(f"nothing happens in {folder}")
            time.sleep(0.02)
        time.sleep(delay)
        last = events(folder)[-1]
        what = f"{last['event']} {last.get('stage', '')} {last.get('step', '')}".strip()
        pid = worker_pid(folder)
        if victim in ("worker", "both") and pid is not None:
            os.kill(pid, signal.SIGKILL)
        if victim in ("controller", "both"):
            process.kill()
            process.wait()
        logger.info("kill %d of %d: %s, %.2f s after '%s'", number + 1, kills, victim, delay, what)
        if victim == "worker":  # the controller starts another one; it goes on until the next kill
            time.sleep(draw.uniform(0.0, 3.0))
            process.kill()
            process.wait()
            logger.info("         and the controller a moment later")
    code = start(command, log_file).wait()
    if code != 0:
        raise SystemExit(f"the command ended with {code}; see {log_file}")


def differences(one: Path, two: Path) -> list[str]:
    """Everything in which two finished runs differ, times and memory apart."""
    first, second = Curriculum.read(one), Curriculum.read(two)
    found = []
    for state in first.stages:
        name, other = state.name, second.stage(state.name)
        if reports(state.attempts) != reports(other.attempts):
            found.append(f"{name}: reports")
        if dict(state.tests) != dict(other.tests):
            found.append(f"{name}: test accuracies")
        if state.promoted is None or other.promoted is None:
            found.append(f"{name}: not promoted in both")
            continue
        a, b = (open_checkpoint(Path(s.checkpoint)) for s in (state, other))
        if not equal(a.model_state(), b.model_state()):
            found.append(f"{name}: weights")
        if not equal(a.training_state(), b.training_state()):
            found.append(f"{name}: training state")
    return found + twice(second)


def reports(attempts: Any) -> list[dict[int, dict[str, Any]]]:
    """Reported numbers by step, without what measures the machine."""
    return [
        {step: {k: v for k, v in r.items() if not measured(k)} for step, r in a.curve.items()}
        for a in attempts
    ]


def equal(a: Any, b: Any) -> bool:
    """Bitwise equality of nested tensors and values; what is measured is skipped."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if not measured(k))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def twice(record: Curriculum) -> list[str]:
    """Stages that were begun again although they had finished."""
    found = [(s.name, [a.number for a in s.attempts]) for s in record.stages]
    return [f"{name}: begun twice" for name, numbers in found if numbers.count(0) > 1]


def main() -> int:
    """Both runs, and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curriculum")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    terminal.setup_logging()
    args.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dmx.curriculum", args.curriculum, "--storage", str(args.out)]
    if args.data_root is not None:
        command += ["--data-root", str(args.data_root)]
    straight, broken = args.out / "straight", args.out / "disturbed"
    disturbed([*command, "--name", "straight"], straight, args.out / "straight.log", 0, 0)
    logger.info("the undisturbed run is done")
    disturbed(
        [*command, "--name", "disturbed"], broken, args.out / "disturbed.log", args.kills, args.seed
    )
    found = differences(straight, broken)
    for difference in found:
        logger.error("different: %s", difference)
    sessions = sum(e["event"] == "session" for e in events(broken))
    logger.info(
        "%d kills, %d sessions, %d reports: %s",
        args.kills,
        sessions,
        sum(e["event"] == "report" for e in events(broken)),
        "different" if found else "equal, bit for bit",
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
