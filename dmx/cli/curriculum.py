"""`dmx.curriculum`: train a chain of stages, each from the best checkpoint before it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmx.cli.options import Parser, add_compute, add_places, add_resume, chosen
from dmx.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_PARTIAL, ConfigError
from dmx.format import command_line
from dmx.registry import shipped_names
from dmx.schema import flatten, is_url, parse_assignments

logger = logging.getLogger("dmx.curriculum")
PROG = "dmx.curriculum"

EXAMPLES = """\
  python -m dmx.curriculum smoke --name try
      a tiny curriculum on generated images, in a minute or two
  python -m dmx.curriculum pathx --dry-run
      check the whole chain and estimate time and memory; nothing is started
  python -m dmx.curriculum pathx --data-root /data/lra
      run it; the same command continues after Ctrl-C, a crash or a lost node
  python -m dmx.curriculum pathx --status
      where it stands, from another terminal
  python -m dmx.curriculum pathx --attention nystrom --name pathx-nystrom
      the same stages with another attention, its size in place of the file's
  python -m dmx.curriculum pathx --from-stage pathX-cl14_alpha0.75
      train that stage and those after it again; their old checkpoints stay on disk
"""


def parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog=PROG,
        description="Train a curriculum: stages, each from the best checkpoint of another.",
        examples=EXAMPLES,
        settings="--set {}=VALUE",
    )
    p.add_argument(
        "curriculum",
        nargs="?",
        help=f"a YAML path, or one of: {', '.join(shipped_names('curricula'))}",
    )
    p.add_argument("--name", help="the run's folder below the storage (default: the curriculum's)")
    p.add_argument(
        "--storage",
        "--run-root",
        default="runs",
        help="where runs are kept: a path or a URL (default: runs)",
    )
    p.add_argument("--data-root", help="prepared data (default: $DMX_DATA_ROOT, else ./data)")
    p.add_argument("--attention", help="run all stages with this attention: nystrom, performer-64")
    p.add_argument(
        "--set", action="append", default=[], metavar="A.B=V", help="a setting for every stage"
    )
    add_places(p)
    p.add_argument("--until", metavar="STAGE", help="stop after this stage")
    p.add_argument(
        "--from-stage", metavar="STAGE", help="train this stage and those that follow from it again"
    )
    add_resume(p, "curriculum")
    p.add_argument("--fresh", action="store_true", help="move an existing run aside, start anew")
    p.add_argument("--dry-run", action="store_true", help="check and measure only")
    p.add_argument("--status", action="store_true", help="show where the run stands")
    p.add_argument("--cpus-per-trial", type=float, help="CPU cores of a run")
    add_compute(p, "a run")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command; see dmx.errors for the exit codes."""
    from dmx.cli import resuming
    from dmx.curriculum.controller import ClusterLost
    from dmx.curriculum.run import Session
    from dmx.curriculum.views import log_failures, show_end

    p = parser()
    given, _ = resuming.resumed(_given(p, argv), "curriculum", default_name=_default_name)
    args = p.filled(given)
    if args.curriculum is None:
        raise ConfigError("give a curriculum, a name or a YAML path, or --resume RUN.")
    session = Session(
        overrides=_overrides(vars(args)), resume=bool(args.resume), **chosen(Session, args)
    )
    if args.status or args.dry_run:
        session.show_status() if args.status else session.dry_run()
        return EXIT_OK
    try:
        outcome = session.run(resuming.recorded(given))
    except (KeyboardInterrupt, ClusterLost) as error:
        logger.warning(
            "%s; everything up to the last evaluation is kept. Continue with:",
            str(error) or "interrupted",
        )
        sys.stderr.write(continue_command(argv) + "\n")
        return EXIT_PARTIAL if isinstance(error, ClusterLost) else EXIT_INTERRUPTED
    show_end(session.config, outcome.record)
    if outcome.passed:
        return EXIT_OK
    log_failures(outcome.record, outcome.broken)
    return EXIT_FAILED


def _given(p: Parser, argv: Sequence[str]) -> dict[str, Any]:
    """The arguments; in `--resume NAME` without another one, NAME is a run or a curriculum."""
    given = p.given(argv)
    word = given.get("resume")
    if isinstance(word, str) and "curriculum" not in given and not is_url(word):
        below = Path(given.get("storage", p.get_default("storage"))) / word
        if "name" in given or not (Path(word).is_dir() or below.is_dir()):
            given |= {"curriculum": word, "resume": True}
    return given


def _default_name(given: Mapping[str, Any]) -> str | None:
    from dmx.curriculum.run import Session

    if given.get("curriculum") is None:
        return None
    attention, overrides = given.get("attention"), _overrides(given)
    return Session(given["curriculum"], attention=attention, overrides=overrides).config.name


def _overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    return flatten(parse_assignments(given.get("set", [])))


def continue_command(argv: Sequence[str]) -> str:
    """The command that continues: the same, without what would start something over."""
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--from-stage")
    return command_line(PROG, p.parse_known_args(argv)[1])
