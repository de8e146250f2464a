"""Cut cables between a study's hosts, and kill whole hosts; continue it, and look for losses.

    python scripts/soak/soak_hosts.py --work FOLDER [--rounds 6] [--trials 12] [--seed 0]
        [--faults 2] [--kinds short long zombie host head head-long desk] [--quick]
        [--out docs/scaling.md]

The hosts are namespaces of this machine (see soak_net.py), so it needs root and iproute2: a head,
two workers of one core and, for `desk`, a host for the driver alone. They share one folder; in odd
rounds each keeps its data on its own disk (--node-data). What must hold is what soak.py checks.

short: a worker's cable is out for 3 s; nothing may happen. long: until its trial goes on
elsewhere. zombie: the same, but the trial's process is frozen, and thawed when its trial
has got further elsewhere; the shared folder has no locks then. host: all of a worker's host dies.
head, head-long: the cable of the head and driver is out for 3 s, or until all workers have given
up. desk: the driver's own host is cut off until its node is given up. Exit code 0 if nothing was
lost, 2 where no hosts can be made.
"""

from __future__ import annotations

import argparse
import logging
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from bench_cases import write_section
from soak_hosts_ray import HostStudy, RayHosts, ray_hosts, wait_until
from soak_net import Host, why_not
from soak_rounds import LIMIT_SECONDS, Round, Study, judge, table
from soak_study import command, journal, write_data

from dmx import terminal

logger = logging.getLogger("dmx.soak")
KINDS = ["short", "long", "zombie", "host", "head", "head-long", "desk"]
SHORT_SECONDS = 3.0


def progress(study: HostStudy, trial: int) -> int:
    """Events of a trial so far."""
    return sum(e["trial"] == trial for e in journal(study.study))


def moved(study: HostStudy, trial: int, claim: dict[str, Any], steps: int) -> bool:
    """Whether a trial has got further in another process, or the study has ended."""
    now = study.claim(trial)
    elsewhere = not now or now["token"] != claim["token"]
    return study.ended() or (elsewhere and progress(study, trial) > steps)


def cut_worker(
    study: HostStudy, hosts: RayHosts, kind: str, trial: int, claim: dict[str, Any]
) -> float:
    """Do something to the host that works on a trial, and make it good; when the trial went on."""
    host = hosts.host_of(claim)
    assert host is not None
    known = progress(study, trial)
    if kind == "host":
        host.die()
        wait_until(lambda: moved(study, trial, claim, known), "move of a trial", LIMIT_SECONDS)
        heard = time.monotonic()
        hosts.replace(host)
        return heard
    if kind == "zombie":
        host.send(claim["pid"], signal.SIGSTOP)
    host.link(False)
    if kind == "short":
        time.sleep(SHORT_SECONDS)  # the fault itself, not a hope
        host.link(True)
        study.until(known + 1, trial)
        return time.monotonic()
    wait_until(lambda: moved(study, trial, claim, known), "move of a trial", LIMIT_SECONDS)
    heard = time.monotonic()
    host.send(claim["pid"], signal.SIGCONT)  # it may write at once, long before its node ends
    host.link(True)
    logger.info("the node on %s ended %.1f s after its return", host.name, hosts.join_again(host))
    return heard


def cut_head(study: HostStudy, hosts: RayHosts, host: Host, kind: str, total: int) -> float:
    """Cut the head, or the driver's own host, and make it good; when the study went on."""
    host.link(False)
    if kind == "head":
        time.sleep(SHORT_SECONDS)
        host.link(True)
    elif kind == "head-long":
        gone = lambda: not any(w.runs("raylet") for w in hosts.workers)  # noqa: E731
        wait_until(gone, "end of the workers' nodes", LIMIT_SECONDS)
        host.link(True)
        for worker in hosts.workers:
            hosts.join_again(worker)
    else:
        gone = lambda: study.ended() or not host.runs("raylet")  # noqa: E731
        wait_until(gone, "end of the driver's node", LIMIT_SECONDS)
        host.link(True)
        wait_until(study.ended, "end of the driver", LIMIT_SECONDS)
        hosts.join_again(host)
        study.start()
    study.until(total + 1)
    return time.monotonic()


