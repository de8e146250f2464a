"""Kill -9 a study's driver, workers and nodes at random moments, continue it, and look for losses.

    python scripts/soak/soak.py --work FOLDER [--rounds 20] [--trials 24] [--seed 0] [--kills 3]
        [--out docs/scaling.md]

The rounds take turns: a private Ray or a cluster of nodes on this machine, one or two trials at
once. One at a time, the study must end bit for bit as one that nobody disturbed; with two, reports
come in any order, and what must hold whatever the order is checked: each trial ended once, Optuna
and the journal agree, ASHA's decisions follow from the journal, disturbed trials trained as in one
undisturbed process, the best checkpoint is what its metrics say. Exit code 0 if nothing was lost.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from bench_cases import write_section
from soak_cluster import Nodes, children, kill
from soak_rounds import Round, Study, judge, table
from soak_study import command, journal, write_data

from dmx import terminal

logger = logging.getLogger("dmx.soak")
KINDS = ["driver", "worker", "node"]


def hurt(
    study: Study, done: Round, nodes: Nodes | None, kinds: list[str], draw: random.Random, at: int
) -> None:
    """Kill something, and measure how long nothing is heard afterwards."""
    kind = draw.choice([k for k in kinds if nodes or k != "node"] or ["driver"])
    time.sleep(draw.uniform(0.0, 0.4))
    running = study.workers()
    until = time.monotonic() + 10  # between two trials there is none for a moment
    while kind != "driver" and not running and not study.ended() and time.monotonic() < until:
        time.sleep(0.05)
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
    judge(done, study, trials, folder, folder / "runs" / "whole")
    return done


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
    terminal.setup_logging()
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
            size = f"{args.trials} trials and {total} events a study, {seconds:.0f} s undisturbed"
            text = table(rounds, size, "kills", "Ray")
            if args.out is not None:
                write_section(args.out, "soak", text)
    finally:
        if nodes is not None:
            nodes.close()
        for pid in children(os.getpid())[1:]:
            kill(pid)
    sys.stdout.write(text + "\n")
    return 0 if all(r.sound for r in rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
