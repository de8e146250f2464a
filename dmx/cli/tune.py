"""`dmx.tune`: search an attention's hyperparameters on a task."""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmx.cli.options import (
    Parser,
    add_compute,
    add_places,
    add_resume,
    chosen,
    duration,
)
from dmx.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PARTIAL,
    ConfigError,
    InterruptedRun,
    StorageError,
)
from dmx.format import command_line
from dmx.runs.study import SAMPLERS, SCHEDULERS
from dmx.schema import flatten, parse_assignments
from dmx.storage.files import STORAGE_TIMEOUT

logger = logging.getLogger("dmx.tune")

EXAMPLES = """\
  python -m dmx.tune --attention butterfly --task text
      search on this machine; without prepared LRA data it runs on a small labelled sample
  python -m dmx.tune --attention butterfly-64 --task listops --num-trials 32 --max-steps 2000
      block_size is fixed to 64, the rest is searched
  python -m dmx.tune --attention softmax --task text --set model.num_layers=4
      any setting can be fixed; python -m dmx.train --attention softmax --task text --show
      lists them
  python -m dmx.tune --resume runs/butterfly-text
      continue after Ctrl-C, a crash or a time budget; with --num-trials 32 added, for longer
  python -m dmx.tune --attention butterfly --task text --objective accuracy,latency
      accuracy against time per sample: the Pareto front instead of one best trial
  python -m dmx.tune --attention butterfly --task text --name again --warm-start butterfly-text
      a new study whose sampler knows the trials of an earlier one
  python -m dmx.tune --attention butterfly --task listops --address auto --data-root /shared/data \\
      --storage /shared/runs --trials-per-gpu 2 --final-seeds 3
      on a running Ray cluster, two trials a GPU; the best setting is retrained with 3 seeds
"""


def parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="dmx.tune",
        description="Search an attention's hyperparameters with Optuna on Ray Tune.",
        examples=EXAMPLES,
        settings="--set {}=VALUE",
    )
    p.add_argument(
        "--attention", help="butterfly, softmax, ...; NAME-SIZE fixes its size (required)"
    )
    p.add_argument("--task", help="text, listops, pathfinder32-curv_baseline, ... (required)")
    p.add_argument("--space", help="search space: a name or a YAML path (default: the attention's)")
    p.add_argument("--set", action="append", default=[], metavar="A.B=V", help="fix a setting")
    p.add_argument("--name", help="the study's folder below the storage (default: ATTENTION-TASK)")
    p.add_argument(
        "--storage", default="runs", help="where studies are kept: a path or a URL (default: runs)"
    )
    p.add_argument(
        "--data-root",
        help="prepared data (a path or a URL); given, missing data are an error, not a sample",
    )
    p.add_argument(
        "--prepare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="generate missing data that dmx can generate (default: yes)",
    )
    p.add_argument("--num-trials", type=int, help="trials in all")
    p.add_argument("--max-steps", type=int, help="optimizer steps of a full trial")
    p.add_argument(
        "--objective",
        default="accuracy",
        metavar="NAME[,NAME]",
        help="accuracy, or two or three of accuracy, latency, memory, parameters",
    )
    p.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        help="early stopping, or training as a population (default: asha; with several "
        "objectives none)",
    )
    p.add_argument(
        "--grace-steps",
        type=int,
        metavar="N",
        help="steps before ASHA may stop a trial, or from one comparison of a population to the "
        "next (default: a ninth of a full trial)",
    )
    p.add_argument(
        "--reduction-factor",
        type=float,
        metavar="F",
        help="of ASHA and Hyperband: the best 1/F of the trials pass a rung (default: 3)",
    )
    p.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="tpe",
        help="how points are proposed (default: tpe; gp for few and costly trials; cmaes for "
        "numbers, nsga2 for several objectives, each with hundreds of trials)",
    )
    p.add_argument(
        "--warm-start",
        action="append",
        default=[],
        metavar="RUN",
        help="an earlier study that the sampler learns from; may be given again",
    )
    p.add_argument("--seed", type=int, default=0, help="of the search (default: 0)")
    p.add_argument(
        "--final-seeds", type=int, default=0, metavar="N", help="retrain the best N times"
    )
    p.add_argument(
        "--time-budget",
        type=duration,
        metavar="DURATION",
        help="stop after so many seconds, or 10m, 1h30m, 2d; continue with --resume",
    )
    p.add_argument("--cpus-per-trial", type=float, help="CPU cores of a trial")
    add_compute(p, "a trial")
    p.add_argument(
        "--trials-per-gpu",
        metavar="N",
        help="trials that share a GPU (default: 1); auto measures how many fit",
    )
    p.add_argument(
        "--max-concurrent-trials",
        type=int,
        metavar="N",
        help="at once (default: what fits); with 1 the same seed repeats the same search",
    )
    p.add_argument(
        "--trial-timeout",
        type=duration,
        metavar="DURATION",
        help="a trial that does not report for so long is restarted from its last checkpoint "
        "(default: 10 times the usual interval, at least 30 minutes)",
    )
    p.add_argument(
        "--storage-patience",
        type=duration,
        default=STORAGE_TIMEOUT,
        metavar="DURATION",
        help="wait so long for a storage that is full, read-only or gone (default: 2m)",
    )
    add_places(p)
    p.add_argument(
        "--output",
        choices=("auto", "live", "plain", "json", "quiet"),
        default="auto",
        help="a live table (auto: on a terminal), plain lines, JSON lines, or the end only",
    )
    add_resume(p, "study")
    p.add_argument(
        "--dry-run", action="store_true", help="check everything; show the plan and its cost only"
    )
    p.add_argument(
        "--price-per-gpu-hour", type=float, metavar="PRICE", help="for --dry-run: what a GPU costs"
    )
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code says whether the study is complete."""
    from dmx.cli import resuming
    from dmx.costs.estimate import check_price
    from dmx.study.plan import StudyOptions
    from dmx.study.run import dry_run, run_study

    p = parser()
    given, _ = resuming.resumed(p.given(argv), "study", default_name=_default_name)
    args = p.filled(given)
    if not args.attention or not args.task:
        raise ConfigError("give --attention and --task, or --resume RUN.")
    options = chosen(StudyOptions, args)
    options |= {"overrides": flatten(parse_assignments(args.set)), "resume": bool(args.resume)}
    if args.dry_run:
        dry_run(**options, price_per_gpu_hour=args.price_per_gpu_hour)
        return EXIT_OK
    check_price(args.price_per_gpu_hour, dry_run=False)
    again = command_line("dmx.tune", argv, add="--resume")
    began = time.monotonic()
    try:
        study = run_study(**options, recorded=resuming.recorded(given), write_page=_write_page)
    except InterruptedRun:
        logger.warning("interrupted. Continue with:\n%s", again)
        return EXIT_INTERRUPTED
    except StorageError as error:
        logger.error("%s\n%s", error, again)
        return EXIT_FAILED
    if not study.complete:
        logger.warning(
            "the study is not complete (%d of %d trials ended). Continue with:\n%s",
            *(len(study.outcomes), study.search.num_trials, again),
        )
        out_of_time = time.monotonic() - began >= (args.time_budget or math.inf)
        return EXIT_PARTIAL if out_of_time else EXIT_INTERRUPTED
    best = study.best_trial
    return EXIT_OK if best is not None and best.checkpoint is not None else EXIT_FAILED


def _write_page(folder: Path) -> Path | None:
    from dmx.reporting.report import write_page  # seconds that a refusal need not wait

    return write_page(folder)


def _default_name(given: Mapping[str, Any]) -> str | None:
    from dmx.study.plan import StudyOptions

    attention, task = given.get("attention"), given.get("task")
    return StudyOptions(attention=attention, task=task).default_name if attention and task else None
