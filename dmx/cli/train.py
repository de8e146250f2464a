"""`dmx.train`: one run of one configuration, continued where it stopped; no Ray."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dmx.cli.options import Parser, add_compute, add_resume, chosen
from dmx.errors import EXIT_INTERRUPTED, EXIT_OK, InterruptedRun
from dmx.format import command_line
from dmx.schema import flatten, parse_assignments

logger = logging.getLogger("dmx.train")

EXAMPLES = """\
  python -m dmx.train --attention butterfly-64 --task listops
      the reference's preset for the task, in runs/butterfly-64-listops
  python -m dmx.train --attention softmax --task text train.num_steps=2000 optim.warmup_steps=200
      any setting can be given as a.b=value; --show lists them all
  python -m dmx.train --config runs/butterfly-text/best/config.yaml --name again train.seed=7
      train the best setting of a search again
  python -m dmx.train --resume runs/butterfly-64-listops
      continue where it stopped
  python -m dmx.train --attention butterfly-64 --task listops --gpus-per-trial 4
      the same run and result by four GPUs (--workers-per-trial 4: by four CPU processes)
  python -m dmx.train --evaluate runs/butterfly-text/best
      test accuracy of a checkpoint
"""


def parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="dmx.train",
        description="Train one configuration, or evaluate a checkpoint.",
        examples=EXAMPLES,
        settings="{}=VALUE",
    )
    p.add_argument("--attention", help="butterfly, butterfly-64, softmax, ...")
    p.add_argument("--task", help="text, listops, pathfinder32-curv_baseline, ...")
    p.add_argument("--config", help="a config.yaml to start from")
    p.add_argument("--name", help="folder below the storage (default: ATTENTION-TASK)")
    p.add_argument("--storage", default="runs", help="where runs are kept (default: runs)")
    p.add_argument(
        "--data-root", help="prepared data; given, missing data are an error, not a sample"
    )
    p.add_argument(
        "--prepare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="generate missing data that dmx can generate (default: yes)",
    )
    p.add_argument(
        "--init-from", help="start from these weights: a checkpoint folder or *_output.model"
    )
    p.add_argument(
        "--reinit",
        action="append",
        default=[],
        metavar="NAME",
        help="with --init-from: what may start afresh where it does not fit; a parameter's name, "
        "a prefix ending in a dot, or a pattern with * (repeatable)",
    )
    p.add_argument(
        "--evaluate",
        metavar="CHECKPOINT",
        help="only evaluate this checkpoint; with --task on another set of its family",
    )
    p.add_argument("--split", choices=("dev", "test"), default="test", help="what --evaluate reads")
    p.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    add_compute(p, "the run", whole_gpus=True)
    add_resume(p, "run")
    p.add_argument("--dry-run", action="store_true", help="show what the run would cost, and stop")
    p.add_argument(
        "--price-per-gpu-hour", type=float, metavar="PRICE", help="for --dry-run: what a GPU costs"
    )
    p.add_argument("--show", action="store_true", help="print the resolved configuration and stop")
    p.add_argument("settings", nargs="*", metavar="a.b=value", help="settings of the run")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    from dmx.cli import resuming
    from dmx.costs.estimate import check_price
    from dmx.study import single_run

    p = parser()
    given, record = resuming.resumed(p.given(argv), "run", default_name=_default_name)
    args = p.filled(given)
    settings = flatten(parse_assignments(args.settings))
    if args.evaluate is not None:
        return _evaluate(args, settings)
    config = single_run.configure(
        args.attention,
        args.task,
        settings,
        base=args.config,
        init_from=args.init_from,
        reinit=args.reinit,
        recorded=record.get("settings", {}).get("config"),
    )
    if args.show:
        sys.stdout.write(config.to_yaml())
        return EXIT_OK
    options = chosen(single_run.RunOptions, args) | {"resume": bool(args.resume)}
    if args.name is None:
        options["name"] = f"{args.attention or config.attention.name}-{config.task}"
    if args.dry_run:
        single_run.dry_run(config, price_per_gpu_hour=args.price_per_gpu_hour, **options)
        return EXIT_OK
    check_price(args.price_per_gpu_hour, dry_run=False)
    try:
        single_run.run_training(config, recorded=resuming.recorded(given), **options)
    except InterruptedRun:
        again = command_line("dmx.train", argv, add="--resume")
        logger.warning("stopped; what was trained is kept. Continue with:\n%s", again)
        return EXIT_INTERRUPTED
    return EXIT_OK


def _evaluate(args: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    import yaml

    from dmx.training.evaluation import evaluate

    found = evaluate(
        args.evaluate,
        args.split,
        task=args.task,
        settings=settings,
        data_root=args.data_root,
        prepare=args.prepare,
        threads=args.threads,
    )
    sys.stdout.write(yaml.safe_dump(found, sort_keys=False))
    return EXIT_OK


def _default_name(given: Mapping[str, Any]) -> str | None:
    attention, task = given.get("attention"), given.get("task")
    if given.get("config") is not None and not (attention and task):
        from dmx.study.single_run import configure

        found = configure(attention, task, base=given["config"])
        attention, task = attention or found.attention.name, found.task
    return f"{attention}-{task}" if attention and task else None
