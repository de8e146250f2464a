"""`dmx.train`: one run of one configuration, continued where it stopped; no Ray."""

from __future__ import annotations

import argparse

from dmx.cli.options import Parser, add_compute, add_resume, as_setting

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
        hint=as_setting("{}=VALUE"),
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
