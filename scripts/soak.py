"""Kill -9 a study's driver, workers and nodes at random moments, continue it, and look for losses.

    python scripts/soak.py --work FOLDER [--rounds 20] [--trials 24] [--seed 0] [--kills 3]
        [--out docs/scaling.md]

The rounds take turns: a private Ray or a cluster of nodes on this machine, one or two trials at
once. One at a time, the study must end bit for bit as one that nobody disturbed; with two, reports
come in any order, and what must hold whatever the order is checked: each trial ended once, Optuna
and the journal agree, ASHA's decisions follow from the journal, disturbed trials trained as in one
undisturbed process, the best checkpoint is what its metrics say. Exit code 0 if nothing was lost.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench_cases import write_section
from soak_cluster import Nodes, children, kill
from soak_study import (
    command,
    differences,
    journal,
    lost_and_twice,
    retrained,
    violations,
    write_data,
)

from dmx import log

logger = logging.getLogger("dmx.soak")
LIMIT_SECONDS = 600.0
KINDS = ["driver", "worker", "node"]
_POLL_SECONDS = 0.02


@dataclass
class Round:
    """What was done to one study, and what came of it."""

    number: int
    place: str
    slots: int
    kills: list[str] = field(default_factory=list)
    restarts: int = 0
    seconds: list[float] = field(default_factory=list)
    disturbed: set[int] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    lost: int = 0
    twice: int = 0


class Study:
    """One study under way: its command, started again and again."""

    def __init__(self, words: list[str], study: Path, log_file: Path) -> None:
        self.words, self.study, self.log_file = words, study, log_file
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the command; a second time with --resume."""
        more = ["--resume"] if (self.study / "settings.json").exists() else []
        with self.log_file.open("ab") as out:
            self.process = subprocess.Popen(
                [*self.words, *more], stdout=out, stderr=out, start_new_session=True
            )

    def ended(self) -> bool:
        """Whether the command has ended by itself."""
        assert self.process is not None
        return self.process.poll() is not None

    def until(self, count: int, trial: int | None = None) -> bool:
        """Wait for `count` events (reports of `trial`, if given); False when it ended first."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            events = journal(self.study)
            if trial is not None:
                events = [e for e in events if e["trial"] == trial]
            if len(events) >= count:
                return True
            if self.ended():
                return False
            if time.monotonic() > deadline:
                raise SystemExit(f"nothing happens any more; see {self.log_file}")
            time.sleep(_POLL_SECONDS)

    def workers(self) -> list[tuple[int, int]]:
        """(trial, process id) of the trials at work, from their claims."""
        ended = {e["trial"] for e in journal(self.study) if e["event"] == "outcome"}
        found = []
        for claim in sorted(self.study.glob("trials/*/claim.json")):
            number = int(claim.parent.name)
            try:
                pid = int(json.loads(claim.read_text())["pid"])
                os.kill(pid, 0)
            except (OSError, ValueError, KeyError):
                continue
            if number not in ended:
                found.append((number, pid))
        return found


def hurt(
    study: Study, done: Round, nodes: Nodes | None, kinds: list[str], draw: random.Random, at: int
) -> None:
    """Kill something, and measure how long nothing is heard afterwards."""
    kind = draw.choice([k for k in kinds if nodes or k != "node"] or ["driver"])
    time.sleep(draw.uniform(0.0, 0.4))
    running = study.workers()
    began = time.monotonic()
    if kind == "driver" or not running:
        assert study.process is not None
        if study.ended():
            return
        kind = "driver"
        study.process.kill()
        study.process.wait()
        done.disturbed.update(number for number, _ in running)
        known = len(journal(study.study))
        began = time.monotonic()
        study.start()
        heard = study.until(known + 1)
    else:
        number, pid = draw.choice(running)
        known = sum(e["trial"] == number for e in journal(study.study))
        hit = nodes.kill_node_of(pid) if kind == "node" and nodes else kill(pid)
        if not hit:
            return
        done.disturbed.add(number)
        heard = study.until(known + 1, number)
    done.kills.append(f"{kind} @{at}")
    if heard:
        done.restarts += 1
        done.seconds.append(time.monotonic() - began)


def run_round(
    folder: Path,
    number: int,
    *,
    trials: int,
    kills: int,
    kinds: list[str],
    total: int,
    seed: int,
    nodes: Nodes | None,
) -> Round:
    """Disturb one study until it ends, and judge it."""
    draw = random.Random(f"{seed}/{number}")
    slots = 1 + number // 2 % 2
    done = Round(number, "cluster" if nodes else "local", slots)
    name = f"round-{number}"
    words = command(
        folder, name, trials=trials, slots=slots, address=nodes.address if nodes else None
    )
    study = Study(words, folder / "runs" / name, folder / f"{name}.log")
    study.start()
    for at in sorted(draw.sample(range(1, int(0.8 * total)), kills)):
        if study.until(at):
            hurt(study, done, nodes, kinds, draw, at)
    study.until(10**9)
    assert study.process is not None
    if study.process.returncode != 0:
        done.faults.append(f"exit code {study.process.returncode}, see {study.log_file}")
        return done
    if "Traceback" in study.log_file.read_text(errors="replace"):
        done.faults.append(f"a traceback in {study.log_file}")
    done.lost, done.twice = lost_and_twice(study.study, trials)
    done.faults += violations(study.study, trials, folder)
    if slots == 1:
        done.faults += differences(study.study, folder / "runs" / "whole")
    for trial in sorted(done.disturbed)[:3]:
        done.faults += retrained(study.study, folder, trial)
    return done


def table(rounds: list[Round], trials: int, events: int, seconds: float) -> str:
    """The table in Markdown, and one sentence."""
    lines = [
        "| round | Ray | at once | killed (after event) | restarts | to first new step, s | lost "
        "| twice | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rounds:
        waits = ", ".join(f"{s:.1f}" for s in r.seconds)
        verdict = "; ".join(r.faults) or ("equal, bit for bit" if r.slots == 1 else "consistent")
        lines.append(
            f"| {r.number} | {r.place} | {r.slots} | {', '.join(r.kills)} | {r.restarts} | {waits} "
            f"| {r.lost} | {r.twice} | {verdict} |"
        )
    good = sum(not (r.faults or r.lost or r.twice) for r in rounds)
    waits = [s for r in rounds for s in r.seconds]
    lines += [
        "",
        f"{good} of {len(rounds)} rounds without loss; {trials} trials and {events} events a "
        f"study, {seconds:.0f} s undisturbed; {sum(len(r.kills) for r in rounds)} kills; from a "
        f"kill to the first new step {statistics.median(waits):.1f} s (median), "
        f"{max(waits):.1f} s (longest); load {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores.",
    ]
    return "\n".join(lines)


def main() -> int:
    """All rounds, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--kills", type=int, default=3, help="a round")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a Markdown file whose section is replaced")
    args = parser.parse_args()
    log.setup()
    folder = args.work.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder / "data")
    whole = folder / "runs" / "whole"
    began = time.monotonic()
    words = command(folder, "whole", trials=args.trials, slots=1, address=None)
    study = Study(words, whole, folder / "whole.log")
    study.start()
    study.until(10**9)
    seconds = time.monotonic() - began
    total = len(journal(whole))
    logger.info("undisturbed: %d events in %.0f s", total, seconds)
    rounds: list[Round] = []
    nodes: Nodes | None = None
    try:
        for number in range(args.first, args.first + args.rounds):
            if number % 2 and nodes is None:
                nodes = Nodes()
            done = run_round(
                folder, number, trials=args.trials, kills=args.kills, kinds=args.kinds, total=total,
                seed=args.seed, nodes=nodes if number % 2 else None,
            )  # fmt: skip
            rounds.append(done)
            logger.info("%s", done)
            text = table(rounds, args.trials, total, seconds)
            if args.out is not None:
                write_section(args.out, "soak", text)
    finally:
        if nodes is not None:
            nodes.close()
        for pid in children(os.getpid())[1:]:
            kill(pid)
    sys.stdout.write(text + "\n")
    return 1 if any(r.faults or r.lost or r.twice for r in rounds) else 0


if __name__ == "__main__":
    sys.exit(main())
