"""`dmx.tune`: search an attention's hyperparameters on a task."""

from __future__ import annotations

import argparse

from dmx.cli.options import Parser, add_compute, add_places, add_resume, as_setting, duration
from dmx.errors import ConfigError
from dmx.runs.study import SAMPLERS, SCHEDULERS
from dmx.storage.files import STORAGE_TIMEOUT

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
        hint=as_setting("--set {}=VALUE"),
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


def check_limits(args: argparse.Namespace) -> None:
    """Refuse limits that make no sense.

    Raises:
        ConfigError: names the option.
    """
    if args.max_concurrent_trials is not None and args.max_concurrent_trials < 1:
        raise ConfigError(
            f"--max-concurrent-trials is {args.max_concurrent_trials}; it must be 1 or more."
        )
    if args.trial_timeout is not None and not args.trial_timeout > 0:
        raise ConfigError(f"--trial-timeout is {args.trial_timeout:g}; it must be positive.")
    if not args.storage_patience >= 0:
        raise ConfigError(
            f"--storage-patience is {args.storage_patience:g}; it must not be negative."
        )
