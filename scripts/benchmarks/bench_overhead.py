"""Orchestration overhead of a study of trivial trials: wall and CPU seconds per trial.

Runs studies of growing size in one local Ray and prints, for each, what a trial costs beyond the
time that its own process is busy with it (building, training, evaluating, saving). CPU seconds are
those of all processes of the study, so they hardly depend on what else the machine does; wall
seconds do. The start of the first worker processes is shown by itself.

    python scripts/benchmarks/bench_overhead.py [--num-trials 20 100 1000] [--out docs/scaling.md]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "soak"))

from bench_cases import write_section
from soak_cluster import children
from soak_study import FIXED, SPACE, TASK, write_data

from dmx.cluster.capacity import check_request
from dmx.cluster.connection import connect
from dmx.data.store import open_store
from dmx.runs.layout import PROCESS_SECONDS
from dmx.runs.trial import Trial
from dmx.search.space import load_space
from dmx.study.study import StudyConfig, train_trials
from dmx.study.views import TensorBoardView

STEPS = 4
_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> dict[tuple[str, int], float]:
    """CPU seconds so far of this process ("driver"), of trials' processes, and of Ray's own."""
    found = {}
    for pid in children(os.getpid()):
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        kind = "driver" if pid == os.getpid() else "workers" if name.startswith(b"ray::") else "ray"
        found[kind, pid] = (int(fields[11]) + int(fields[12])) / _TICK
    return found


def used(kind: str, first: Mapping[Any, float], last: Mapping[Any, float]) -> float:
    """CPU seconds between two looks, of the processes that are there at the second."""
    return sum(
        seconds - first.get((k, pid), 0.0) for (k, pid), seconds in last.items() if k == kind
    )


class Clock:
    """When the first report came and when the last trial ended, and what had been used by then."""

    def __init__(self, num_trials: int) -> None:
        self.left = num_trials
        self.first: tuple[float, dict[tuple[str, int], float]] | None = None
        self.last: tuple[float, dict[tuple[str, int], float]] | None = None

    def continues(self, trials: Sequence[Trial]) -> None:
        """Nothing."""

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Nothing."""

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        """From here on the study is under way."""
        if self.first is None:
            self.first = (time.perf_counter(), cpu_seconds())

    def ended(self, result: Trial) -> None:
        """Before the processes go, and their times with them."""
        self.left -= 1
        if not self.left:
            self.last = (time.perf_counter(), cpu_seconds())


def run(root: Path, num_trials: int, slots: int, reuse: bool, sampler: str) -> list[str]:
    """One study; its row of the table."""
    (root / "space.yaml").write_text(SPACE, encoding="utf-8")
    store = open_store(root / "data" / TASK)
    settings = {**FIXED, "train.num_steps": STEPS, "train.eval_every_steps": STEPS}
    config = StudyConfig(
        name=f"n{num_trials}-{reuse}",
        task=TASK,
        space=load_space(str(root / "space.yaml"), TASK),
        overrides=settings,
        num_trials=num_trials,
        max_steps=STEPS,
        grace_steps=STEPS,
        scheduler="none",
        sampler="tpe" if sampler == "tpe" else "random",
        reuse_actors=reuse,
    )
    folder, clock = root / config.name, Clock(num_trials)
    folder.mkdir()
    view = TensorBoardView(folder, {"data": store.manifest.label}, config.space.names())
    began = time.perf_counter()
    result = train_trials(config, store, folder, slots=slots, observers=(view, clock))
    assert result.complete and clock.first is not None and clock.last is not None
    wall, start = clock.last[0] - clock.first[0], clock.first[0] - began
    done = num_trials - slots  # those at work at the first report are not counted
    own = sum(float(t.last_report[PROCESS_SECONDS]) for t in result.trials[slots:])
    looks = clock.first[1], clock.last[1]
    cpu = {k: used(k, *looks) / done for k in ("driver", "ray", "workers")}
    overhead = (wall * slots - own) / done
    return [
        f"{num_trials:,}", "yes" if reuse else "no", f"{start:.1f}", f"{wall / done:.3f}",
        f"{own / done:.3f}", f"{overhead:.3f}", f"{cpu['driver']:.3f}", f"{cpu['ray']:.3f}",
        f"{cpu['workers']:.3f}",
    ]  # fmt: skip


HEAD = (
    "trials", "reuse", "first report after, s", "wall", "own", "overhead, core-s", "CPU driver",
    "CPU Ray", "CPU workers",
)  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-trials", type=int, nargs="+", default=[20, 100, 1000])
    parser.add_argument("--sampler", choices=("tpe", "random"), default="tpe")
    parser.add_argument("--without-reuse", type=int, default=0, metavar="N", help="trials")
    parser.add_argument("--out", type=Path, help="a Markdown file whose section is replaced")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="dmx-overhead-"))
    write_data(root / "data")
    rows = []
    with connect(None) as resources:
        slots = check_request(resources, cpus=1, gpus=0)
        for count in args.num_trials:
            rows.append(run(root, count, slots, True, args.sampler))
        if args.without_reuse:
            rows.append(run(root, args.without_reuse, slots, False, args.sampler))
    shutil.rmtree(root)
    lines = [f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows)]
    lines += [
        "",
        f"Seconds a trial, after the first report; {slots} trials at once on {os.cpu_count()} "
        f"cores, load {os.getloadavg()[1]:.1f}, sampler {args.sampler}, {STEPS} steps a trial.",
    ]
    text = "\n".join(lines)
    if args.out is not None:
        write_section(args.out, "overhead", text)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