def hurt(
    study: HostStudy, done: Round, hosts: RayHosts, driver: Host, kind: str, draw: random.Random
) -> None:
    """One fault, and how long nothing was heard of what it hit."""
    at = len(journal(study.study))
    running = [(n, c) for n, c in study.claims() if hosts.host_of(c)]
    if kind in ("head", "head-long", "desk"):
        done.disturbed.update(n for n, _ in running)
        began = time.monotonic()
        heard = cut_head(study, hosts, driver if kind == "desk" else hosts.head, kind, at)
    elif not running:
        return
    else:
        trial, claim = draw.choice(running)
        done.disturbed.add(trial)
        began = time.monotonic()
        heard = cut_worker(study, hosts, kind, trial, claim)
        now = study.claim(trial)
        if kind == "short" and now and now["token"] != claim["token"]:
            done.faults.append(f"3 s without a network moved trial {trial}")
    done.kills.append(f"{kind} @{at}")
    if not study.ended():
        done.restarts += kind not in ("short", "head")
        done.seconds.append(heard - began)


def run_round(
    folder: Path, number: int, args: argparse.Namespace, total: int, hosts: RayHosts, driver: Host
) -> Round:
    """Disturb one study until it ends, and judge it."""
    draw = random.Random(f"{args.seed}/{number}")
    slots, own = 1 + number // 2 % 2, number % 2
    done = Round(number, f"{driver.name}, {'own disks' if own else 'shared data'}", slots)
    name = f"round-{number}"
    words = command(folder, name, trials=args.trials, slots=slots, address=hosts.address)
    words += ["--node-data", "/mnt/data"] if own else []
    study = HostStudy(words, folder / "runs" / name, folder / f"{name}.log", hosts, driver)
    study.start()
    for at in sorted(draw.sample(range(1, int(0.8 * total)), args.faults)):
        if study.until(at):
            hurt(study, done, hosts, driver, draw.choice(args.kinds), draw)
    study.until(10**9)
    judge(done, study, args.trials, folder, folder / "runs" / "whole")
    return done


def main() -> int:
    """All rounds, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--faults", type=int, default=2, help="a round")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS[:-1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="Ray gives nodes up within seconds")
    parser.add_argument("--out", type=Path, help="a Markdown file whose section is replaced")
    args = parser.parse_args()
    terminal.setup_logging()
    if reason := why_not():
        sys.stderr.write(f"soak_hosts: no hosts can be made here: {reason}.\n")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    folder = args.work.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder / "data")
    began = time.monotonic()
    words = command(folder, "whole", trials=args.trials, slots=1, address=None)
    whole = Study(words, folder / "runs" / "whole", folder / "whole.log")
    whole.start()
    whole.until(10**9)
    seconds = time.monotonic() - began
    total = len(journal(whole.study))
    size = f"{args.trials} trials and {total} events a study, {seconds:.0f} s undisturbed"
    logger.info("%s", size)
    rounds: list[Round] = []
    locks = "zombie" not in args.kinds
    with ray_hosts(folder, workers=2, quick=args.quick, locks=locks) as hosts:
        driver = hosts.head
        if "desk" in args.kinds:
            driver = hosts.add("desk")
            hosts.join(driver, cpus=0)
        for number in range(args.first, args.first + args.rounds):
            rounds.append(run_round(folder, number, args, total, hosts, driver))
            logger.info("%s", rounds[-1])
            text = table(rounds, size, "faults", "driver, data")
            if args.out is not None:
                write_section(args.out, "hosts", text)
    sys.stdout.write(text + "\n")
    return 0 if all(r.sound for r in rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
