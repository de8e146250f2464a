"""Stop one run by several workers at random moments; its room must be back within 10 s.

    python scripts/soak/soak_gang.py --work FOLDER [--stops 50] [--seed 0] [--out docs/scaling.md]

One private Ray of two CPUs for all stops, so that what one leaves reserved stops the next. When:
while the workers are started (form), in the middle of a step (step), as a report comes in
(report), after a kill -9 of a worker, while all are started again (again), and while another
actor has the room of one worker (crowded). How: as gang.stop does, or kill -9 of the process
that owns the run. Exit code 0 if the room was always back and no placement group was left.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from bench_cases import write_section
from soak_cluster import children, kill
from soak_study import FIXED, TASK, write_data

from dmx import terminal
from dmx.cluster import connection, gang
from dmx.config import parse_run_config
from dmx.schema import to_dict
from dmx.storage.journal import read_claim
from dmx.training.job import Job, Workers

import ray  # isort: skip
from ray.util.placement_group import placement_group_table  # isort: skip

logger = logging.getLogger("dmx.soak")
CPUS = 2
LIMIT_SECONDS = 10.0
START_SECONDS = 240.0
KINDS = ["form", "step", "report", "again", "crowded"]
HOW = ["stop", "kill -9"]


def left() -> list[str]:
    """What is still occupied."""
    free = ray.available_resources().get("CPU", 0.0)
    groups = [g["state"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    found = [] if free == CPUS else [f"{CPUS - free:g} CPUs"]
    return found + [f"a placement group, {state}" for state in groups]


def processes(title: str) -> list[int]:
    """Ray's processes of this session that run an actor of this class."""
    found = []
    for pid in children(os.getpid()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if words.startswith(f"ray::{title}".encode()):
            found.append(pid)
    return found


def report(run: gang.Running) -> dict[str, Any]:
    """The run's next report."""
    ready = gang.wait_any([run], timeout_seconds=START_SECONDS)
    assert ready, f"no report within {START_SECONDS:.0f} s"
    return ready[0][1]


def to_moment(run: gang.Running, kind: str, draw: random.Random) -> float:
    """Wait for the moment; seconds that were drawn."""
    seconds = draw.uniform(0.0, 6.0 if kind in ("form", "again", "crowded") else 1.0)
    if kind in ("step", "report", "again"):
        report(run)
    if kind == "again":
        leader = int(read_claim(Path(run.job.folder))["pid"])
        kill(draw.choice([leader, *(p for p in processes("GangMember") if p != leader)]))
    if kind != "report":
        time.sleep(seconds)
    return 0.0 if kind == "report" else seconds


def end(run: gang.Running, how: str) -> None:
    """Stop the run's owner."""
    owners = processes("_Actor")
    if how == "kill -9" and owners:
        for pid in owners:
            os.kill(pid, signal.SIGKILL)
    else:
        gang.stop(run)


def stop_once(folder: Path, number: int, draw: random.Random) -> tuple[str, str, float | None]:
    """(moment, how, seconds until the room was back); None where it was not."""
    kind, how = KINDS[number % len(KINDS)], HOW[number // len(KINDS) % len(HOW)]
    settings = {**FIXED, "train.num_steps": 10**6, "task": TASK, "attention": "butterfly"}
    job = Job(
        run_config=to_dict(parse_run_config(settings)),
        data_folder=str(folder / "data" / TASK),
        folder=str(folder / "runs" / f"stop-{number}"),
        workers=Workers(count=2),
        takes_over=True,
    )
    holder = None
    if kind == "crowded":
        holder = ray.remote(num_cpus=1)(Holder).remote()
        ray.get(holder.hold.remote())
    run = gang.start(job)
    try:
        seconds = to_moment(run, kind, draw)
    finally:
        end(run, how)
    if holder is not None:
        ray.kill(holder)
    began = time.monotonic()
    while left() or processes("GangMember"):
        if time.monotonic() - began > LIMIT_SECONDS:
            return f"{kind} +{seconds:.1f} s", how, None
        time.sleep(0.05)
    return f"{kind} +{seconds:.1f} s", how, time.monotonic() - began


class Holder:
    """Has room of its own."""

    def hold(self) -> bool:
        """It has."""
        return True


def table(times: dict[tuple[str, str], list[float]], lost: int) -> str:
    """Markdown."""
    rows = ["| moment | stopped by | stops | median s | longest s |", "|---|---|---|---|---|"]
    for (kind, how), seconds in sorted(times.items()):
        middle, most = statistics.median(seconds), max(seconds)
        rows.append(f"| {kind} | {how} | {len(seconds)} | {middle:.1f} | {most:.1f} |")
    total = sum(map(len, times.values())) + lost
    whole = f"{total - lost} of {total} stops gave all room back within {LIMIT_SECONDS:.0f} s; "
    return "\n".join([*rows, "", whole + "placement groups left: none."])


def main() -> int:
    """All stops, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a Markdown file whose section is replaced")
    args = parser.parse_args()
    terminal.setup_logging()
    folder = args.work.absolute()
    write_data(folder / "data")
    draw = random.Random(args.seed)
    times: dict[tuple[str, str], list[float]] = {}
    lost = 0
    ray.init(
        address="local",
        num_cpus=CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    with connection.connect(None):
        for number in range(args.stops):
            moment, how, seconds = stop_once(folder, number, draw)
            if seconds is None:
                lost += 1
                logger.error("stop %d (%s, %s): left: %s", number, moment, how, left())
                continue
            times.setdefault((moment.split()[0], how), []).append(seconds)
            logger.info("stop %d (%s, %s): room back after %.1f s", number, moment, how, seconds)
    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    ray.shutdown()
    text = table(times, lost)
    if args.out is not None:
        write_section(args.out, "gang", text)
    sys.stdout.write(text + "\n")
    return 1 if lost or groups else 0


if __name__ == "__main__":
    sys.exit(main())
