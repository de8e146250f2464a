"""Search efficiency: random search at full length against TPE with ASHA, at equal compute.

    bench_search.py                               handwritten digits, small models
    bench_search.py --out docs/benchmarks.md      the same; writes the table there
    bench_search.py --space butterfly --task listops --no-small --folder runs/b

Given again, the command continues where it stopped.

Both methods get the same number of optimizer steps: that of --random-trials full trials. Random
search spends them on so many trials; TPE with ASHA starts trials until they are spent, and its
curve is cut there. Every study is a real one (dmx.study.train_trials) with its own seed, which both
methods share; both evaluate equally often, so neither has more draws for a lucky best. Written to
--folder: curves.csv (one row per report), curves.svg (best so far, mean and each seed),
summary.json. `--out FILE` puts the table between its markers in a markdown file, and the figure
into img/ beside it.

The defaults: the digits sample (1,797 real images of 10 classes, enlarged to the Image task's 1,024
tokens), since a model of one to three narrow layers learns it within some hundred steps and fails
at a poor learning rate; and a wide space (bench_search.yaml), of which chance seldom finds the good
part. With the dev split's 297 images, where half of all settings do equally well, only luck is
compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_cases import write_section
from search_curves import (
    METHODS,
    Curve,
    describe,
    plot,
    read_curve,
    summarise,
    table,
)

from dmx.cli import options as cli
from dmx.cluster import capacity, connection
from dmx.data.prepare import open_data
from dmx.data.store import Store
from dmx.errors import EXIT_OK, ConfigError
from dmx.format import csv_text
from dmx.reporting.report import write_file
from dmx.schema import flatten, parse_assignments
from dmx.search.space import load_space
from dmx.study.study import StudyConfig, train_trials
from dmx.tasks import task_for
from dmx.training.job import Workers

logger = logging.getLogger("dmx.bench_search")
SPACE = Path(__file__).with_name("bench_search.yaml")

SMALL = {"model.embedding_dim": 32, "model.hidden_dim": 32, "model.head_dim": 16}
"""Narrow models, so that a CPU does it within half an hour."""


def parser() -> cli.Parser:
    """The options."""
    p = cli.Parser(
        prog="bench_search.py",
        description="Random search at full length against TPE with ASHA, at equal compute.",
        examples="  python scripts/benchmarks/bench_search.py --out docs/benchmarks.md\n",
    )
    p.add_argument("--space", default=str(SPACE), help="a name or a YAML path (a wide one)")
    p.add_argument("--task", default="image", help="what is trained (default: image)")
    p.add_argument("--data-root", help="prepared data; without it a sample may stand in")
    p.add_argument("--max-steps", type=int, default=160, help="steps of a full trial (160)")
    p.add_argument("--eval-every", type=int, help="steps between evaluations (max-steps / 16)")
    p.add_argument("--grace-steps", type=int, help="ASHA's first rung (max-steps / 16)")
    p.add_argument("--reduction-factor", type=float, default=4.0, help="of ASHA (default: 4)")
    p.add_argument("--batch-size", type=int, default=16, help="sequences per step (default: 16)")
    p.add_argument("--random-trials", type=int, default=27, help="full trials = the budget (27)")
    p.add_argument("--seeds", type=int, default=3, help="repetitions of both methods (default: 3)")
    p.add_argument(
        "--small", action=argparse.BooleanOptionalAction, default=True, help="narrow models (yes)"
    )
    p.add_argument("--set", action="append", default=[], metavar="A.B=V", help="fix a setting")
    p.add_argument("--cpus-per-trial", type=float, default=1.0)
    p.add_argument("--gpus-per-trial", type=float, default=0.0)
    p.add_argument("--address", help="a running Ray cluster; default: this machine")
    p.add_argument("--folder", default="runs/bench-search", help="where the studies go")
    p.add_argument("--out", metavar="FILE", help="a markdown file that gets the table")
    return p


def main(argv: Sequence[str]) -> int:
    """Run what is missing of the studies, then compare."""
    args = parser().parse_args(argv)
    for name in ("max_steps", "random_trials", "seeds", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1.")
    out = Path(args.folder).absolute()
    store = open_data(
        args.task, Path(args.data_root) if args.data_root else None, allow_sample=True
    )
    budget = args.random_trials * args.max_steps
    curves = []
    with connection.connect(args.address) as resources:
        slots = capacity.check_request(
            resources, cpus=args.cpus_per_trial, gpus=args.gpus_per_trial
        )
        for seed in range(args.seeds):
            for method in METHODS:
                config = study(args, method, seed)
                folder = out / config.name
                folder.mkdir(parents=True, exist_ok=True)
                spend(config, store, folder, slots=slots, budget=budget)
                curves.append(read_curve(folder, method, seed, budget))
    write_results(out, args, store, curves, budget)
    return EXIT_OK


def spend(config: StudyConfig, store: Store, folder: Path, *, slots: int, budget: int) -> None:
    """Run a study, with ever more trials, until it has taken so many optimizer steps.

    Random search needs more trials than planned where some diverge, and end early.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    while True:
        logger.info("%s: %d trials", config.name, config.num_trials)
        result = train_trials(config, store, folder, slots=slots)
        if not result.complete:
            raise KeyboardInterrupt
        used = sum(trial.steps for trial in result.trials)
        if used >= budget:
            return
        count = len(result.trials)
        more = math.ceil((budget - used) * count / max(used, 1))
        config = dataclasses.replace(config, num_trials=count + min(more, count))


