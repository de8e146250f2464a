"""What a study costs at 1,000 and 10,000 trials, without Ray: storage, sampler, views, restart.

The workers are made up: eight at once, each trial reporting ten times or until ASHA stops it. All
else is the real thing: the ledger with its two files (fsync included), ASHA, TensorBoard files,
trials.csv, the report page, and opening the study again.

    python scripts/benchmarks/bench_scale.py [--trials 1000 10000] [--out docs/scaling.md]
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "soak"))

from bench_cases import peak_mb, write_section
from soak_study import SPACE, TASK

from dmx.format import csv_text
from dmx.runs import layout
from dmx.runs.layout import BEST_DEV_ACCURACY, DEV_ACCURACY, REPORT_KEYS, STEPS, trial_folder
from dmx.runs.study import SamplerKind
from dmx.search.schedulers import Idle, Scheduler
from dmx.search.space import SearchSpace, load_space
from dmx.search.study_log import StudyLog
from dmx.study.study import StudyConfig
from dmx.study.views import TensorBoardView

EVERY, MAX_STEPS, AT_ONCE = 100, 1000, 8


def next_trial(log: StudyLog) -> tuple[int, dict[str, Any]] | None:
    """(number, values) of the next trial, as a study hands it out."""
    segment = Scheduler(log.study_config).next_segment(log)
    if isinstance(segment, Idle):
        return None
    log.in_flight.add(segment.trial)
    return segment.trial, log.start(segment.trial)


def open_ledger(folder: Path, space: SearchSpace, trials: int, sampler: SamplerKind) -> StudyLog:
    """The study's memory."""
    config = StudyConfig(
        name=folder.name,
        task=TASK,
        space=space,
        num_trials=trials,
        max_steps=MAX_STEPS,
        grace_steps=EVERY,
        sampler=sampler,
    )
    return StudyLog(folder, config)


def metrics(point: dict[str, Any], step: int, best: float, draw: random.Random) -> dict[str, Any]:
    """A report with every key that a real one has."""
    far = abs(math.log10(point["optim.learning_rate"]) + 2)
    value = 0.9 - 0.1 * far - point["model.dropout"] + 1e-4 * step + draw.gauss(0, 0.01)
    made: dict[str, Any] = {k: draw.random() for k in REPORT_KEYS}
    made.update({STEPS: step, DEV_ACCURACY: value})
    made[BEST_DEV_ACCURACY] = max(value, best)
    return made


class Times:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}

    def add(self, what: str, began: float) -> None:
        """Since `began`."""
        self.of[what] = self.of.get(what, 0.0) + time.perf_counter() - began


def drive(folder: Path, space: SearchSpace, trials: int, events: bool) -> Times:
    """A whole study with made-up workers."""
    draw, spent = random.Random(0), Times()
    ledger = open_ledger(folder, space, trials, "random")
    scheduler = ledger.study_config.make_scheduler()
    view = TensorBoardView(folder, {"task": TASK}, tuple(space.distributions()))
    running: dict[int, tuple[dict[str, Any], int, float]] = {}
    while True:
        while len(running) < AT_ONCE:
            began = time.perf_counter()
            found = next_trial(ledger)
            spent.add("next trial", began)
            if found is None:
                break
            running[found[0]] = (found[1], 0, -math.inf)
            if events:
                began = time.perf_counter()
                view.started(found[0], found[1], {})
                spent.add("TensorBoard", began)
        if not running:
            break
        number = draw.choice(sorted(running))
        point, step, best = running[number]
        step += EVERY
        report = metrics(point, step, best, draw)
        running[number] = (point, step, report[BEST_DEV_ACCURACY])
        began = time.perf_counter()
        ledger.report(number, step, report)
        spent.add("reports", began)
        began = time.perf_counter()
        goes_on = scheduler.keep_training(ledger, number, step)
        spent.add("ASHA", began)
        if events:
            began = time.perf_counter()
            view.reported(number, report)
            spent.add("TensorBoard", began)
        if step >= MAX_STEPS or not goes_on:
            del running[number]
            began = time.perf_counter()
            ledger.finish(number, "COMPLETE" if step >= MAX_STEPS else "PRUNED")
            ledger.in_flight.discard(number)
            result = ledger.by_number[number]
            spent.add("ends", began)
            if events:
                began = time.perf_counter()
                view.ended(result)
                spent.add("TensorBoard", began)
    view.close()
    ledger.close()
    return spent


def tpe_seconds(folder: Path, space: SearchSpace, trials: int, asks: int = 5) -> float:
    """Seconds that TPE needs for one proposal after so many trials."""
    copy = folder.with_name(f"{folder.name}-tpe")
    copy.mkdir()
    shutil.copy(folder / layout.JOURNAL_FILE, copy / layout.JOURNAL_FILE)
    ledger = open_ledger(copy, space, trials + asks, "tpe")
    began = time.perf_counter()
    for _ in range(asks):
        next_trial(ledger)
    seconds = (time.perf_counter() - began) / asks
    ledger.close()
    return seconds


def row(root: Path, space: SearchSpace, trials: int) -> dict[str, str]:
    """All that is measured at one size."""
    folder = root / f"study-{trials}"
    folder.mkdir()
    began = time.perf_counter()
    spent = drive(folder, space, trials, True)
    total = time.perf_counter() - began
    made = {"whole study, s": f"{total:.1f}"}
    made |= {f"{k}, ms a trial": f"{v / trials * 1000:.2f}" for k, v in spent.of.items()}
    made["TPE proposal, ms"] = f"{tpe_seconds(folder, space, trials) * 1000:.0f}"
    began = time.perf_counter()
    ledger = open_ledger(folder, space, trials, "random")
    ledger.study_config.make_scheduler().stopped(ledger)
    made["open it again, s"] = f"{time.perf_counter() - began:.2f}"
    began = time.perf_counter()
    (folder / layout.TRIALS_FILE).write_text(csv_text(ledger.trial_rows()))
    made["trials.csv, s"] = f"{time.perf_counter() - began:.2f}"
    reports = len(ledger.history)
    ledger.close()
    made["reports"] = f"{reports:,}"
    for name in (layout.JOURNAL_FILE, layout.OPTUNA_FILE):
        made[f"{name}, MB"] = f"{(folder / name).stat().st_size / 1e6:.1f}"
    files = list(trial_folder(folder, 0).parent.glob("*/events.*"))
    made["TensorBoard files"] = f"{len(files):,}"
    made["TensorBoard, MB"] = f"{sum(f.stat().st_size for f in files) / 1e6:.1f}"
    made["peak memory, MB"] = f"{peak_mb():.0f}"
    return made


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--out", type=Path, help="a Markdown file whose section is replaced")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="dmx-scale-"))
    (root / "space.yaml").write_text(SPACE, encoding="utf-8")
    space = load_space(str(root / "space.yaml"), TASK)
    columns = [row(root, space, trials) for trials in sorted(args.trials)]
    shutil.rmtree(root)
    head = ["", *(f"{trials:,} trials" for trials in sorted(args.trials))]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {name} | {' | '.join(c[name] for c in columns)} |" for name in columns[0]]
    lines += [
        "",
        f"{AT_ONCE} trials at once, load {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores.",
    ]
    text = "\n".join(lines)
    if args.out is not None:
        write_section(args.out, "scale", text)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