def study(args: argparse.Namespace, method: str, seed: int) -> StudyConfig:
    """The study of one method and one seed."""
    task = task_for(args.task)
    every = args.eval_every or max(args.max_steps // 16, 1)
    grace = args.grace_steps or max(args.max_steps // 16, every)
    fixed: dict[str, Any] = {
        "train.num_steps": args.max_steps,
        "train.eval_every_steps": every,
        "train.batch_size": args.batch_size,
        "optim.warmup_steps": min(max(args.max_steps // 10, 2), args.max_steps - 1),
        **(SMALL if args.small else {}),
        **flatten(parse_assignments(args.set)),
    }
    space = load_space(args.space, task.name).without(fixed)
    space = dataclasses.replace(space, start=())  # the paper's setting would help both alike
    space.check(task.name, fixed)
    asha = method == "tpe+asha"
    return StudyConfig(
        name=f"{method}-seed{seed}",
        task=task.name,
        space=space,
        overrides=fixed,
        num_trials=max(args.random_trials, 40) if asha else args.random_trials,
        max_steps=args.max_steps,
        grace_steps=grace,
        reduction_factor=args.reduction_factor,
        scheduler="asha" if asha else "none",
        sampler="tpe" if asha else "random",
        seed=seed,
        workers=Workers(cpus=args.cpus_per_trial, gpus=args.gpus_per_trial),
    )


def write_results(
    out: Path, args: argparse.Namespace, store: Store, curves: Sequence[Curve], budget: float
) -> None:
    """CSV, SVG and summary, each as a whole."""
    rows: list[Mapping[str, Any]] = [
        {"method": c.method, "seed": c.seed, "steps": s, "best_dev_accuracy": a}
        for c in curves
        for s, a in c.points
    ]
    write_file(out / "curves.csv", csv_text(rows))
    write_file(out / "curves.svg", plot(curves, budget, store.manifest.label))
    task = task_for(args.task)
    summary = summarise(curves, budget)
    summary |= {
        "task": args.task,
        "attention": load_space(args.space, task.name).attention,
        "data": store.manifest.label,
    }
    write_file(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    text = "\n".join((*describe(summary), "", *table(summary, curves)))
    sys.stdout.write(f"{text}\n\nfiles: {out}\n")
    if args.out:
        page = Path(args.out)
        figure = page.parent / "img" / "bench_search.svg"
        figure.parent.mkdir(parents=True, exist_ok=True)
        write_file(figure, plot(curves, budget, store.manifest.label))
        command = f"`python scripts/benchmarks/bench_search.py {shlex.join(sys.argv[1:])}`"
        machine = f"{platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}"
        content = (
            f"Command: {command}  \nMachine: {machine}; load average {os.getloadavg()[0]:.1f} at "
            f"the end.\n\n{text}\n\n![Best accuracy so far against compute](img/bench_search.svg)"
        )
        write_section(page, "bench_search", content)


if __name__ == "__main__":
    cli.run("bench_search.py", main)
